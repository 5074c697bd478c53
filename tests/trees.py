"""Comparing nested states, bit by bit."""

import numpy as np
import torch


def same(one, two, where="") -> None:
    """Every leaf equal in type, dtype and bits."""
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            same(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            same(a, b, f"{where}/{i}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and one.shape == two.shape, where
        first, second = (t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (one, two))
        assert first.equal(second), where
    elif isinstance(one, np.ndarray):
        assert one.dtype == two.dtype and one.shape == two.shape, where
        assert one.tobytes() == two.tobytes(), where
    else:
        assert one == two, where
