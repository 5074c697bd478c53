"""The gmm stem: both layouts against the reference, torch.distributions, and goldens."""

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from fastwm.ops import available, gmm_nll, gmm_nll_ref
from fastwm.ops._backend import raw

LAYOUTS = ["joint", "factored"]
# (leading shape, Z, M)
SHAPES = [
    ((7,), 32, 5),
    ((2, 3), 4, 3),
    ((), 1, 1),
    ((1,), 17, 5),
    ((0,), 3, 2),
    ((3,), 0, 2),
    ((40,), 1, 5),
    ((5,), 16, 8),
    ((2, 1, 2), 33, 64),
]
NAMES = ("grad_mean", "grad_log_std", "grad_logits")
fused_only = pytest.mark.skipif(not available("cpu"), reason="no compiled kernels")


def inputs(lead, latents, components, layout, dtype=torch.float32):
    sizes = (components, latents) if layout == "joint" else (latents, components)
    target, mean, log_std = (
        torch.randn(*lead, latents, dtype=dtype),
        torch.randn(*lead, *sizes, dtype=dtype),
        torch.randn(*lead, *sizes, dtype=dtype),
    )
    logits = 2 * torch.randn(*lead, *sizes[: 1 if layout == "joint" else 2], dtype=dtype)
    return target, [x.requires_grad_() for x in (mean, log_std, logits)]


def double(tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def gradients(value, leaves):
    weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(value, leaves, weight.to(value.dtype))


def by_torch(target, mean, log_std, logits, layout):
    parts = Normal(mean, log_std.exp())
    parts = Independent(parts, 1) if layout == "joint" else parts
    return -MixtureSameFamily(Categorical(logits=logits), parts).log_prob(target)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lead, latents, components", SHAPES, ids=str)
def test_matches_reference(lead, latents, components, layout, variant, close, near):
    target, parameters = inputs(lead, latents, components, layout)
    wide = double(parameters)
    expected = gmm_nll_ref(target.double(), *wide, layout)
    actual = gmm_nll(target, *parameters, layout)
    assert actual.shape == (lead if layout == "joint" else (*lead, latents))
    close(actual, expected)
    with torch.no_grad():
        close(gmm_nll(target, *parameters, layout), expected)
    got, want = gradients(actual, parameters), gradients(expected, wide)
    for name, a, b in zip(NAMES, got, want, strict=True):
        if latents:
            near(a, b, 1e-5, name)
        else:  # all gradients are zero
            close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_torch_distributions(layout, variant, close, near):
    target, parameters = inputs((4, 6), 8, 5, layout)
    wide = double(parameters)
    actual = gmm_nll(target, *parameters, layout)
    expected = by_torch(target.double(), *wide, layout)
    close(actual, expected)
    got, want = gradients(actual, parameters), gradients(expected, wide)
    for name, a, b in zip(NAMES, got, want, strict=True):
        near(a, b, 1e-5, name)


@pytest.mark.parametrize("name", ["gmm_nll_a", "gmm_nll_b"])
def test_golden(name, golden, variant, close, near):
    data = golden(name)
    leaves = [data[key].requires_grad_() for key in ("mu", "log_sigma", "logits")]
    nll = gmm_nll(data["z"], *leaves, "joint")
    close(nll, data["nll"])
    grads = torch.autograd.grad((nll * data["weight_of_sum"]).sum(), leaves)
    for key, grad in zip(("mu", "log_sigma", "logits"), grads, strict=True):
        near(grad, data[f"grad_{key}"], 2e-5, key)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("log_std, logit, offset", [
    (-15.0, 0.0, 0.0), (-15.0, 0.0, 3.0), (-90.0, 0.0, 0.0), (-90.0, 0.0, 1.0), (-1e30, 0.0, 1e-3),
    (60.0, 0.0, 1.0), (0.0, 1e4, 0.0), (0.0, -1e30, 2.0), (-30.0, 300.0, 1e12),
])  # fmt: skip
def test_confident_mixtures_stay_finite(layout, log_std, logit, offset, variant):
    target, (mean, log_stds, logits) = inputs((3,), 4, 5, layout)
    with torch.no_grad():
        log_stds.fill_(log_std)
        first = (..., 0) if layout == "factored" else (..., 0, slice(None))
        mean[first] = target + offset
        logits[..., 0] = logit
    nll = gmm_nll(target, mean, log_stds, logits, layout)
    assert not nll.isnan().any()
    for grad in torch.autograd.grad(nll.sum(), (mean, log_stds, logits)):
        assert not grad.isnan().any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiny_std_counts_as_the_bound_and_can_grow_again(layout, variant, close):
    target, parameters = inputs((6,), 3, 2, layout)
    with torch.no_grad():
        parameters[1].fill_(-50.0)
    nll = gmm_nll(target, *parameters, layout)
    at_bound = [parameters[0], torch.full_like(parameters[1], -20.0), parameters[2]]
    close(nll, gmm_nll_ref(target, *at_bound, layout))
    grad = torch.autograd.grad(nll.sum(), parameters[1])[0]
    assert (grad.amin() < 0) and not (grad > 1e-3).any()  # a descent step makes it larger


@pytest.mark.parametrize("layout", LAYOUTS)
def test_not_a_number_stays_in_its_row(layout, variant):
    for place in range(4):
        target, parameters = inputs((4,), 3, 5, layout)
        with torch.no_grad():
            (target, *parameters)[place][2].view(-1)[0] = float("nan")
        nll = gmm_nll(target, *parameters, layout)
        bad = nll.isnan() if layout == "joint" else nll.isnan().any(-1)
        assert bad.tolist() == [False, False, True, False], place
        for grad in torch.autograd.grad(nll.sum(), parameters):
            assert grad[:2].isfinite().all() and grad[3].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_stride(layout, variant, close, near):
    lead, latents, components = (3, 4), 6, 5
    target, _ = inputs(lead, latents, components, layout)
    sizes = (components, latents) if layout == "joint" else (latents, components)
    out = torch.randn(*lead, 3, *sizes, requires_grad=True)  # a projection read as it is
    mean, log_std, logits = out.unbind(2)
    if layout == "joint":
        logits = logits[..., 0]
    cases = {
        "slices": (mean, log_std, logits),
        "turned": (mean.mT.contiguous().mT, log_std.flip(0), logits.transpose(0, 1).flip(1)),
        "one row": (mean[:1, :1].expand(mean.shape), log_std, logits),
        "leading": (mean.transpose(0, 1).contiguous().transpose(0, 1), log_std, logits),
    }
    cases["turned"] = (cases["turned"][0], cases["turned"][1], logits.roll(1, 0))
    for name, parameters in cases.items():
        for goal in (target, target[:1].expand(target.shape)):
            copies = [x.detach().clone().double().requires_grad_() for x in parameters]
            expected = gmm_nll_ref(goal.double(), *copies, layout)
            actual = gmm_nll(goal, *parameters, layout)
            close(actual, expected)
            got, want = gradients(actual, parameters), gradients(expected, copies)
            for which, a, b in zip(NAMES, got, want, strict=True):
                near(a, b, 1e-5, f"{name} {which}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_low_precision_and_autocast(layout, variant, close):
    target, parameters = inputs((5,), 8, 5, layout)
    low = [x.detach().bfloat16().requires_grad_() for x in parameters]
    nll = gmm_nll(target, *low, layout)
    assert nll.dtype == torch.float32
    close(nll, gmm_nll_ref(target, *(x.float() for x in low), layout))
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(nll.sum(), low))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gmm_nll(target, *low, layout), nll)


