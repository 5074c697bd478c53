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
