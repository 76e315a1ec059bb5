"""Shared by all tests: small packed corpora, made once a session and a worker."""

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it once a process, when it is first imported
os.environ["ALLOGRAFT_CACHE"] = tempfile.mkdtemp(prefix="allograft-cache-")  # never the user's own

import shutil
from pathlib import Path

import pytest
from hypothesis import settings

# A test that waits for a processor is not a slow one, and the same commit has the same result.
settings.register_profile("busy machine", deadline=None, derandomize=True)
settings.load_profile("busy machine")


def pytest_unconfigure() -> None:
    """Remove the cache of these tests."""
    shutil.rmtree(os.environ["ALLOGRAFT_CACHE"], ignore_errors=True)


def _pack(card: str, raw: str, out: Path) -> str:
    from shards.card import load_card
    from shards.pack import pack

    pack(load_card(card), raw, str(out))
    return str(out)


@pytest.fixture(scope="session")
def phantom_chest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards of 240 chest phantoms."""
    return _pack("phantom-chest", "phantom:240", tmp_path_factory.mktemp("phantom-chest"))


@pytest.fixture(scope="session")
def phantom_fundus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards of 60 fundus phantoms."""
    return _pack("phantom-fundus", "phantom:60", tmp_path_factory.mktemp("phantom-fundus"))
