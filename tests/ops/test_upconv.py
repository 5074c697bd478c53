"""The upconv stem: the phase form equals upsample and convolution."""

import pytest
import torch

from fastwm import ops

SHAPES = [(2, 3, 4, 5, 2), (1, 1, 1, 1, 1), (0, 2, 3, 3, 2), (3, 4, 2, 7, 1), (1, 2, 8, 8, 3)]


@pytest.mark.parametrize("n, c, h, w, out", SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_reference(near, n, c, h, w, out, layout):
    def inputs():
        torch.manual_seed(0)
        x = torch.randn(n, c, h, w, dtype=torch.float64).to(memory_format=layout)
        weight, bias = torch.randn(out, c, 5, 5).double(), torch.randn(out).double()
        return [t.requires_grad_() for t in (x, weight, bias)]

    results = []
    for function in (ops.upsample_conv2d, ops.upsample_conv2d_ref):
        leaves = inputs()
        y = function(*leaves)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
        results.append([y, *torch.autograd.grad(y, leaves, cotangent)])
    for name, a, b in zip(("y", "grad_x", "grad_weight", "grad_bias"), *results, strict=True):
        near(a, b, 1e-13, name)
