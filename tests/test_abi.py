"""The libraries keep to the stable ABI of libtorch: one binary, every PyTorch since 2.11."""

import shutil
import subprocess
from pathlib import Path

import pytest

import fastwm

LIBRARIES = sorted(Path(fastwm.__file__).parent.glob("_C*.abi3.so"))
pytestmark = [
    pytest.mark.skipif(not LIBRARIES, reason="no compiled kernels"),
    pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm"),
]


def symbols(library: Path, kind: str) -> list[str]:
    command = ["nm", "-DC", f"--{kind}-only", str(library)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split(maxsplit=1 if kind == "undefined" else 2)[-1] for line in lines]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_uses_no_cxx_symbol_of_torch_nor_python(library):
    used = symbols(library, "undefined")
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in used)
    foreign = ("at::", "c10::", "torch::", "Py", "_Py", "caffe2::")
    leaks = [n for n in used if n.startswith(foreign) or any(f" {f}" in n for f in foreign)]
    assert leaks == []


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_exports_nothing_of_its_own(library):
    """Two copies of a kernel in one process must not find each other."""
    assert [n for n in symbols(library, "defined") if "fastwm" in n] == []
