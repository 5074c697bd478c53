"""Stacks of layers as acting uses them, weights packed beforehand; layers that read one-hots."""

import pytest
import torch

from fastwm import ops

STACKS = {
    "encoder 1m": (24, 64, 64, 64),
    "actor 1m": (640, 64, 64, 64, 6),
    "actor 12m": (2560, 256, 256, 256, 6),
}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("rows", [16, 1024])
def test_mlp(time_op, variant, mode, stack, rows):
    if mode != "forward":
        pytest.skip("there is no backward pass of its own")
    sizes, weights = STACKS[stack], []
    for i, o in zip(sizes, sizes[1:], strict=False):
        weights += [torch.randn(o, i) / i**0.5, torch.randn(o), torch.rand(o)]
    weights = weights[:-1] if sizes[-1] == 6 else weights
    packed, work = (
        ops.packed_mlp(weights),
        sum(i * o for i, o in zip(sizes, sizes[1:], strict=False)),
    )
    moved = 4 * (rows * (sizes[0] + sizes[-1]) + work)

    def fused(x, weights):
        return ops.mlp(x, weights) if packed is None else packed(x)

    time_op(f"mlp {stack} N{rows}", fused, ops.mlp_ref, (torch.randn(rows, sizes[0]), weights), [],
            (moved, moved), 2 * rows * work)  # fmt: skip


@pytest.mark.parametrize("groups, classes, outputs", [(32, 4, 320), (32, 16, 1280)])
def test_sparse_linear(time_op, groups, classes, outputs):
    """The share of one-hots in the first layers of five heads, size1m and size12m."""
    rows, inputs = 1024, groups * classes
    index = torch.randint(0, classes, (rows, groups))
    x = torch.nn.functional.one_hot(index, classes).flatten(1).float()
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    array, moved = 4 * outputs * inputs, 4 * rows * (inputs + outputs)
    time_op(f"sparse_linear N{rows} {groups}x{classes} to {outputs}", ops.sparse_linear,
            ops.sparse_linear_ref, (x, weight, bias), [weight, bias],
            (moved + array, 2 * moved + 2 * array), 2 * rows * groups * outputs)  # fmt: skip
