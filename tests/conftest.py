"""Shared by all tests: poisoned memory, golden files, op variants, and the one tolerance table."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fastwm import ops

# |fused - reference| <= atol + rtol |reference|, by dtype. Loosening one needs a reason beside it.
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}


def pytest_report_header() -> str:
    return "fastwm: " + ", ".join(f"{k} {v}" for k, v in ops.backend_info().items())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def poison():
    """Uninitialised memory is NaN, in C++ too, so that an element nobody writes is noticed."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def golden():
    """golden("name") -> tensors of name.npz from $FASTWM_GOLDEN or tests/golden; absent: skip."""
    folder = Path(os.environ.get("FASTWM_GOLDEN") or Path(__file__).parent / "golden")

    def load(name: str) -> dict[str, torch.Tensor]:
        path = folder / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"no {path.name} in {folder}")
        with np.load(path) as arrays:
            return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays}

    return load


@pytest.fixture(params=["reference", "fused"])
def variant(request):
    """Runs the test on the plain PyTorch path and on the compiled kernels."""
    if request.param == "fused" and not ops.available("cpu"):
        pytest.skip(f"no compiled kernels: {ops.backend_info()['cpu']}")
    with ops.use_backend(request.param):
        yield request.param


@pytest.fixture
def close():
    """close(actual, expected): compare by the tolerance table; the lower precision rules."""

    def check(actual, expected, **override) -> None:
        low = max(actual.dtype, expected.dtype, key=lambda d: TOLERANCE[d]["rtol"])
        tolerance = {**TOLERANCE[low], **override}
        torch.testing.assert_close(actual.double(), expected.double(), equal_nan=True, **tolerance)

    return check


@pytest.fixture
def near():
    """near(actual, expected, rtol): difference in norm, relative to the norm of expected."""

    def check(actual, expected, rtol=1e-5, who="") -> None:
        actual, expected = actual.detach(), expected.detach()
        assert actual.shape == expected.shape, who
        difference = torch.linalg.vector_norm((actual - expected).double())
        scale = torch.linalg.vector_norm(expected.double()).clamp(min=1e-6)
        assert difference <= rtol * scale, f"{who}: off by {float(difference / scale):.3g}"

    return check
