"""Negative log-likelihood of mixtures of normal distributions, in both forms of the literature.

Letters: Z latents, M mixture components. Everything is float32 inside; bfloat16 is accepted and
its gradients come back in bfloat16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastwm.ops._backend import available, raw, register_fake, wants_grad
from fastwm.ops._check import check_dtype, check_same_device, check_shape

__all__ = ["gmm_nll", "gmm_nll_ref"]

LAYOUTS = ("joint", "factored")
MAX_COMPONENTS = 64  # more than that run on the reference
MIN_LOG_STD = -20.0  # std 2e-9: closer than two float32 numbers of order one can lie


def _wide(x: Tensor) -> Tensor:
    """float64 stays (for gradient checks), everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def _check(target: Tensor, mean: Tensor, log_std: Tensor, logits: Tensor, layout: str) -> None:
    op = "gmm_nll"
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: expected layout 'joint' or 'factored', got {layout!r}")
    if target.dim() < 1:
        raise ValueError(f"{op}: expected target of shape (..., Z), got ()")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        letters = "(..., M)" if layout == "joint" else "(..., Z, M)"
        raise ValueError(
            f"{op}: expected logits of shape {letters} with M >= 1, got {tuple(logits.shape)}"
        )
    lead, latents, components = target.shape[:-1], target.shape[-1], logits.shape[-1]
    if layout == "joint":
        letters, sizes = "(..., M, Z)", (*lead, components, latents)
        check_shape(op, "logits", logits, "(..., M)", (*lead, components))
    else:
        letters, sizes = "(..., Z, M)", (*lead, latents, components)
        check_shape(op, "logits", logits, letters, sizes)
    check_shape(op, "mean", mean, letters, sizes)
    check_shape(op, "log_std", log_std, letters, sizes)
    named = {"target": target, "mean": mean, "log_std": log_std, "logits": logits}
    for name, tensor in named.items():
        check_dtype(op, name, tensor)
    check_same_device(op, **named)


class _Floor(torch.autograd.Function):
    """clamp(min) whose gradient is that of the identity: what fell below can come back up."""

    @staticmethod
    def forward(ctx, x: Tensor, bound: float) -> Tensor:
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def gmm_nll_ref(
    target: Tensor,  # (…, Z)
    mean: Tensor,  # joint (…, M, Z), factored (…, Z, M)
    log_std: Tensor,  # like mean
    logits: Tensor,  # joint (…, M), factored (…, Z, M)
    layout: str,
) -> Tensor:  # joint (…), factored (…, Z)
    """`gmm_nll` in plain PyTorch."""
    _check(target, mean, log_std, logits, layout)
    log_std, goal = _Floor.apply(_wide(log_std), MIN_LOG_STD), _wide(target.detach())
    goal = goal.unsqueeze(-2 if layout == "joint" else -1)
    z = (goal - _wide(mean)) * torch.exp(-log_std)
    log_density = -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)
    if layout == "joint":
        log_density = log_density.sum(-1)
    logits = _wide(logits)
    return torch.logsumexp(logits, -1) - torch.logsumexp(logits + log_density, -1)


def gmm_nll(
    target: Tensor,  # (…, Z)
    mean: Tensor,  # joint (…, M, Z), factored (…, Z, M)
    log_std: Tensor,  # like mean
    logits: Tensor,  # joint (…, M), factored (…, Z, M)
    layout: str,
) -> Tensor:  # joint (…), factored (…, Z)
    """How unlikely a vector is under a mixture of normal distributions with diagonal covariance.

    "joint": one mixture over vectors, -log sum_m p_m prod_z N(target_z; mean_mz, exp(log_std_mz)).
    "factored": one mixture per latent, -log sum_m p_zm N(target_z; mean_zm, exp(log_std_zm)).
    p = softmax(logits) over the components.

    Args:
        target: (…, Z) float32 or bfloat16; carries no gradient.
        mean, log_std: joint (…, M, Z), factored (…, Z, M). log_std in nats; below -20 it counts
            as -20 and its gradient passes as if there were no bound.
        logits: joint (…, M), factored (…, Z, M), raw.
        layout: "joint" or "factored".
    Returns:
        joint (…), factored (…, Z), float32, in nats. Gradient: mean, log_std, logits.
        Slices of a larger projection, such as out[..., 0, :, :] of (…, 3, Z, M), cost no copy.
    Raises:
        ValueError: shapes that do not fit, another layout. TypeError: types or devices.
    Equivalent to:
        parts = Normal(mean, log_std.exp())     # joint: Independent(..., 1)
        -MixtureSameFamily(Categorical(logits=logits), parts).log_prob(target)
    """
    _check(target, mean, log_std, logits, layout)
    parameters = (mean, log_std, logits)
    wide = any(x.dtype == torch.float64 for x in (target, *parameters))
    fits = logits.shape[-1] <= MAX_COMPONENTS
    if wide or not fits or not available(target, "gmm_nll"):
        return gmm_nll_ref(target, mean, log_std, logits, layout)
    args = (target.detach().float(), *(x.float() for x in parameters), layout == "joint")
    return _GmmNll.apply(*args) if wants_grad(*parameters) else raw.gmm_nll(*args)


class _GmmNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, target, mean, log_std, logits, joint):
        ctx.save_for_backward(target, mean, log_std, logits)
        ctx.joint = joint
        return raw.gmm_nll(target, mean, log_std, logits, joint)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_nll):
        grads = raw.gmm_nll_backward(grad_nll, *ctx.saved_tensors, ctx.joint)
        return None, *grads, None


@register_fake("gmm_nll")
def _(target, mean, log_std, logits, joint):
    return target.new_empty(target.shape[:-1] if joint else target.shape)


@register_fake("gmm_nll_backward")
def _(grad_nll, target, mean, log_std, logits, joint):
    return tuple(x.new_empty(x.shape) for x in (mean, log_std, logits))
