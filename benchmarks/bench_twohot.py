"""Two-hot loss and mean: the value head on an imagined batch, on a replayed one."""

import pytest
import torch

from fastwm import ops

ROWS = [1024, 16384]
V = 255


@pytest.mark.parametrize("rows", ROWS, ids=lambda n: f"N{n}")
@pytest.mark.parametrize("targets", [1, 2])
def test_twohot_loss(time_op, rows, targets):
    logits, bins = torch.randn(rows, V), ops.symexp_bins(V)
    goals = [10 * torch.randn(rows) for _ in range(targets)]
    args = (logits, goals if targets == 2 else goals[0], bins)
    array = 4 * rows * V
    time_op(f"twohot_loss N{rows} V{V} targets{targets}", ops.twohot_loss, ops.twohot_loss_ref,
            args, [logits], (array, 2 * array))  # fmt: skip


@pytest.mark.parametrize("rows", ROWS, ids=lambda n: f"N{n}")
def test_twohot_mean(time_op, rows):
    logits, array = torch.randn(rows, V), 4 * rows * V
    time_op(f"twohot_mean N{rows} V{V}", ops.twohot_mean, ops.twohot_mean_ref,
            (logits, ops.symexp_bins(V)), [logits], (array, 2 * array))  # fmt: skip


@pytest.mark.parametrize("rows", ROWS, ids=lambda n: f"N{n}")
@pytest.mark.parametrize("units", [64, 256])
def test_twohot_mean_linear(time_op, variant, mode, rows, units):
    if mode != "forward":
        pytest.skip("with a gradient it is the product and twohot_mean")
    args = (torch.randn(rows, units), torch.randn(V, units) / units, torch.zeros(V))
    moved = 4 * (rows * (units + 1) + V * units)
    time_op(f"twohot_mean_linear N{rows} U{units} V{V}", ops.twohot_mean_linear, in_two,
            (*args, ops.symexp_bins(V)), [], (moved, moved), 2 * rows * units * V)  # fmt: skip


def in_two(x, weight, bias, bins):
    """The baseline: the library's product and the kernel of the mean."""
    return ops.twohot_mean(torch.nn.functional.linear(x, weight, bias), bins)


@pytest.mark.parametrize("rows", ROWS, ids=lambda n: f"N{n}")
@pytest.mark.parametrize("units", [64, 256])
def test_twohot_loss_linear(time_op, rows, units):
    head = [torch.randn(rows, units), torch.randn(V, units) / units, torch.zeros(V)]
    args = (*head, 10 * torch.randn(rows), ops.symexp_bins(V))
    logits, rest = 4 * rows * V, 4 * (rows * (units + 2) + V * units)
    moved = (logits + rest, 2 * logits + 3 * rest)
    time_op(f"twohot_loss_linear N{rows} U{units} V{V}", ops.twohot_loss_linear, loss_in_two,
            args, head, moved, 2 * rows * units * V)  # fmt: skip


def loss_in_two(x, weight, bias, target, bins):
    """The baseline: the library's product and the kernel of the loss."""
    return ops.twohot_loss(torch.nn.functional.linear(x, weight, bias), target, bins)
