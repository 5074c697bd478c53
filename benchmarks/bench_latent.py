"""Categorical latents of a replayed batch: 16 x 64 rows of 32 groups, sizes 1m, 12m and 200m."""

import pytest
import torch

from fastwm import ops

CLASSES = [4, 16, 64]
N, S = 1024, 32


@pytest.mark.parametrize("classes", CLASSES, ids=lambda k: f"K{k}")
def test_kl_balance(time_op, classes):
    post, prior = (2 * torch.randn(N, S, classes) for _ in range(2))
    array = 4 * N * S * classes
    time_op(f"kl_balance N{N} {S}x{classes}", ops.kl_balance, ops.kl_balance_ref, (post, prior),
            [post, prior], (2 * array, 4 * array))  # fmt: skip


@pytest.mark.parametrize("classes", CLASSES, ids=lambda k: f"K{k}")
def test_latent_sample(time_op, classes):
    logits, noise, array = torch.randn(N, S, classes), torch.rand(N, S), 4 * N * S * classes
    time_op(f"latent_sample N{N} {S}x{classes}", ops.latent_sample, ops.latent_sample_ref,
            (logits, noise), [logits], (2 * array, 3 * array))  # fmt: skip


@pytest.mark.parametrize("classes", CLASSES, ids=lambda k: f"K{k}")
def test_straight_through(time_op, classes):
    logits, array = torch.randn(N, S, classes), 4 * N * S * classes
    index = torch.randint(classes, (N, S)).to(torch.uint8)
    time_op(f"straight_through N{N} {S}x{classes}", ops.straight_through, ops.straight_through_ref,
            (index, logits), [logits], (array, 3 * array))  # fmt: skip