def test_many_components_run_on_the_reference(close):
    target, parameters = inputs((3,), 2, 70, "factored")
    close(gmm_nll(target, *parameters, "factored"), gmm_nll_ref(target, *parameters, "factored"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_of_reference(layout):
    target, parameters = inputs((2,), 3, 2, layout, torch.float64)
    assert torch.autograd.gradcheck(lambda *p: gmm_nll_ref(target, *p, layout), parameters)


@fused_only
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    target, parameters = inputs((2, 3), 4, 5, layout)
    args = (target, *(x.detach() for x in parameters), layout == "joint")
    torch.library.opcheck(raw.gmm_nll.default, args)
    torch.library.opcheck(raw.gmm_nll_backward.default, (raw.gmm_nll(*args), *args))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fullgraph_compile(layout, variant, close):
    torch._dynamo.reset()
    compiled = torch.compile(gmm_nll, fullgraph=True, backend="aot_eager")
    target, parameters = inputs((2, 3), 4, 5, layout)
    got, want = compiled(target, *parameters, layout), gmm_nll(target, *parameters, layout)
    close(got, want)
    for a, b in zip(gradients(got, parameters), gradients(want, parameters), strict=True):
        close(a, b)


def test_bad_input_messages(variant):
    target, (mean, log_std, logits) = inputs((3,), 4, 5, "factored")
    with pytest.raises(ValueError, match="expected layout 'joint' or 'factored', got 'both'"):
        gmm_nll(target, mean, log_std, logits, "both")
    with pytest.raises(
        ValueError, match=r"mean of shape \(..., Z, M\) = \(3, 4, 5\), got \(3, 5, 4\)"
    ):
        gmm_nll(target, mean.mT, log_std, logits, "factored")
    with pytest.raises(ValueError, match=r"logits of shape \(..., M\) = \(3, 5\), got \(3, 4, 5\)"):
        gmm_nll(target, mean.mT, log_std.mT, logits, "joint")
    with pytest.raises(ValueError, match=r"M >= 1, got \(3, 4, 0\)"):
        gmm_nll(target, mean, log_std, logits[..., :0], "factored")
    with pytest.raises(ValueError, match=r"target of shape \(..., Z\), got \(\)"):
        gmm_nll(torch.zeros(()), mean, log_std, logits, "factored")
    with pytest.raises(TypeError, match="log_std of dtype a floating type, got int64"):
        gmm_nll(target, mean, log_std.long(), logits, "factored")
