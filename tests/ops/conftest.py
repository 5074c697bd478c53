"""Op tests but those of the rssm's loops run CUDA kernels too, on the CPU (tests/emulate.py)."""

import shutil

import emulate
import pytest

from fastwm import ops


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = metafunc.module.__name__  # test_rssm_cuda has a variant of its own
    if "variant" in metafunc.fixturenames and module != "test_rssm_cuda":
        own = module == "test_rssm"
        names = ["reference", "fused"] + ([] if own else ["cuda"])
        metafunc.parametrize("variant", names, indirect=True)


@pytest.fixture
def variant(request):
    """The plain PyTorch path, the compiled kernels, or the CUDA kernels in place of those."""
    if request.param != "reference" and not ops.available("cpu"):
        pytest.skip(f"no compiled kernels: {ops.backend_info()['cpu']}")
    if request.param != "cuda":
        with ops.use_backend(request.param):
            yield request.param
        return
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler (c++)")
    with emulate.instead_of_cpu():
        yield "cuda"
