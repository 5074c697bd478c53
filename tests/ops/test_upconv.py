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


def inputs(n=2, c=3, h=4, w=5, out=2, dtype=torch.float32):
    x, weight, bias = torch.randn(n, c, h, w), torch.randn(out, c, 5, 5) / 9, torch.randn(out)
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias)]


def test_any_stride_and_no_bias(near):
    x, weight, _ = inputs(n=4, c=6, h=8, w=6)
    x, weight = x[::2, 1::2, ::2].mT, weight.detach()[:, ::2].flip(0).requires_grad_()
    y, expected = ops.upsample_conv2d(x, weight), ops.upsample_conv2d_ref(x, weight)
    near(y, expected, 1e-5)
    cotangent = torch.randn(y.shape)
    got, want = (torch.autograd.grad(r, (x, weight), cotangent) for r in (y, expected))
    near(got[0], want[0], 1e-5)
    near(got[1], want[1], 1e-5)


def test_low_precision_and_autocast(close):
    leaves = inputs(dtype=torch.bfloat16)
    y = ops.upsample_conv2d(*leaves)
    assert y.dtype == torch.bfloat16
    close(y, ops.upsample_conv2d_ref(*(t.float() for t in leaves)), rtol=5e-2, atol=5e-2)
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(y.sum(), leaves))
    wide = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.upsample_conv2d(*wide)
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), wide))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fullgraph_compile(layout, close):
    torch._dynamo.reset()
    compiled = torch.compile(ops.upsample_conv2d, fullgraph=True, backend="aot_eager")
    x, weight, bias = inputs()
    x = x.detach().to(memory_format=layout).requires_grad_()
    got, want = compiled(x, weight, bias), ops.upsample_conv2d(x, weight, bias)
    close(got, want)
    for a, b in zip(*(torch.autograd.grad(y.sum(), (x, weight, bias)) for y in (got, want)),
                    strict=True):  # fmt: skip
        close(a, b)


def test_gradcheck():
    leaves = inputs(n=1, c=2, h=2, w=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(ops.upsample_conv2d, leaves)


def test_keeps_channels_last():
    x, weight, bias = inputs()
    y = ops.upsample_conv2d(x.detach().to(memory_format=torch.channels_last), weight, bias)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_bad_input_messages():
    x, weight, bias = inputs()
    for call in (ops.upsample_conv2d, ops.upsample_conv2d_ref):
        with pytest.raises(ValueError, match=r"x of shape \(N, C, H, W\), got \(3, 4, 5\)"):
            call(x[0], weight, bias)
        with pytest.raises(
            ValueError, match=r"weight of shape .* = \(C', 3, 5, 5\), got \(2, 2, 5, 5\)"
        ):
            call(x, weight[:, 1:], bias)
        with pytest.raises(ValueError, match=r"weight of shape"):
            call(x, weight[..., 1:], bias)
        with pytest.raises(ValueError, match=r"bias of shape \(C',\) = \(2,\), got \(1,\)"):
            call(x, weight, bias[1:])
