"""The pool stem: the encoder's stages, with and without their convolution."""

import pytest
import torch
import torch.nn.functional as F

from fastwm.ops import available, conv_pool_silu, conv_pool_silu_ref, pool_silu, pool_silu_ref
from fastwm.ops._backend import raw

# N, C, H, W, C', k: odd sizes, one channel, whole vectors and not, no images, many rows
STAGES = [
    (2, 3, 4, 6, 8, 5), (3, 8, 7, 9, 12, 5), (5, 12, 6, 4, 16, 5), (2, 5, 6, 6, 7, 3),
    (1, 1, 2, 2, 2, 1), (0, 3, 4, 4, 2, 5), (19, 20, 4, 4, 32, 5), (2, 17, 6, 6, 3, 7),
    (2, 20, 38, 34, 5, 5), (1, 4, 23, 40, 10, 5), (5, 1, 9, 2, 2, 5),  # in bands; narrow
]  # fmt: skip
LAYOUTS = [torch.contiguous_format, torch.channels_last]
fused_only = pytest.mark.skipif(not available("cpu"), reason="no compiled kernels")


@pytest.fixture
def whole(variant):
    if variant == "cuda":
        pytest.skip("on guarded memory the library's convolution misses its alignment")


def stage(n=2, c=3, h=6, w=4, out=8, k=5, dtype=torch.float32):
    """x, weight, bias, scale of a whole stage."""
    x, weight = torch.randn(n, c, h, w), torch.randn(out, c, k, k) / (c * k * k) ** 0.5
    tensors = (x, weight, torch.randn(out), torch.rand(out) + 0.5)
    return [t.to(dtype).requires_grad_() for t in tensors]


def inputs(n=2, c=8, h=6, w=4, dtype=torch.float32):
    tensors = (torch.randn(n, c, h, w), torch.randn(c), torch.rand(c) + 0.5)
    return [t.to(dtype).requires_grad_() for t in tensors]


def gradients(function, leaves):
    y = function(*leaves)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return y, *torch.autograd.grad((y * weight).sum(), leaves)


def agree(op, reference, leaves, near, rtol=1e-5):
    wide = [t.detach().double().requires_grad_() for t in leaves]
    results = zip(gradients(op, leaves), gradients(reference, wide), strict=True)
    for i, (got, want) in enumerate(results):
        near(got.double(), want, rtol, f"result {i}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n, c, h, w, out, k", STAGES)
def test_stage_matches_reference(n, c, h, w, out, k, layout, whole, near):
    leaves = stage(n, c, h, w, out, k)
    leaves[0] = leaves[0].detach().to(memory_format=layout).requires_grad_()
    agree(conv_pool_silu, conv_pool_silu_ref, leaves, near)
    with torch.no_grad():
        near(conv_pool_silu(*leaves), conv_pool_silu_ref(*leaves), 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n, c, h, w", [(2, 8, 4, 6), (3, 12, 7, 5), (1, 2, 2, 3), (0, 4, 2, 2),
                                        (2, 33, 4, 2), (18, 16, 4, 4), (2, 32, 2, 40)])  # fmt: skip
def test_pool_matches_reference(n, c, h, w, layout, variant, near):
    leaves = inputs(n, c, h, w)
    leaves[0] = leaves[0].detach().to(memory_format=layout).requires_grad_()
    agree(pool_silu, pool_silu_ref, leaves, near)


