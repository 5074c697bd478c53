"""The upconv stem: upsampling and convolution in one, by the kernel and by the library."""

import pytest
import torch

from fastwm import ops
from fastwm.ops._backend import raw
from fastwm.ops.upconv import _has_kernel

# N, C, H, W, C': one pixel, odd sizes, no images, vectors whole and not, several rows of tiles at
# once, images as wide as those, more than one panel of results and of inputs
SHAPES = [
    (2, 3, 4, 5, 2), (1, 1, 1, 1, 1), (0, 2, 3, 3, 2), (3, 4, 2, 7, 1), (1, 2, 8, 8, 3),
    (19, 16, 4, 4, 16), (2, 8, 9, 6, 3), (3, 12, 4, 3, 8), (1, 8, 3, 70, 3), (2, 20, 5, 4, 12),
    (1, 40, 2, 2, 33), (33, 2, 1, 1, 5), (2, 17, 6, 1, 9),
]  # fmt: skip
LAYOUTS = [torch.contiguous_format, torch.channels_last]
RESULTS = ("y", "grad_x", "grad_weight", "grad_bias")
fused_only = pytest.mark.skipif(not ops.available("cpu"), reason="no compiled kernels")


@pytest.fixture(params=["reference", "fused"])
def path(request):
    """The library's convolution, and the kernel: there is none for CUDA."""
    if request.param == "fused" and not ops.available("cpu"):
        pytest.skip("no compiled kernels")
    with ops.use_backend(request.param):
        yield


def inputs(n=2, c=3, h=4, w=5, out=2, dtype=torch.float32, layout=torch.contiguous_format):
    x, weight = torch.randn(n, c, h, w), torch.randn(out, c, 5, 5) / (5 * c**0.5)
    x = x.to(memory_format=layout)
    return [t.to(dtype).requires_grad_() for t in (x, weight, torch.randn(out))]


def gradients(function, leaves):
    y = function(*leaves)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return y, *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n, c, h, w, out", SHAPES)
def test_equals_reference(n, c, h, w, out, layout, dtype, rtol, path, near):
    leaves = inputs(n, c, h, w, out, dtype, layout)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    got = gradients(ops.upsample_conv2d, leaves)
    want = gradients(ops.upsample_conv2d_ref, wide)
    for name, a, b in zip(RESULTS, got, want, strict=True):
        near(a.double(), b, rtol, name)


def test_any_stride_and_no_bias(path, near):
    x, weight, _ = inputs(n=4, c=6, h=8, w=6)
    x, weight = x[::2, 1::2, ::2].mT, weight.detach()[:, ::2].flip(0).requires_grad_()
    y, expected = ops.upsample_conv2d(x, weight), ops.upsample_conv2d_ref(x, weight)
    near(y, expected, 1e-5)
    cotangent = torch.randn(y.shape)
    got, want = (torch.autograd.grad(r, (x, weight), cotangent) for r in (y, expected))
    near(got[0], want[0], 1e-5)
    near(got[1], want[1], 1e-5)


@fused_only
def test_the_kernel_runs_where_it_should():
    x, weight, bias = (t.detach() for t in inputs())
    assert _has_kernel(x, weight, bias) and _has_kernel(x, weight, None)
    assert not _has_kernel(x.double(), weight.double(), None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not _has_kernel(x, weight, bias)
    with ops.use_backend("reference"):
        assert not _has_kernel(x, weight, bias)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_what_is_wanted(wanted, path, near):
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs(c=8, out=4))]
    asked = [leaves[i] for i in wanted]
    y, expected = ops.upsample_conv2d(*leaves), ops.upsample_conv2d_ref(*leaves)
    cotangent = torch.randn(y.shape)
    got, want = (torch.autograd.grad(r, asked, cotangent) for r in (y, expected))
    for a, b in zip(got, want, strict=True):
        near(a, b, 1e-6)


def test_not_a_number_is_not_lost(path):
    x, weight, bias = (t.detach() for t in inputs(h=6, w=6))
    x[0, 1, 2, 3] = float("nan")
    y, expected = ops.upsample_conv2d(x, weight, bias), ops.upsample_conv2d_ref(x, weight, bias)
    assert (y.isnan() >= expected.isnan()).all() and y[1].isfinite().all()
    assert y.isnan().float().mean() < 0.5  # of one tile's neighbourhood


@fused_only
def test_two_runs_are_equal_on_any_number_of_threads():
    leaves = inputs(n=40, c=8, h=8, w=6, out=12)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(gradients(ops.upsample_conv2d, leaves))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


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


@fused_only
def test_opcheck():
    x, weight, bias = (t.detach() for t in inputs())
    rows = x.permute(0, 2, 3, 1).contiguous()
    for offset in (bias, None):
        torch.library.opcheck(raw.upsample_conv2d.default, (rows, weight, offset))
    grad = torch.randn(2, 8, 10, 2)
    for want_x in (True, False):
        for want_weight in (True, False):
            args = (grad, rows, weight, want_x, want_weight)
            torch.library.opcheck(raw.upsample_conv2d_backward.default, args)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fullgraph_compile(layout, path, close):
    torch._dynamo.reset()
    compiled = torch.compile(ops.upsample_conv2d, fullgraph=True, backend="aot_eager")
    leaves = inputs(layout=layout)
    for got, want in zip(gradients(compiled, leaves), gradients(ops.upsample_conv2d, leaves),
                         strict=True):  # fmt: skip
        close(got, want)


def test_gradcheck():
    leaves = inputs(n=1, c=2, h=2, w=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(ops.upsample_conv2d, leaves)


def test_keeps_channels_last(path):
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


@fused_only
def test_raw_ops_refuse_forged_input():
    x, weight, bias = (t.detach() for t in inputs())
    rows, grad = x.permute(0, 2, 3, 1), torch.randn(2, 8, 10, 2)
    with pytest.raises(RuntimeError, match=r"bias of shape \(C',\) = \(2,\), got \(1,\)"):
        raw.upsample_conv2d(rows, weight, bias[1:])
    with pytest.raises(RuntimeError, match=r"weight of shape .* = \(2, 3, 5, 5\)"):
        raw.upsample_conv2d(rows, weight[..., 1:], bias)
    with pytest.raises(RuntimeError, match="at least one row, column and channel"):
        raw.upsample_conv2d(rows[:, :0], weight, bias)
    with pytest.raises(RuntimeError, match=r"grad_y of shape .* = \(2, 8, 10, 2\)"):
        raw.upsample_conv2d_backward(grad[:, 1:], rows, weight, True, True)
