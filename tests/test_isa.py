"""Every instruction set that this CPU can run gives the same results."""

import os
import subprocess
import sys

import pytest

from fastwm import ops

LEVELS = ["default", "avx2", "avx512"]


@pytest.mark.skipif(not ops.available("cpu"), reason="no compiled kernels")
@pytest.mark.parametrize("level", LEVELS)
def test_selftest_on(level):
    best = ops.backend_info()["cpu_capability"]
    if os.environ.get("FASTWM_CPU_CAPABILITY"):
        pytest.skip("FASTWM_CPU_CAPABILITY is already set")
    if LEVELS.index(level) > LEVELS.index(best):
        pytest.skip(f"this CPU has {best}")
    environment = {**os.environ, "FASTWM_CPU_CAPABILITY": level, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastwm.selftest", "--device", "cpu"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert f"cpu_capability {level}," in run.stdout, run.stderr
    assert run.returncode == 0, run.stdout
