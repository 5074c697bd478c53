"""Categorical latents: unimix, sampling with given noise, straight-through, balanced KL.

Letters: S groups, K classes per group. Everything is float32 inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "kl_balance",
    "kl_balance_ref",
    "latent_sample",
    "latent_sample_ref",
    "straight_through",
    "straight_through_ref",
]


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


def _check_sample(logits: Tensor, noise: Tensor | None, unimix: float) -> None:
    if logits.dim() < 2 or logits.shape[-1] < 1:
        raise ValueError(
            f"latent_sample: expected logits of shape (..., S, K), got {tuple(logits.shape)}"
        )
    if not 0.0 <= unimix <= 1.0:
        raise ValueError(f"latent_sample: expected unimix in [0, 1], got {unimix}")
    if noise is not None and noise.shape not in (logits.shape, logits.shape[:-1]):
        raise ValueError(
            f"latent_sample: expected noise of shape (..., S) = {tuple(logits.shape[:-1])} "
            f"(uniform) or (..., S, K) = {tuple(logits.shape)} (Gumbel), got {tuple(noise.shape)}"
        )


def latent_sample_ref(
    logits: Tensor,  # (…, S, K)
    noise: Tensor | None,  # (…, S) uniform, (…, S, K) Gumbel, or None
    unimix: float = 0.01,
) -> tuple[Tensor, Tensor]:  # (…, S), (…, S, K)
    """`latent_sample` in plain PyTorch."""
    _check_sample(logits, noise, unimix)
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
        ValueError: shapes that do not fit, unimix outside of [0, 1].
    Equivalent to:
        p = (1 - unimix) * torch.softmax(logits, -1) + unimix / K
        torch.distributions.Categorical(p).sample(), p.log()
    """
    return latent_sample_ref(logits, noise, unimix)


def _check_straight(index: Tensor, logits: Tensor) -> None:
    if logits.dim() < 1 or index.shape != logits.shape[:-1]:
        raise ValueError(
            f"straight_through: expected index of shape (..., S) = {tuple(logits.shape[:-1])}, "
            f"got {tuple(index.shape)}"
        )


def straight_through_ref(index: Tensor, logits: Tensor, unimix: float = 0.01) -> Tensor:
    """`straight_through` in plain PyTorch."""
    _check_straight(index, logits)
    probs = _mixed_probs(logits, unimix)
    classes = torch.arange(logits.shape[-1], device=logits.device)
    one_hot = (index.unsqueeze(-1) == classes).to(probs.dtype)
    return one_hot + (probs - probs.detach())


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
        ValueError: shapes that do not fit.
    Equivalent to:
        p = (1 - unimix) * torch.softmax(logits, -1) + unimix / K
        F.one_hot(index, K) + p - p.detach()
    """
    return straight_through_ref(index, logits, unimix)


def _check_kl(post: Tensor, prior: Tensor, unimix: float) -> None:
    if post.dim() < 2 or post.shape[-1] < 1 or post.shape != prior.shape:
        raise ValueError(
            f"kl_balance: expected post and prior of one shape (..., S, K), "
            f"got {tuple(post.shape)} and {tuple(prior.shape)}"
        )
    if not 0.0 <= unimix <= 1.0:
        raise ValueError(f"kl_balance: expected unimix in [0, 1], got {unimix}")


def kl_balance_ref(
    post: Tensor,  # (…, S, K)
    prior: Tensor,  # (…, S, K)
    unimix: float = 0.01,
    free_nats: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (…) x4
    """`kl_balance` in plain PyTorch."""
    _check_kl(post, prior, unimix)
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
        ValueError: shapes that do not fit, unimix outside of [0, 1].
    Equivalent to:
        kl = torch.distributions.kl_divergence(Categorical(p), Categorical(q)).sum(-1)
        kl.clamp(min=free_nats)      # with p or q detached
    """
    return kl_balance_ref(post, prior, unimix, free_nats)
