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
RESULTS = ("y", "grad_x", "grad_weight", "grad_bias", "grad_scale")
PAIRS = [
    (ops.upsample_conv2d, ops.upsample_conv2d_ref),
    (ops.upsample_conv2d_silu, ops.upsample_conv2d_silu_ref),
]
both = pytest.mark.parametrize("op, reference", PAIRS, ids=["plain", "silu"])
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


def stage(op, *args, **sizes):
    """`inputs`, and the scale for the op that has one."""
    leaves = inputs(*args, **sizes)
    scale = torch.rand(leaves[2].shape).to(leaves[2].dtype) + 0.5
    return [*leaves, scale.requires_grad_()][: 3 + (op is ops.upsample_conv2d_silu)]


def gradients(function, leaves):
    y = function(*leaves)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return y, *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n, c, h, w, out", SHAPES)
@both
def test_equals_reference(op, reference, n, c, h, w, out, layout, dtype, rtol, path, near):
    leaves = stage(op, n, c, h, w, out, dtype, layout)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    got, want = gradients(op, leaves), gradients(reference, wide)
    if op is ops.upsample_conv2d_silu:
        rtol *= 1000 if out == 1 else 3  # one channel is normed to its sign: gradients cancel
    for name, a, b in zip(RESULTS, got, want, strict=False):
        near(a.double(), b, rtol, name)
    with torch.no_grad():
        near(op(*leaves).double(), want[0], rtol)


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
    for op in ("upsample_conv2d", "upsample_conv2d_silu"):
        assert _has_kernel(op, x, weight, bias) and _has_kernel(op, x, weight, None)
        assert not _has_kernel(op, x.double(), weight.double(), None)
        with torch.autocast("cpu", torch.bfloat16):
            assert not _has_kernel(op, x, weight, bias)
        with ops.use_backend("reference"):
            assert not _has_kernel(op, x, weight, bias)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
@both
def test_only_what_is_wanted(op, reference, wanted, path, near):
    leaves = stage(op, c=8, out=4)
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
    asked = [leaves[i] for i in wanted]
    y, expected = op(*leaves), reference(*leaves)
    cotangent = torch.randn(y.shape)
    got, want = (torch.autograd.grad(r, asked, cotangent) for r in (y, expected))
    for a, b in zip(got, want, strict=True):
        near(a, b, 3e-6)


def test_not_a_number_is_not_lost(path):
    x, weight, bias = (t.detach() for t in inputs(h=6, w=6))
    x[0, 1, 2, 3] = float("nan")
    y, expected = ops.upsample_conv2d(x, weight, bias), ops.upsample_conv2d_ref(x, weight, bias)
    assert (y.isnan() >= expected.isnan()).all() and y[1].isfinite().all()
    assert y.isnan().float().mean() < 0.5  # of one tile's neighbourhood


@fused_only
@both
def test_two_runs_are_equal_on_any_number_of_threads(op, reference):
    leaves = stage(op, n=40, c=8, h=8, w=6, out=12)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(gradients(op, leaves))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@both
def test_low_precision_and_autocast(op, reference, close):
    leaves = stage(op, dtype=torch.bfloat16)
    y = op(*leaves)
    assert y.dtype == torch.bfloat16
    close(y, reference(*(t.float() for t in leaves)), rtol=5e-2, atol=5e-2)
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(y.sum(), leaves))
    wide = stage(op)
    with torch.autocast("cpu", torch.bfloat16):
        y = op(*wide)
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
    scale = torch.rand(2)
    for flag in (True, False):
        args = (rows, weight, bias, scale, 1e-4, flag)
        torch.library.opcheck(raw.upsample_conv2d_silu.default, args)
        args = (grad, torch.randn_like(grad), scale, 1e-4, rows, weight, flag)
        torch.library.opcheck(raw.upsample_conv2d_silu_backward.default, args)


@pytest.mark.parametrize("layout", LAYOUTS)
@both
def test_fullgraph_compile(op, reference, layout, path, close):
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    leaves = stage(op, layout=layout)
    for got, want in zip(gradients(compiled, leaves), gradients(op, leaves), strict=True):
        close(got, want)


@both
def test_gradcheck(op, reference):
    leaves = stage(op, n=1, c=2, h=2, w=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(op, leaves)


@both
def test_keeps_channels_last(op, reference, path):
    leaves = stage(op, layout=torch.channels_last)
    y = op(*leaves)
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
    silu = ops.upsample_conv2d_silu
    with pytest.raises(ValueError, match=r"_silu: expected bias of shape \(C',\) = \(2,\)"):
        silu(x, weight, bias[1:], bias)
    with pytest.raises(ValueError, match=r"_silu: expected scale of shape \(C',\) = \(2,\)"):
        silu(x, weight, bias, bias[1:])
    with pytest.raises(TypeError, match="scale of dtype a floating type, got int64"):
        silu(x, weight, bias, bias.long())


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
