"""What the op tests share: golden files, comparison by norm, the dispatch paths."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(os.environ.get("FASTWM_GOLDEN") or Path(__file__).parents[1] / "golden")


@pytest.fixture
def golden():
    """load(name) -> dict of tensors; a file that is not there skips the test."""

    def load(name):
        path = GOLDEN / f"{name}.npz"
        if not path.exists():
            pytest.skip(f"{path} is not there")
        return {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(path).items()}

    return load


@pytest.fixture
def near():
    """near(actual, expected, rtol): difference in norm, relative to the norm of expected."""

    def check(actual, expected, rtol=1e-5, who=""):
        actual, expected = actual.detach(), expected.detach()
        assert actual.shape == expected.shape, who
        difference = torch.linalg.vector_norm((actual - expected).double())
        scale = torch.linalg.vector_norm(expected.double()).clamp(min=1e-6)
        assert difference <= rtol * scale, f"{who}: off by {float(difference / scale):.3g}"

    return check
