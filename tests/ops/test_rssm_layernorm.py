"""The dense GRU step of 2023, part of the stem `rssm`."""

import pytest
import torch

from fastwm.ops import available, gru_step_layernorm, gru_step_layernorm_ref
from fastwm.ops._backend import raw

NAMES = ("x", "deter", "weight", "scale", "shift")
SHAPES = [(3, 5, 7), (1, 1, 1), (0, 4, 3), (70, 2, 5), (2, 3, 33), (16, 24, 64), (600, 3, 2)]
fused_only = pytest.mark.skipif(not available("cpu"), reason="no compiled kernels")


def inputs(batch=3, wide=5, size=7, dtype=torch.float32):
    weight = torch.randn(3 * size, wide + size) / (wide + size) ** 0.5
    scale, shift = 1 + 0.3 * torch.randn(3 * size), 0.5 * torch.randn(3 * size)
    args = (torch.randn(batch, wide), torch.randn(batch, size), weight, scale, shift)
    return [t.to(dtype).requires_grad_() for t in args]


def gradients(function, args):
    out = function(*args)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return torch.autograd.grad((out * weight).sum(), args)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, variant, close, near):
    args = inputs(*shape)
    wide = [t.detach().double().requires_grad_() for t in args]
    close(gru_step_layernorm(*args), gru_step_layernorm_ref(*wide))
    with torch.no_grad():
        close(gru_step_layernorm(*args), gru_step_layernorm_ref(*wide))
    ours, theirs = gradients(gru_step_layernorm, args), gradients(gru_step_layernorm_ref, wide)
    for name, got, want in zip(NAMES, ours, theirs, strict=True):
        near(got.double(), want, 5e-6, name)


def test_golden(golden, variant, close, near):
    g = golden("gru_layernorm_2023")
    names = ("GRU_linear.weight", "GRU_norm.weight", "GRU_norm.bias")
    args = [g["x"], g["h"], *(g[f"params/layers.{name}"] for name in names)]
    args = [t.clone().requires_grad_() for t in args]
    assert float(g["update_bias"]) == -1.0  # the op has no other
    out = gru_step_layernorm(*args, eps=float(g["eps"]))
    close(out, g["out"])
    grads = torch.autograd.grad((out * g["weight_of_sum"]).sum(), args)
    want = [g["grad_x"], g["grad_h"], *(g[f"grads/layers.{name}"] for name in names)]
    for name, ours, theirs in zip(NAMES, grads, want, strict=True):
        near(ours, theirs, 1e-5, name)


def test_any_stride(variant, close):
    x, deter, weight, scale, shift = (t.detach() for t in inputs())
    want = gru_step_layernorm_ref(x, deter, weight, scale, shift)
    x, deter = x.t().contiguous().t(), deter.t().contiguous().t()
    weight = torch.stack([weight, weight], -1)[..., 0]
    scale, shift = (torch.stack([t, t], -1)[..., 0] for t in (scale, shift))
    close(gru_step_layernorm(x, deter, weight, scale, shift), want)


def test_eps_counts(variant, close):
    args = inputs()
    far = gru_step_layernorm(*args, eps=1.0)
    close(far, gru_step_layernorm_ref(*args, 1.0))
    assert (far - gru_step_layernorm(*args)).abs().max() > 1e-3


def test_not_a_number_stays_in_its_row(variant):
    args = [t.detach() for t in inputs(4)]
    args[0][1, 2] = float("nan")
    out = gru_step_layernorm(*args)
    assert out[1].isnan().all() and out[[0, 2, 3]].isfinite().all()


@fused_only
def test_two_runs_are_equal_on_any_number_of_threads():
    args, results, before = inputs(900, 8, 16), [], torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        parts = torch.randn(900, 48, generator=torch.Generator().manual_seed(0))
        grad = torch.ones_like(args[1])
        rest = [t.detach() for t in (args[3], args[4], args[1])]
        results.append(raw.gru_layernorm_backward(grad, parts, *rest, 1e-3))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck_of_reference():
    assert torch.autograd.gradcheck(gru_step_layernorm_ref, inputs(2, 3, 2, torch.float64))


@fused_only
def test_opcheck():
    _, deter, _, scale, shift = (t.detach() for t in inputs())
    args = (torch.randn(3, 21), scale, shift, deter, 1e-3)
    torch.library.opcheck(raw.gru_layernorm.default, args)
    torch.library.opcheck(raw.gru_layernorm_backward.default, (deter + 1, *args))


def test_fullgraph_compile(variant, near):
    torch._dynamo.reset()
    compiled = torch.compile(gru_step_layernorm, fullgraph=True, backend="aot_eager")
    args = inputs()
    near(compiled(*args), gru_step_layernorm(*args))
    both = zip(gradients(compiled, args), gradients(gru_step_layernorm, args), strict=True)
    for name, (got, want) in zip(NAMES, both, strict=True):
        near(got, want, 1e-5, name)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_the_product_only(low, variant, near):
    args = inputs(16, 24, 32)
    with torch.autocast("cpu", low):
        out = gru_step_layernorm(*args)
    assert out.dtype == torch.float32
    near(out, gru_step_layernorm(*args), 2e-2)
    assert not torch.equal(out, gru_step_layernorm(*args))
    assert all(g.dtype == torch.float32 for g in gradients(gru_step_layernorm, args))


def test_bad_input_messages(variant):
    x, deter, weight, scale, shift = inputs()
    with pytest.raises(ValueError, match=r"weight of shape \(3D, X\+D\) = \(21, 12\), got \(21, 1"):
        gru_step_layernorm(x, deter, weight[:, 1:], scale, shift)
    with pytest.raises(ValueError, match=r"x of shape \(B, X\) = \(3, 5\), got \(2, 5\)"):
        gru_step_layernorm(x[1:], deter, weight, scale, shift)
    with pytest.raises(ValueError, match="scale of shape"):
        gru_step_layernorm(x, deter, weight, scale[1:], shift)
    with pytest.raises(ValueError, match="deter of shape"):
        gru_step_layernorm(x, deter[0], weight, scale, shift)
    with pytest.raises(TypeError, match="expected x of dtype a floating type, got int64"):
        gru_step_layernorm(x.long(), deter, weight, scale, shift)
    with pytest.raises(TypeError, match="expected deter on"):
        gru_step_layernorm(x, deter.to("meta"), weight, scale, shift)


@fused_only
def test_raw_ops_refuse_forged_input():
    _, deter, _, scale, shift = (t.detach() for t in inputs())
    parts = torch.randn(3, 21)
    with pytest.raises(RuntimeError, match=r"parts of shape \(N, 3D\) = \(3, 21\), got \(3, 20\)"):
        raw.gru_layernorm(parts[:, 1:], scale, shift, deter, 1e-3)
    with pytest.raises(RuntimeError, match="scale of shape"):
        raw.gru_layernorm(parts, scale[1:], shift, deter, 1e-3)
    with pytest.raises(RuntimeError, match="dtype"):
        raw.gru_layernorm(parts, scale, shift, deter.double(), 1e-3)
    with pytest.raises(RuntimeError, match="grad of shape"):
        raw.gru_layernorm_backward(deter[:2], parts, scale, shift, deter, 1e-3)
