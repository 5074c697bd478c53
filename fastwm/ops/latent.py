"""Categorical latents: unimix, sampling with given noise, straight-through, balanced KL.

Letters: S groups, K classes per group. Everything is float32 inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastwm.ops._backend import available, raw, register_fake, wants_grad
from fastwm.ops._check import check_dtype, check_same_device, check_shape

__all__ = [
    "kl_balance",
    "kl_balance_ref",
    "latent_sample",
    "latent_sample_ref",
    "straight_through",
    "straight_through_ref",
]


MAX_CLASSES = 1024  # more than that run on the reference


def _wide(x: Tensor) -> Tensor:
    """float64 stays (for gradient checks), everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def _mixed_probs(logits: Tensor, unimix: float) -> Tensor:  # (…, K) -> (…, K)
    """(1 - unimix) softmax(logits) + unimix / K."""
    probs = torch.softmax(_wide(logits), -1)
    return probs if unimix == 0.0 else (1.0 - unimix) * probs + unimix / logits.shape[-1]


def _mixed_log_probs(logits: Tensor, unimix: float) -> Tensor:  # (…, K) -> (…, K)
    if unimix == 0.0:
        return torch.log_softmax(_wide(logits), -1)
    return torch.log(_mixed_probs(logits, unimix))


def index_dtype(classes: int) -> torch.dtype:
    """The type of sampled class numbers: uint8 as long as they fit."""
    return torch.uint8 if classes <= 256 else torch.int64


def _check_logits(op: str, name: str, logits: Tensor, letters: str, unimix: float) -> None:
    if logits.dim() < letters.count(",") or logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(
            f"{op}: expected {name} of shape {letters} with K >= 1, got {tuple(logits.shape)}"
        )
    check_dtype(op, name, logits)
    if not 0.0 <= unimix <= 1.0:
        raise ValueError(f"{op}: expected unimix in [0, 1], got {unimix}")


def _check_sample(logits: Tensor, noise: Tensor | None, unimix: float) -> None:
    _check_logits("latent_sample", "logits", logits, "(..., S, K)", unimix)
    if noise is None:
        return
    if noise.shape not in (logits.shape, logits.shape[:-1]):
        raise ValueError(
            f"latent_sample: expected noise of shape (..., S) = {tuple(logits.shape[:-1])} "
            f"(uniform) or (..., S, K) = {tuple(logits.shape)} (Gumbel), got {tuple(noise.shape)}"
        )
    check_dtype("latent_sample", "noise", noise)
    check_same_device("latent_sample", logits=logits, noise=noise)


def _fused(logits: Tensor, op: str) -> bool:
    wide = logits.dtype == torch.float64
    return available(logits, op) and not wide and logits.shape[-1] <= MAX_CLASSES


def latent_sample_ref(
    logits: Tensor,  # (…, S, K)
    noise: Tensor | None,  # (…, S) uniform, (…, S, K) Gumbel, or None
    unimix: float = 0.01,
) -> tuple[Tensor, Tensor]:  # (…, S), (…, S, K)
    """`latent_sample` in plain PyTorch."""
    log_probs = _mixed_log_probs(logits, unimix)
    if noise is None:
        index = logits.detach().argmax(-1)
    elif noise.dim() == logits.dim():
        index = (log_probs.detach() + noise).argmax(-1)
    else:
        mass = _mixed_probs(logits.detach(), unimix).cumsum(-1)
        # Scaled by the sum that rounding left, so that no class of zero mass can be drawn.
        threshold = noise.to(mass.dtype).unsqueeze(-1) * mass[..., -1:]
        index = (mass <= threshold).sum(-1).clamp(max=logits.shape[-1] - 1)
    return index.to(index_dtype(logits.shape[-1])), log_probs


