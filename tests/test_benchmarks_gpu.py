"""The GPU benchmark runs where there is no Ray and no MLflow, and measures nothing where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from base.paths import ROOT


def benchmark(blocked: Path, *words: str) -> str:
    """What it prints, with Ray and MLflow out of reach in it and in the processes that it starts."""
    for name in ("ray", "mlflow"):
        (blocked / f"{name}.py").write_text(f"raise ModuleNotFoundError('{name} is not installed', name='{name}')\n")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *words]
    env = os.environ | {"PYTHONPATH": f"{blocked}:{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_tiny_networks_train_without_ray_and_mlflow(tmp_path: Path) -> None:
    said = benchmark(tmp_path, "--cpu", "--workers", "0").splitlines()
    assert [line.split("  ")[0] for line in said[2:]] == ["ResNet-50 SimCLR", "ViT-B/16 DINO", "ViT-B/16 MAE"]
    assert all(float(line[25:34]) > 0 for line in said[2:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path: Path) -> None:
    assert "no GPU here" in benchmark(tmp_path)
