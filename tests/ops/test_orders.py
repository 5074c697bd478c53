"""CUDA kernels give the same bits in whatever order threads and blocks run (tests/emulate.py).

Missing barriers, races and sums without a fixed order show as a difference.
"""

import shutil

import emulate
import pytest
import torch

from fastwm import ops
from fastwm.ops import _cases

NAMES = [name for name in _cases.CASES if not name.startswith(("rssm", "gru", "upsample", "conv"))]
pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None or not ops.available("cpu"), reason="no compiler or no kernels"
)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_in_any_order(name):
    runs = []
    for order in (-1, -2, 7):
        torch.manual_seed(0)
        case = _cases.CASES[name](37)
        with emulate.instead_of_cpu(order):
            results, gradients = _cases._run(getattr(ops, name), case, "cpu", wide=False)
        runs.append([x.detach().clone() for x in (*results, *gradients)])
    for other in runs[1:]:
        for one, same in zip(runs[0], other, strict=True):
            assert torch.equal(one, same)


def test_gradient_of_the_scale_over_many_rows_and_wide_rows():
    """Ranges of rows, a block per row: the other paths of norm."""
    for shape in ((70, 33), (3, 1100)):
        runs = []
        for order in (-1, -2, 7):
            torch.manual_seed(0)
            x, scale = torch.randn(shape, requires_grad=True), torch.rand(shape[1])
            scale.requires_grad_()
            with emulate.instead_of_cpu(order):
                y = ops.rms_silu(x, scale)
                runs.append([y, *torch.autograd.grad(y.square().sum(), (x, scale))])
        wide = [x.detach().double().requires_grad_(), scale.detach().double().requires_grad_()]
        y = ops.rms_silu_ref(*wide)
        expected = [y, *torch.autograd.grad(y.square().sum(), wide)]
        for got, want in zip(runs[0], expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("name", ["laprop_agc_", "adam_"])
def test_optimizers_over_several_tables_and_chunks(name):
    """Every block adds the sums of all blocks, those of other launches too; a bad gradient in the
    last launch keeps the first from writing."""
    shapes = [(17000,), (0,), *[(3,)] * 460]
    start = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    start.append([torch.rand(shape) for shape in shapes])

    def run(update, bad=False):
        lists = [[t.clone() for t in group] for group in start]
        slow, step = [t.clone() for t in lists[0]], torch.tensor(4)
        lists[1][-1][2] = float("inf") if bad else 1.0
        copies = ops.Copies(slow, 0.1)
        options = {"clip_norm": 1.0} if name == "adam_" else {"weight_decay": 0.1}
        norm, finite = update(*lists, step, torch.tensor(1e-2), copies=copies, **options)
        return [norm, finite, step, *lists[0], *lists[2], *lists[3], *slow]

    expected = run(getattr(ops, name.removesuffix("_") + "_ref_"))
    runs = []
    for order in (-1, 7):
        with emulate.instead_of_cpu(order):
            runs.append(run(getattr(ops, name)))
    with emulate.instead_of_cpu(-2):
        _, finite, step, *written = run(getattr(ops, name), bad=True)
    assert not finite and step == 4
    before = [*start[0], *start[2], *start[3], *start[0]]
    assert all(torch.equal(a, b) for a, b in zip(written, before, strict=True))
    for one, same, want in zip(*runs, expected, strict=True):
        assert torch.equal(one, same)
        torch.testing.assert_close(one, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["laprop_agc_", "adam_"])
@pytest.mark.parametrize("tensors, launches", [(448, 2), (449, 4)])
def test_an_optimizer_step_is_two_launches_for_448_tensors(name, tensors, launches):
    lists = [[torch.ones(1) for _ in range(tensors)] for _ in range(4)]
    before = emulate.switches().emulation_launches()
    with emulate.instead_of_cpu():
        getattr(ops, name)(*lists, torch.tensor(4), torch.tensor(1e-2))
    assert emulate.switches().emulation_launches() - before == launches