def latent_sample(
    logits: Tensor,  # (…, S, K)
    noise: Tensor | None,  # (…, S) uniform, (…, S, K) Gumbel, or None
    unimix: float = 0.01,
) -> tuple[Tensor, Tensor]:  # (…, S), (…, S, K)
    """One class per group from the mixed distribution p = (1-unimix) softmax(logits) + unimix/K.

    Args:
        logits: (…, S, K) float32 or bfloat16, raw.
        noise: (…, S) uniform in [0, 1): the class where the cumulative mass passes it;
            (…, S, K) Gumbel: argmax(log p + noise); None: the most likely class.
        unimix: share of the uniform distribution, in [0, 1].
    Returns:
        index (…, S), uint8 (int64 when K > 256), and log p (…, S, K) float32, differentiable.
    Raises:
        ValueError: shapes that do not fit, unimix outside of [0, 1]. TypeError: types or devices.
    Equivalent to:
        p = (1 - unimix) * torch.softmax(logits, -1) + unimix / K
        torch.distributions.Categorical(p).sample(), p.log()
    """
    _check_sample(logits, noise, unimix)
    if not _fused(logits, "latent_sample"):
        return latent_sample_ref(logits, noise, unimix)
    args = (logits.float(), None if noise is None else noise.detach().float(), float(unimix))
    return _Sample.apply(*args) if wants_grad(logits) else raw.latent_sample(*args)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, noise, unimix):
        index, log_probs = raw.latent_sample(logits, noise, unimix)
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(logits)
        ctx.unimix = unimix
        return index, log_probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _, grad):
        return raw.latent_backward(grad, *ctx.saved_tensors, ctx.unimix, True), None, None


def _check_straight(index: Tensor, logits: Tensor, unimix: float) -> None:
    op = "straight_through"
    _check_logits(op, "logits", logits, "(..., S, K)", unimix)
    check_shape(op, "index", index, "(..., S)", tuple(logits.shape[:-1]))
    if index.is_floating_point() or index.is_complex():
        raise TypeError(f"{op}: expected index of an integer dtype, got {index.dtype}")
    check_same_device(op, logits=logits, index=index)


def straight_through_ref(index: Tensor, logits: Tensor, unimix: float = 0.01) -> Tensor:
    """`straight_through` in plain PyTorch."""
    probs = _mixed_probs(logits, unimix)
    classes = torch.arange(logits.shape[-1], device=logits.device)
    one_hot = (index.unsqueeze(-1) == classes).to(probs.dtype)
    # The value is the one-hot alone: a not-a-number in the logits reaches the gradient only.
    return one_hot + torch.nan_to_num(probs - probs.detach())