@pytest.mark.parametrize("k", [3, 5])
def test_bytes_are_numbers(k, whole, near):
    """Bytes of images count as x / 255 - 1/2, forward and backward."""
    _, *rest = stage(k=k)
    x = torch.randint(256, (2, 6, 7, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    numbers = x.float() / 255 - 0.5
    got = gradients(lambda *args: conv_pool_silu(x, *args), rest)
    want = gradients(lambda *args: conv_pool_silu(numbers, *args), rest)
    for a, b in zip(got, want, strict=True):
        near(a, b, 1e-6)
    with torch.no_grad():
        near(conv_pool_silu(x, *rest), got[0], 1e-6)
        near(conv_pool_silu_ref(x, *rest), got[0], 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(conv_pool_silu(x, *rest), conv_pool_silu(numbers, *rest))


@fused_only
def test_equal_pixels_have_equal_results():
    """Away from the border all four results of a square are the same: the first one counts."""
    _, weight, bias, scale = stage(c=3, out=9)
    x = (torch.randn(2, 1, 1, 3) + torch.zeros(2, 16, 18, 3)).contiguous()
    index = raw.pool_conv(x, weight, bias, scale, 1e-4)[2]
    assert (index[:, 1:-1, 1:-1] == 0).all() and (index != 0).any()


@fused_only
@pytest.mark.parametrize("where", [(0, 0), (5, 4), (7, 9)])
def test_not_a_number_spoils_the_squares_that_see_it(where):
    x, weight, bias, scale = (t.detach() for t in stage(n=3, h=8, w=10))
    x[1, 2, where[0], where[1]] = float("nan")
    want = F.max_pool2d(F.conv2d(x, weight, padding=2), 2).isnan().permute(0, 2, 3, 1)
    y, pooled, _ = raw.pool_conv(x.permute(0, 2, 3, 1).contiguous(), weight, bias, scale, 1e-4)
    assert torch.equal(pooled.isnan(), want) and torch.equal(y.isnan(), want) and want.any()


def test_equals_library(whole, close):
    x, weight, bias, scale = stage()
    y = F.max_pool2d(F.conv2d(x, weight, bias, padding=2), 2).permute(0, 2, 3, 1)
    y = F.silu(F.rms_norm(y, y.shape[-1:], scale, 1e-4)).permute(0, 3, 1, 2)
    close(conv_pool_silu(x, weight, bias, scale), y, rtol=1e-5, atol=1e-5)


def test_first_of_equals_gets_the_gradient(variant, close):
    x = torch.tensor([[2.0, 2.0, 0.0, 1.0], [2.0, 2.0, 1.0, 1.0]]).reshape(1, 1, 2, 4)
    x.requires_grad_()
    bias, scale = torch.zeros(1), torch.ones(1)
    got = torch.autograd.grad(pool_silu(x, bias, scale).sum(), x)[0]
    assert (got != 0).flatten().tolist() == [True, False, False, True, False, False, False, False]
    close(got, torch.autograd.grad(pool_silu_ref(x, bias, scale).sum(), x)[0])


def test_not_a_number_wins(variant):
    x = torch.zeros(2, 2, 4, 4)
    x[0, 0, 1, 1], x[1, 1, 2, 2] = float("nan"), float("inf")
    x[1, 0, 0, 1] = float("nan")  # followed by ordinary numbers
    bias, scale = torch.zeros(2), torch.ones(2)
    got, want = pool_silu(x, bias, scale), pool_silu_ref(x, bias, scale)
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().sum() == 5


def test_only_what_is_wanted(whole, near):
    """The first stage needs no gradient of its images; a frozen one none of its weights."""
    x, weight, bias, scale = stage()
    frozen = [t.detach() for t in (weight, bias, scale)]
    for args, leaf in (((x.detach(), weight, bias, scale), weight), ((x, *frozen), x)):
        got, want = (
            torch.autograd.grad(op(*args).sum(), leaf)[0]
            for op in (conv_pool_silu, conv_pool_silu_ref)
        )
        near(got, want, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype, whole, close):
    leaves = stage(dtype=dtype)
    y, *grads = gradients(conv_pool_silu, leaves)
    assert [t.dtype for t in (y, *grads)] == [dtype] * 5
    limit = 1e-12 if dtype == torch.float64 else 5e-2
    close(y, conv_pool_silu_ref(*(t.double() for t in leaves)), rtol=limit, atol=limit)


def test_autocast(whole):
    x, weight, bias, scale = stage()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv_pool_silu(x, weight, bias, scale)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sum(), (x, weight, bias, scale))
    assert all(g.dtype == torch.float32 for g in grads)


@fused_only
def test_two_runs_are_equal_on_any_number_of_threads():
    leaves, pooled = stage(n=40, c=8, h=8, w=8, out=12), inputs(n=40, h=8, w=8)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(gradients(conv_pool_silu, leaves) + gradients(pool_silu, pooled))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck_of_reference():
    leaves = stage(n=1, c=2, h=4, w=2, out=3, k=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(conv_pool_silu_ref, leaves)


@fused_only
def test_opcheck():
    x, weight, bias, scale = (t.detach() for t in stage())
    rows, tail = torch.randn(2, 6, 4, 8), (bias, scale, 1e-4)
    torch.library.opcheck(raw.pool_silu.default, (rows, *tail))
    y, pooled, index = raw.pool_silu(rows, *tail)
    args = (torch.randn_like(y), pooled, index, scale, 1e-4)
    torch.library.opcheck(raw.pool_silu_backward.default, (*args, 6, 4))
    for images in (x, torch.randint(256, x.shape, dtype=torch.uint8)):
        stage_args = (images.permute(0, 2, 3, 1).contiguous(), weight, bias, scale, 1e-4)
        torch.library.opcheck(raw.pool_conv.default, stage_args)
    for want_x in (True, False):
        rest = (x.permute(0, 2, 3, 1).contiguous(), weight, want_x)
        torch.library.opcheck(raw.pool_conv_backward.default, (*args, *rest))


def test_fullgraph_compile(whole, close):
    torch._dynamo.reset()
    compiled = torch.compile(conv_pool_silu, fullgraph=True, backend="aot_eager")
    leaves = stage()
    for got, want in zip(gradients(compiled, leaves), gradients(conv_pool_silu, leaves),
                         strict=True):  # fmt: skip
        close(got, want, rtol=1e-5, atol=1e-5)


def test_keeps_channels_last(whole):
    x, *others = stage()
    y = conv_pool_silu(x.detach().to(memory_format=torch.channels_last), *others)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_bad_input_messages(variant):
    x, weight, bias, scale = stage()
    with pytest.raises(ValueError, match=r"expected x of shape \(N, C, H, W\) with 4 dimensions"):
        conv_pool_silu(x[0], weight, bias, scale)
    with pytest.raises(ValueError, match=r"H and W of at least 2, got \(1, 4\)"):
        conv_pool_silu(x[:, :, :1], weight, bias, scale)
    with pytest.raises(ValueError, match=r"weight of shape .* = \(C', 3, k, k\) with odd k"):
        conv_pool_silu(x, weight[:, 1:], bias, scale)
    with pytest.raises(ValueError, match=r"with odd k, got \(8, 3, 4, 4\)"):
        conv_pool_silu(x, weight[..., :4, :4], bias, scale)
    with pytest.raises(ValueError, match=r"bias of shape \(C,\) = \(8,\), got \(7,\)"):
        conv_pool_silu(x, weight, bias[1:], scale)
    with pytest.raises(ValueError, match=r"pool_silu: expected scale of shape \(C,\) = \(3,\)"):
        pool_silu(x, bias[:3], scale)
    for function, args in ((pool_silu, (bias[:3], scale[:3])),
                           (conv_pool_silu, (weight, bias, scale))):  # fmt: skip
        with pytest.raises(TypeError, match="dtype a floating type, got int64"):
            function(x.long(), *args)
    with pytest.raises(TypeError, match="dtype a floating type, got uint8"):
        pool_silu(x.byte(), bias[:3], scale[:3])


@fused_only
@pytest.mark.parametrize("h, w", [(1, 4), (4, 1), (0, 3)])
def test_nothing_to_pool(h, w):
    _, weight, bias, scale = (t.detach() for t in stage())
    x = torch.randn(2, h, w, 3)
    kept = raw.pool_conv(x, weight, bias, scale, 1e-4)
    assert all(t.shape == (2, h // 2, w // 2, 8) for t in kept)
    grads = raw.pool_conv_backward(*kept, scale, 1e-4, x, weight, True)
    for grad, like in zip(grads, (x, weight, bias, scale), strict=True):
        assert torch.equal(grad, torch.zeros_like(like))


@fused_only
def test_raw_ops_refuse_forged_input():
    x, weight, bias, scale = (t.detach() for t in stage())
    rows = torch.randn(2, 6, 4, 8)
    with pytest.raises(RuntimeError, match=r"bias of shape \(C,\) = \(8,\), got \(7,\)"):
        raw.pool_silu(rows, bias[1:], scale, 1e-4)
    y, pooled, index = raw.pool_silu(rows, bias, scale, 1e-4)
    with pytest.raises(RuntimeError, match=r"pooled of shape .* = \(2, 4, 2, 8\)"):
        raw.pool_silu_backward(y, pooled, index, scale, 1e-4, 8, 4)
    images = x.permute(0, 2, 3, 1)
    with pytest.raises(RuntimeError, match=r"weight of shape .* = \(-1, 3, 5, 5\)"):
        raw.pool_conv(images, weight[..., 1:4, 1:4], bias, scale, 1e-4)
    with pytest.raises(RuntimeError, match=r"pool_conv: expected x of dtype Float or Byte"):
        raw.pool_conv(images.double(), weight, bias, scale, 1e-4)
    with pytest.raises(RuntimeError, match="where its gradient is wanted, got Byte"):
        raw.pool_conv_backward(y, pooled, index, scale, 1e-4, images.byte(), weight, True)
    with pytest.raises(RuntimeError, match="with odd k"):
        raw.pool_conv_backward(y, pooled, index, scale, 1e-4, images, weight[..., 1:], True)
