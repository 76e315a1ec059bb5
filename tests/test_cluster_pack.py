"""Packing on Ray that is killed, and started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards.card import load_card
from shards.pack import pack


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_killed_pack_goes_on_to_the_same_bytes(head: str, tmp_path: Path) -> None:
    """Killed on a Ray of its own; goes on where one runs."""
    whole, out, raw = tmp_path / "whole", tmp_path / "out", "phantom:4000/32"
    pack(load_card("phantom-chest"), raw, str(whole))
    command = [sys.executable, "-m", "cluster", "pack", "phantom-chest", raw, "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as driver:
        while not list(out.glob("*.entry.json")):
            assert driver.poll() is None
            time.sleep(0.02)
        os.killpg(driver.pid, signal.SIGKILL)
    stood = {path: path.stat().st_mtime_ns for path in out.glob("*.entry.json")}
    assert not (out / "manifest.json").exists()
    assert len(stood) < len(list(whole.glob("*.entry.json")))
    done = subprocess.run(command, env={**os.environ, "RAY_ADDRESS": head}, capture_output=True, text=True, check=True)
    assert "shards stood unchanged" in done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in stood} == stood
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {path.name: path.read_bytes() for path in whole.iterdir()}
