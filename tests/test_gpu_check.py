"""benchmarks/gpu_check.sh where there is no GPU; what it does on one, only one can show."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or shutil.which("bash") is None, reason="a GPU, or no bash"
)


def run(folder, python):
    command = ["bash", str(ROOT / "benchmarks/gpu_check.sh"), str(folder)]
    return subprocess.run(
        command, env={**os.environ, "PYTHON": python}, capture_output=True, text=True
    )


def test_stops_with_one_line(tmp_path):
    result = run(tmp_path / "out", sys.executable)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("gpu_check: expected a GPU that PyTorch ")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_names_an_interpreter_without_pytorch(tmp_path):
    result = run(tmp_path / "out", str(tmp_path / "python"))
    assert result.returncode == 2 and "set PYTHON" in result.stderr
