"""The latent stem: categorical sampling, straight-through, balanced KL."""

import pytest
import torch

from fastwm.ops import (
    available,
    kl_balance,
    kl_balance_ref,
    latent_sample,
    latent_sample_ref,
    straight_through,
    straight_through_ref,
)
from fastwm.ops._backend import raw

SHAPES = [(3, 4, 5), (1, 1), (2, 1, 1), (0, 3, 4), (5, 32, 4), (2, 3, 16), (3, 2, 33), (1, 2, 300)]
fused_only = pytest.mark.skipif(not available("cpu"), reason="no compiled kernels")


def weights(tensors):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(t.shape, generator=generator).to(t.dtype) for t in tensors]


def kl_grads(function, post, prior, *options):
    losses = function(post, prior, *options)[:2]
    return torch.autograd.grad(losses, (post, prior), weights(losses))


def double(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("unimix", [0.0, 0.01, 1.0])
def test_kl_matches_reference(shape, unimix, variant, close):
    post, prior = (3 * torch.randn(2, *shape)).unbind()
    free = 0.05 * shape[-1] * shape[-2]
    post.requires_grad_(), prior.requires_grad_()
    wide = double(post, prior)
    names = ("dyn", "rep", "post_entropy", "prior_entropy")
    expected = kl_balance_ref(*wide, unimix, free)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            actual = kl_balance(post, prior, unimix, free)
        for name, got, want in zip(names, actual, expected, strict=True):
            assert got.shape == shape[:-2]
            close(got, want, rtol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert not actual[2].requires_grad and not actual[3].requires_grad
    got = kl_grads(kl_balance, post, prior, unimix, free)
    want = kl_grads(kl_balance_ref, *wide, unimix, free)
    close(got[0], want[0], rtol=2e-5, msg=lambda m: f"grad_post: {m}")
    close(got[1], want[1], rtol=2e-5, msg=lambda m: f"grad_prior: {m}")


def test_free_nats_cut_the_gradient(variant):
    post = torch.stack([torch.zeros(2, 4), torch.randn(2, 4) * 5]).requires_grad_()
    prior = torch.zeros(2, 2, 4, requires_grad=True)
    dyn, rep, *_ = kl_balance(post, prior, 0.01, 1.0)
    assert dyn[0] == rep[0] == 1.0 and dyn[1] > 1.0
    grads = torch.autograd.grad((dyn + rep).sum(), (post, prior))
    assert not grads[0][0].any() and not grads[1][0].any()
    assert grads[0][1].any() and grads[1][1].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("unimix", [0.0, 0.01])
@pytest.mark.parametrize("noise", ["mode", "uniform", "gumbel"])
def test_sample_matches_reference(shape, unimix, noise, variant, close):
    logits = (3 * torch.randn(shape)).requires_grad_()
    (wide,) = double(logits)
    draw = {
        "mode": None,
        "uniform": torch.rand(shape[:-1]),
        "gumbel": -torch.empty(shape).exponential_().log(),
    }[noise]
    index, log_probs = latent_sample(logits, draw, unimix)
    expected_index, expected = latent_sample_ref(
        wide, None if draw is None else draw.double(), unimix
    )
    assert index.dtype == (torch.uint8 if shape[-1] <= 256 else torch.int64)
    assert index.dtype == expected_index.dtype and torch.equal(index, expected_index)
    close(log_probs, expected)
    (weight,) = weights([log_probs])
    got = torch.autograd.grad(log_probs, logits, weight)[0]
    want = torch.autograd.grad(expected, wide, weight.double())[0]
    close(got, want, rtol=2e-5, msg=lambda m: f"grad_logits: {m}")


def test_sample_has_the_right_frequencies(variant):
    logits = torch.tensor([[0.0, 1.0, -float("inf"), 2.0]])
    probs = 0.9 * torch.softmax(logits, -1) + 0.1 / 4
    draws = torch.linspace(0, 1, 10001)[:-1, None]
    index, _ = latent_sample(logits.expand(10000, 1, 4), draws, 0.1)
    counts = torch.bincount(index.flatten().long(), minlength=4) / 10000
    torch.testing.assert_close(counts, probs[0], atol=2e-4, rtol=0)
    index, _ = latent_sample(logits.expand(10000, 1, 4), draws, 0.0)
    assert not (index == 2).any()


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-24])
def test_extreme_draws_stay_in_range(uniform, variant):
    logits = torch.randn(50, 3, 7) * 10
    index, _ = latent_sample(logits, torch.full((50, 3), uniform), 0.0)
    assert (index < 7).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("unimix", [0.0, 0.01])
