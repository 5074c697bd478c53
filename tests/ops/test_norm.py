"""The norm stem: RMSNorm and SiLU."""

import pytest
import torch
import torch.nn.functional as F

from fastwm.ops import available, rms_silu, rms_silu_ref
from fastwm.ops._backend import raw

SHAPES = [(3, 5, 7), (1,), (0, 4), (2, 1), (64,), (37, 33), (700, 16), (2, 3, 130)]
fused_only = pytest.mark.skipif(not available("cpu"), reason="no compiled kernels")


def inputs(shape, dtype=torch.float32):
    x, scale = torch.randn(shape, dtype=dtype) * 3, torch.randn(shape[-1], dtype=dtype)
    return x.requires_grad_(), scale.requires_grad_()


def gradients(function, x, scale):
    y = function(x, scale)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((y * weight).sum(), (x, scale))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, variant, close, near):
    x, scale = inputs(shape)
    wide = [t.detach().double().requires_grad_() for t in (x, scale)]
    close(rms_silu(x, scale), rms_silu_ref(*wide))
    with torch.no_grad():
        close(rms_silu(x, scale), rms_silu_ref(*wide))
    got, want = gradients(rms_silu, x, scale), gradients(rms_silu_ref, *wide)
    close(got[0], want[0])
    near(got[1].double(), want[1], 2e-6, "grad_scale")


def test_equals_library(variant, close):
    x, scale = inputs((3, 5, 7))
    close(rms_silu(x, scale), F.silu(F.rms_norm(x, (7,), scale, 1e-4)))


def test_any_stride(variant, close):
    x, scale = torch.randn(9, 4, 6).permute(2, 0, 1)[:, ::2], torch.randn(8)[::2]
    close(rms_silu(x, scale), rms_silu_ref(x, scale))
    close(rms_silu(x[:, :1].expand(6, 5, 4), scale), rms_silu_ref(x[:, :1], scale).expand(6, 5, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype, variant, close):
    x, scale = inputs((5, 24), dtype)
    y = rms_silu(x, scale)
    assert y.dtype == dtype
    close(y, rms_silu_ref(x.double(), scale.double()))
    grad_x, grad_scale = gradients(rms_silu, x, scale)
    assert grad_x.dtype == dtype and grad_scale.dtype == dtype


def test_not_a_number_stays_in_its_row(variant):
    x, scale = torch.randn(4, 40), torch.ones(40)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    with torch.no_grad():
        y = rms_silu(x, scale)
    assert torch.equal(y.isnan(), rms_silu_ref(x, scale).isnan())
    assert y[0].isfinite().all() and y[3].isfinite().all()


@fused_only
def test_two_runs_are_equal_on_any_number_of_threads():
    x, scale = inputs((3000, 48))
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(gradients(rms_silu, x, scale))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck_of_reference():
    assert torch.autograd.gradcheck(rms_silu_ref, inputs((3, 4), torch.float64))


@fused_only
def test_opcheck():
    x, scale = (t.detach() for t in inputs((3, 7)))
    torch.library.opcheck(raw.rms_silu.default, (x, scale, 1e-4))
    torch.library.opcheck(raw.rms_silu_backward.default, (x + 1, x, scale, 1e-4))


def test_fullgraph_compile(variant, close):
    torch._dynamo.reset()
    compiled = torch.compile(rms_silu, fullgraph=True, backend="aot_eager")
    args = inputs((3, 7))
    close(compiled(*args), rms_silu(*args))
    for got, want in zip(gradients(compiled, *args), gradients(rms_silu, *args), strict=True):
        close(got, want)


def test_autocast(variant):
    x, scale = inputs((3, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert rms_silu(x.bfloat16(), scale).dtype == torch.bfloat16


def test_bad_input_messages(variant):
    x, scale = inputs((3, 8))
    with pytest.raises(ValueError, match=r"scale of shape \(U,\) = \(8,\), got \(7,\)"):
        rms_silu(x, scale[1:])
    with pytest.raises(ValueError, match="expected x of shape"):
        rms_silu(x[0, 0], scale)
    with pytest.raises(TypeError, match="expected x of dtype a floating type, got int64"):
        rms_silu(x.long(), scale)


@fused_only
def test_raw_ops_refuse_forged_input():
    x, scale = (t.detach() for t in inputs((3, 8)))
    with pytest.raises(RuntimeError, match=r"scale of shape \(U,\) = \(8,\), got \(7,\)"):
        raw.rms_silu(x, scale[1:], 1e-4)
    with pytest.raises(RuntimeError, match="dtype"):
        raw.rms_silu(x.double(), scale, 1e-4)
    with pytest.raises(RuntimeError, match="grad_y of shape"):
        raw.rms_silu_backward(x[:2], x, scale, 1e-4)
