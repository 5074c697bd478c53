"""The latent stem: goldens, reference parity, errors."""

import torch

from fastwm import ops


def test_golden_unimix(golden, near):
    data = golden("categorical_unimix")
    unimix, free = float(data["unimix"]), float(data["free_nats"])
    post, prior = data["post"].requires_grad_(), data["prior"].requires_grad_()
    dyn, rep, post_entropy, _ = ops.kl_balance(post, prior, unimix, free)
    near(dyn, data["dyn"], 2e-6, "dyn")
    near(rep, data["rep"], 2e-6, "rep")
    near(post_entropy, data["entropy"], 2e-6, "entropy")
    grads = torch.autograd.grad(((dyn + 0.1 * rep) * data["weight"]).sum(), (post, prior))
    near(grads[0], data["grad_post"], 1e-5, "grad_post")
    near(grads[1], data["grad_prior"], 1e-5, "grad_prior")
    index, log_probs = ops.latent_sample(data["post"], None, unimix)
    near(log_probs, data["log_probs"], 2e-6, "log_probs")
    assert torch.equal(index.long(), data["log_probs"].argmax(-1))


def test_golden_head_pieces(golden, near):
    data = golden("dreamerv3_head_pieces")
    logits = data["rssm/stoch"] * 0 + data["rssm/out_post"]
    logits.requires_grad_()
    index = data["rssm/st_idx"].to(torch.uint8)
    sample = ops.straight_through(index, logits, 0.01)
    assert torch.equal(sample.argmax(-1), data["rssm/st_idx"])
    grad = torch.autograd.grad((sample * data["rssm/st_w"]).sum(), logits)[0]
    near(grad, data["rssm/st_grad"], 1e-5, "st_grad")


def test_golden_kl(golden, near):
    data = golden("dreamerv3_head_pieces")
    post, prior = data["rssm/out_post"].requires_grad_(), data["rssm/out_prior"].requires_grad_()
    dyn, rep, _, prior_entropy = ops.kl_balance(post, prior, 0.01, 0.0)
    near(dyn, data["rssm/dyn_raw"], 2e-6, "dyn")
    near(rep, data["rssm/rep_raw"], 2e-6, "rep")
    near(prior_entropy, data["rssm/ent_prior"], 2e-6, "ent_prior")
    clipped = ops.kl_balance(post, prior, 0.01, 1.0)[0]
    near(clipped, data["rssm/dyn_raw"].clamp(min=1.0), 2e-6, "free nats")
    grads = torch.autograd.grad((dyn + rep).sum(), (post, prior))
    near(grads[0], data["rssm/kl_grad_post"], 1e-5, "grad_post")
    near(grads[1], data["rssm/kl_grad_prior"], 1e-5, "grad_prior")