def test_straight_through_matches_reference(shape, unimix, variant, close):
    logits = torch.randn(shape, requires_grad=True)
    (wide,) = double(logits)
    index = torch.randint(shape[-1], shape[:-1])
    for kind in (torch.uint8, torch.int64, torch.int32):
        if shape[-1] > 256 and kind == torch.uint8:
            continue
        sample = straight_through(index.to(kind), logits, unimix)
        assert torch.equal(sample.detach(), torch.nn.functional.one_hot(index, shape[-1]).float())
    (weight,) = weights([sample])
    got = torch.autograd.grad(sample, logits, weight)[0]
    expected = straight_through_ref(index, wide, unimix)
    want = torch.autograd.grad(expected, wide, weight.double())[0]
    close(got, want, msg=lambda m: f"grad_logits: {m}")


def test_any_stride_and_low_precision(variant, close):
    post, prior = torch.randn(2, 6, 5, 8).transpose(1, 3)[:, ::2].unbind()
    for got, want in zip(kl_balance(post, prior), kl_balance_ref(post, prior), strict=True):
        close(got, want, rtol=2e-5)
    noise = torch.rand(5, 4).t()
    got, want = latent_sample(post, noise), latent_sample_ref(post, noise)
    assert torch.equal(got[0], want[0])
    low = post.bfloat16().requires_grad_()
    dyn, rep, *_ = kl_balance(low, prior.bfloat16())
    assert dyn.dtype == torch.float32
    assert torch.autograd.grad(rep.sum(), low)[0].dtype == torch.bfloat16


def test_not_a_number_comes_through(variant):
    post, prior = torch.randn(2, 3, 2, 20)
    post[1, 0, 3] = float("nan")
    for got, want in zip(kl_balance(post, prior), kl_balance_ref(post, prior), strict=True):
        assert torch.equal(got.isnan(), want.isnan())
    index, log_probs = latent_sample(post, torch.rand(3, 2))
    assert torch.equal(log_probs.isnan(), latent_sample_ref(post, torch.rand(3, 2))[1].isnan())
    assert (index < 20).all()


def test_gradcheck_of_references():
    post, prior = double(*torch.randn(2, 2, 3, 4))

    def losses(a, b):
        return kl_balance_ref(a, b, 0.01, 0.1)[:2]

    dyn_to_prior = torch.autograd.gradcheck(lambda b: losses(post.detach(), b)[0], prior)
    assert dyn_to_prior and torch.autograd.gradcheck(lambda a: losses(a, prior.detach())[1], post)
    assert torch.autograd.gradcheck(lambda a: latent_sample_ref(a, None)[1], post)


@fused_only
def test_opcheck():
    post, prior = torch.randn(2, 2, 3, 5)
    index = torch.randint(5, (2, 3)).to(torch.uint8)
    check = torch.library.opcheck
    for noise in (None, torch.rand(2, 3), torch.randn(2, 3, 5)):
        check(raw.latent_sample.default, (post, noise, 0.01))
    check(raw.latent_one_hot.default, (index, 5))
    for log in (True, False):
        check(raw.latent_backward.default, (post, prior, 0.01, log))
    for slopes in (True, False):
        check(raw.kl_balance.default, (post, prior, 0.01, 1.0, slopes))
    check(raw.kl_balance_backward.default, (torch.ones(2), torch.ones(2), post, prior))


def test_fullgraph_compile(variant, close):
    def everything(post, prior, noise):
        index, log_probs = latent_sample(post, noise)
        dyn, rep, *_ = kl_balance(post, prior, 0.01, 0.1)
        return (straight_through(index, post) * log_probs).sum() + (dyn * 2 + rep).sum()

    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    post, prior = torch.randn(2, 3, 4, 6)
    post.requires_grad_(), prior.requires_grad_()
    noise = torch.rand(3, 4)
    got, want = compiled(post, prior, noise), everything(post, prior, noise)
    close(got, want)
    for a, b in zip(
        torch.autograd.grad(got, (post, prior)),
        torch.autograd.grad(want, (post, prior)),
        strict=True,
    ):
        close(a, b)


