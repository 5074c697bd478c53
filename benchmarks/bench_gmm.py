"""Mixture likelihoods of an MDN-RNN: 32 latents, 5 components, a short and a whole batch."""

import pytest
import torch

from fastwm import ops

ROWS = [1024, 32768]
Z, M = 32, 5


@pytest.mark.parametrize("rows", ROWS, ids=lambda n: f"N{n}")
@pytest.mark.parametrize("layout", ["factored", "joint"])
def test_gmm_nll(time_op, rows, layout):
    sizes = (Z, M) if layout == "factored" else (M, Z)
    mean, log_std = torch.randn(2, rows, *sizes)
    logits = torch.randn(rows, *sizes[: 2 if layout == "factored" else 1])
    inputs = rows * Z + 2 * mean.numel() + logits.numel()
    results = rows * Z if layout == "factored" else rows
    moved = 4 * (inputs + results), 4 * (inputs + results + 2 * mean.numel() + logits.numel())
    args = (torch.randn(rows, Z), mean, log_std, logits, layout)
    time_op(f"gmm_nll {layout} N{rows} Z{Z} M{M}", ops.gmm_nll, ops.gmm_nll_ref, args,
            [mean, log_std, logits], moved)  # fmt: skip
