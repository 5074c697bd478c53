"""The kernel example runs, shows every op, and needs PyTorch alone."""

import subprocess
import sys
from pathlib import Path

from fastwm import ops

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/use_kernels.py"
# Runs it, then says what came along that a project with PyTorch alone would not have.
GUARD = f"""
import runpy, sys
import torch
before = set(sys.modules)
runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
extras = {{"gymnasium", "envpool", "tensorboard", "tqdm", "PIL", "cma"}}
print("beside torch:", sorted(new & extras))
print("of fastwm:", sorted(n for n in sys.modules if n.startswith("fastwm.") and n.count(".") == 1))
"""


def test_kernel_example_needs_torch_alone():
    run = subprocess.run([sys.executable, "-c", GUARD], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "beside torch: []" in run.stdout and "of fastwm: ['fastwm.ops']" in run.stdout, (
        run.stdout
    )
    assert "loss 5.541" in run.stdout


def test_kernel_example_shows_every_op():
    text = EXAMPLE.read_text()
    names = {n.replace("_ref", "") for n in ops.__all__ if "_ref" in n}
    assert [n for n in sorted(names) if f"ops.{n}(" not in text] == []