def test_bad_input_messages(variant):
    logits = torch.randn(3, 4, 5)
    with pytest.raises(ValueError, match=r"prior of shape \(..., S, K\) = \(3, 4, 5\), got \(3, 4"):
        kl_balance(logits, logits[..., 1:])
    with pytest.raises(ValueError, match=r"unimix in \[0, 1\], got 2"):
        kl_balance(logits, logits, 2.0)
    with pytest.raises(ValueError, match=r"expected post of shape \(..., S, K\)"):
        kl_balance(logits[0, 0], logits[0, 0])
    with pytest.raises(ValueError, match=r"expected noise of shape \(..., S\) = \(3, 4\)"):
        latent_sample(logits, torch.rand(3, 5))
    with pytest.raises(TypeError, match="logits of dtype a floating type"):
        latent_sample(logits.long(), None)
    with pytest.raises(ValueError, match=r"index of shape \(..., S\) = \(3, 4\), got \(3,\)"):
        straight_through(torch.zeros(3), logits)
    with pytest.raises(TypeError, match="integer"):
        straight_through(torch.zeros(3, 4), logits)


@fused_only
def test_raw_ops_refuse_forged_input():
    logits, index = torch.randn(3, 4, 5), torch.zeros(3, 4, dtype=torch.uint8)
    forged = [
        lambda: raw.latent_sample(logits, torch.rand(3, 3), 0.01),
        lambda: raw.latent_sample(logits, torch.rand(3, 4, 6), 0.01),
        lambda: raw.latent_sample(logits.double(), None, 0.01),
        lambda: raw.latent_sample(torch.randn(2, 2000), None, 0.01),
        lambda: raw.latent_sample(logits[..., :0], None, 0.01),
        lambda: raw.latent_one_hot(index.int(), 5),
        lambda: raw.latent_one_hot(index, 0),
        lambda: raw.latent_backward(logits[1:], logits, 0.01, True),
        lambda: raw.kl_balance(logits, logits[1:], 0.01, 1.0, True),
        lambda: raw.kl_balance(logits[0, 0], logits[0, 0], 0.01, 1.0, True),
        lambda: raw.kl_balance(logits, logits.bfloat16(), 0.01, 1.0, True),
        lambda: raw.kl_balance_backward(torch.ones(2), torch.ones(3), logits, logits),
        lambda: raw.kl_balance_backward(torch.ones(3), torch.ones(3), logits, logits[:2]),
    ]
    for call in forged:
        with pytest.raises(RuntimeError, match="expected"):
            call()
    assert not raw.latent_one_hot(index + 9, 5).any()  # out of range: nothing is written outside


def test_golden_unimix(golden, near, variant):
    data = golden("categorical_unimix")
    unimix, free = float(data["unimix"]), float(data["free_nats"])
    post, prior = data["post"].requires_grad_(), data["prior"].requires_grad_()
    dyn, rep, post_entropy, _ = kl_balance(post, prior, unimix, free)
    near(dyn, data["dyn"], 2e-6, "dyn")
    near(rep, data["rep"], 2e-6, "rep")
    near(post_entropy, data["entropy"], 2e-6, "entropy")
    grads = torch.autograd.grad(((dyn + 0.1 * rep) * data["weight"]).sum(), (post, prior))
    near(grads[0], data["grad_post"], 1e-5, "grad_post")
    near(grads[1], data["grad_prior"], 1e-5, "grad_prior")
    index, log_probs = latent_sample(data["post"], None, unimix)
    near(log_probs, data["log_probs"], 2e-6, "log_probs")
    assert torch.equal(index.long(), data["log_probs"].argmax(-1))


def test_golden_head_pieces(golden, near, variant):
    data = golden("dreamerv3_head_pieces")
    logits = data["rssm/out_post"].requires_grad_()
    index = data["rssm/st_idx"].to(torch.uint8)
    sample = straight_through(index, logits, 0.01)
    assert torch.equal(sample.argmax(-1), data["rssm/st_idx"])
    grad = torch.autograd.grad((sample * data["rssm/st_w"]).sum(), logits)[0]
    near(grad, data["rssm/st_grad"], 1e-5, "st_grad")


def test_golden_kl(golden, near, variant):
    data = golden("dreamerv3_head_pieces")
    post, prior = data["rssm/out_post"].requires_grad_(), data["rssm/out_prior"].requires_grad_()
    dyn, rep, _, prior_entropy = kl_balance(post, prior, 0.01, 0.0)
    near(dyn, data["rssm/dyn_raw"], 2e-6, "dyn")
    near(rep, data["rssm/rep_raw"], 2e-6, "rep")
    near(prior_entropy, data["rssm/ent_prior"], 2e-6, "ent_prior")
    clipped = kl_balance(post, prior, 0.01, 1.0)[0]
    near(clipped, data["rssm/dyn_raw"].clamp(min=1.0), 2e-6, "free nats")
    grads = torch.autograd.grad((dyn + rep).sum(), (post, prior))
    near(grads[0], data["rssm/kl_grad_post"], 1e-5, "grad_post")
    near(grads[1], data["rssm/kl_grad_prior"], 1e-5, "grad_prior")