def straight_through(
    index: Tensor,  # (…, S)
    logits: Tensor,  # (…, S, K)
    unimix: float = 0.01,
) -> Tensor:  # (…, S, K)
    """A one-hot sample whose gradient is that of the mixed probabilities.

    Args:
        index: (…, S) integers in [0, K).
        logits: (…, S, K), raw, of the distribution the sample came from.
        unimix: share of the uniform distribution, in [0, 1].
    Returns:
        (…, S, K) float32, exactly one-hot. Gradient: logits.
    Raises:
        ValueError: shapes that do not fit. TypeError: types or devices.
    Equivalent to:
        p = (1 - unimix) * torch.softmax(logits, -1) + unimix / K
        F.one_hot(index, K) + p - p.detach()
    """
    _check_straight(index, logits, unimix)
    if not _fused(logits, "latent_one_hot"):
        return straight_through_ref(index, logits, unimix)
    index = index if index.dtype == torch.uint8 else index.long()
    if wants_grad(logits):
        return _StraightThrough.apply(index, logits.float(), float(unimix))
    return raw.latent_one_hot(index, logits.shape[-1])


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index, logits, unimix):
        ctx.save_for_backward(logits)
        ctx.unimix = unimix
        return raw.latent_one_hot(index, logits.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, raw.latent_backward(grad, *ctx.saved_tensors, ctx.unimix, False), None


def _check_kl(post: Tensor, prior: Tensor, unimix: float) -> None:
    _check_logits("kl_balance", "post", post, "(..., S, K)", unimix)
    check_shape("kl_balance", "prior", prior, "(..., S, K)", tuple(post.shape))
    check_dtype("kl_balance", "prior", prior)
    check_same_device("kl_balance", post=post, prior=prior)


def kl_balance_ref(
    post: Tensor,  # (…, S, K)
    prior: Tensor,  # (…, S, K)
    unimix: float = 0.01,
    free_nats: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (…) x4
    """`kl_balance` in plain PyTorch."""
    log_p, log_q = _mixed_log_probs(post, unimix), _mixed_log_probs(prior, unimix)
    p, q = _mixed_probs(post, unimix), _mixed_probs(prior, unimix)
    p0, log_p0 = p.detach(), log_p.detach()
    dyn = (p0 * (log_p0 - log_q)).sum((-2, -1))
    rep = (p * (log_p - log_q.detach())).sum((-2, -1))
    # where, not clamp: not-a-number must come through, and equality must pass its gradient.
    dyn = torch.where(dyn < free_nats, free_nats, dyn)
    rep = torch.where(rep < free_nats, free_nats, rep)
    post_entropy = -(p0 * log_p0).sum((-2, -1))
    prior_entropy = -(q * log_q).detach().sum((-2, -1))
    return dyn, rep, post_entropy, prior_entropy


def kl_balance(
    post: Tensor,  # (…, S, K)
    prior: Tensor,  # (…, S, K)
    unimix: float = 0.01,
    free_nats: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (…) x4
    """The two KL losses of DreamerV3 and the entropies, from raw logits.

    KL = sum over S and K of p (log p - log q) with p, q the mixed probabilities of posterior and
    prior. dyn = max(free_nats, KL(sg(p) || q)) trains the prior, rep = max(free_nats,
    KL(p || sg(q))) trains the posterior; below free_nats the gradient is zero.

    Args:
        post, prior: (…, S, K) float32 or bfloat16, raw logits.
        unimix: share of the uniform distribution, in [0, 1]; 0 leaves the logits as they are.
        free_nats: in nats, per element of (…), summed over the groups.
    Returns:
        dyn, rep, post_entropy, prior_entropy: (…) float32 each, in nats. Gradient: dyn to
        prior, rep to post; the entropies are metrics and carry none.
    Raises:
        ValueError: shapes that do not fit, unimix outside of [0, 1]. TypeError: types or devices.
    Equivalent to:
        kl = torch.distributions.kl_divergence(Categorical(p), Categorical(q)).sum(-1)
        kl.clamp(min=free_nats)      # with p or q detached
    """
    _check_kl(post, prior, unimix)
    if not (_fused(post, "kl_balance") and prior.dtype != torch.float64):
        return kl_balance_ref(post, prior, unimix, free_nats)
    args = (post.float(), prior.float(), float(unimix), float(free_nats))
    if wants_grad(post, prior):
        return _KlBalance.apply(*args)
    return raw.kl_balance(*args, False)[:4]


class _KlBalance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, post, prior, unimix, free_nats):
        *values, slope_post, slope_prior = raw.kl_balance(post, prior, unimix, free_nats, True)
        ctx.mark_non_differentiable(*values[2:])
        ctx.save_for_backward(slope_post, slope_prior)
        return tuple(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_dyn, grad_rep, *_):
        return *raw.kl_balance_backward(grad_dyn, grad_rep, *ctx.saved_tensors), None, None


@register_fake("latent_sample")
def _(logits, noise, unimix):
    index = logits.new_empty(logits.shape[:-1], dtype=index_dtype(logits.shape[-1]))
    return index, logits.new_empty(logits.shape)


@register_fake("latent_one_hot")
def _(index, classes):
    return index.new_empty((*index.shape, classes), dtype=torch.float32)


@register_fake("latent_backward")
def _(grad, logits, unimix, log):
    return logits.new_empty(logits.shape)


@register_fake("kl_balance")
def _(post, prior, unimix, free_nats, slopes):
    values = [post.new_empty(post.shape[:-2]) for _ in range(4)]
    return *values, *(post.new_empty(post.shape if slopes else (0,)) for _ in range(2))


@register_fake("kl_balance_backward")
def _(grad_dyn, grad_rep, slope_post, slope_prior):
    return slope_post.new_empty(slope_post.shape), slope_prior.new_empty(slope_prior.shape)
