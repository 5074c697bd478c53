"""Lambda-return: replay value loss, imagination, a large batch, and a shape of published peers."""

import pytest
import torch

from fastwm import ops

SHAPES = [(16, 64), (1024, 16), (4096, 128), (100_000, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"B{s[0]}-T{s[1]}")
def test_lambda_return(time_op, variant, shape):
    if variant == "compiled" and shape[1] > 64:
        pytest.skip("the unrolled loop takes minutes to compile")
    args = [torch.rand(shape) for _ in range(4)]
    moved = 4 * shape[0] * (5 * shape[1] - 1)
    time_op(f"lambda_return B{shape[0]} T{shape[1]}", ops.lambda_return, ops.lambda_return_ref,
            args, args[:3], (moved, moved))  # fmt: skip
