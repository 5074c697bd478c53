"""The optimizer step of DreamerV3 over a list of tensors: adaptive clipping, then LaProp.

This stem has no CUDA file yet: CUDA tensors take the plain PyTorch path.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastwm.ops._backend import available, raw, register_fake

__all__ = ["ema_", "ema_ref_", "laprop_agc_", "laprop_agc_ref_"]


def _check_lists(who: str, names: Sequence[str], lists: Sequence[Sequence[Tensor]]) -> None:
    first = lists[0]
    for name, tensors in zip(names, lists, strict=True):
        if len(tensors) != len(first):
            raise ValueError(
                f"{who}: expected as many {name} as {names[0]} = {len(first)}, got {len(tensors)}"
            )
        for number, (a, b) in enumerate(zip(first, tensors, strict=True)):
            if a.shape != b.shape:
                raise ValueError(
                    f"{who}: expected {name}[{number}] of shape {tuple(a.shape)}, "
                    f"got {tuple(b.shape)}"
                )
            if b.dtype != torch.float32:
                raise TypeError(f"{who}: expected {name}[{number}] in float32, got {b.dtype}")


def _check_laprop(params, grads, mu, nu, step, lr, decay_mask) -> None:
    _check_lists("laprop_agc_", ("params", "grads", "mu", "nu"), (params, grads, mu, nu))
    if step.dim() != 0 or step.dtype not in (torch.int64, torch.float32):
        raise TypeError(
            f"laprop_agc_: expected step as a 0-d int64 or float32 tensor, "
            f"got {tuple(step.shape)} {step.dtype}"
        )
    if lr.dim() != 0 or lr.dtype != torch.float32:
        raise TypeError(
            f"laprop_agc_: expected lr as a 0-d float32 tensor, got {tuple(lr.shape)} {lr.dtype}"
        )
    if decay_mask is not None and len(decay_mask) != len(params):
        raise ValueError(
            f"laprop_agc_: expected decay_mask of length {len(params)}, got {len(decay_mask)}"
        )


def _fused(written: Sequence[Sequence[Tensor]]) -> bool:
    """Whether there is something to do, on one device with kernels, and all of it row-major."""
    tensors = [tensor for group in written for tensor in group]
    return bool(tensors) and all(
        available(t) and t.device == tensors[0].device and t.is_contiguous() for t in tensors
    )


def _norm(x: Tensor) -> Tensor:
    """The 2-norm, summed in float64: no overflow, hardly any rounding."""
    return torch.linalg.vector_norm(x, dtype=torch.float64)


@torch.no_grad()
def laprop_agc_ref_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    mu: Sequence[Tensor],
    nu: Sequence[Tensor],
    step: Tensor,  # ()
    lr: Tensor,  # ()
    *,
    agc: float = 0.3,
    pmin: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-20,
    weight_decay: float = 0.0,
    decay_mask: Sequence[bool] | None = None,
    nesterov: bool = False,
    grad_scale: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:  # (), ()
    """`laprop_agc_` in plain PyTorch, one tensor after the other."""
    if grad_scale is not None:
        grads = [g / grad_scale for g in grads]
    norms = [_norm(g) for g in grads]
    total = torch.stack(norms).square().sum().sqrt() if norms else lr.double() * 0.0
    finite = torch.isfinite(total)
    count = step.double() + 1.0
    correct1, correct2 = 1.0 - beta1**count, 1.0 - beta2**count
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if agc > 0.0:
            limit = agc * _norm(p).clamp(min=pmin)
            g = g / (norms[i] / limit).clamp(min=1.0).float()
        second = beta2 * nu[i] + (1.0 - beta2) * g.square()
        unit = g / ((second / correct2.float()).sqrt() + eps)
        first = beta1 * mu[i] + (1.0 - beta1) * unit
        ahead = beta1 * first + (1.0 - beta1) * unit if nesterov else first
        move = ahead / correct1.float()
        if weight_decay and (decay_mask is None or decay_mask[i]):
            move = move + weight_decay * p
        p.copy_(torch.where(finite, p - lr * move, p))
        mu[i].copy_(torch.where(finite, first, mu[i]))
        nu[i].copy_(torch.where(finite, second, nu[i]))
    step.add_(finite.to(step.dtype))
    return total.float(), finite


def laprop_agc_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    mu: Sequence[Tensor],
    nu: Sequence[Tensor],
    step: Tensor,  # ()
    lr: Tensor,  # ()
    *,
    agc: float = 0.3,
    pmin: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-20,
    weight_decay: float = 0.0,
    decay_mask: Sequence[bool] | None = None,
    nesterov: bool = False,
    grad_scale: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:  # (), ()
    """One optimizer step over a list of tensors, in place.

    With t the number of this update, counted from one, for every tensor:
        g  <- g / grad_scale / max(1, |g| / (agc * max(pmin, |p|)))     adaptive clipping
        nu <- beta2 nu + (1-beta2) g^2;   u = g / (sqrt(nu / (1-beta2^t)) + eps)
        mu <- beta1 mu + (1-beta1) u;     p <- p - lr (mu / (1-beta1^t) + weight_decay p)
    A not-a-number or an infinity in any gradient leaves everything as it was.

    Args:
        params, grads, mu, nu: lists of float32 tensors of equal shapes.
        step: () int64 or float32, the number of updates applied so far; counted up here.
        lr: () float32.
        agc: clipping factor; 0 turns clipping off. pmin: smallest norm of a tensor there.
        weight_decay: decoupled, on the tensors for which decay_mask is true (all if None).
        nesterov: average the momentum once more with u.
        grad_scale: what the loss was multiplied with; the gradients are divided by it.
    Returns:
        grad_norm () float32: norm of all gradients, unscaled, before clipping; finite () bool.
    Raises:
        ValueError, TypeError: lists of unequal length, shapes or types that do not fit.
    Equivalent to:
        the loop of `laprop_agc_ref_`; the first update moves each element by about lr.
    """
    _check_laprop(params, grads, mu, nu, step, lr, decay_mask)
    if not _fused((params, mu, nu)):
        return laprop_agc_ref_(
            params, grads, mu, nu, step, lr, agc=agc, pmin=pmin, beta1=beta1, beta2=beta2,
            eps=eps, weight_decay=weight_decay, decay_mask=decay_mask, nesterov=nesterov,
            grad_scale=grad_scale,
        )  # fmt: skip
    scale = None if grad_scale is None else torch.as_tensor(grad_scale).float().to(lr.device)
    decay = [1] * len(params) if decay_mask is None else [int(on) for on in decay_mask]
    with torch.no_grad():
        return raw.laprop_agc_(
            list(params), list(grads), list(mu), list(nu), step, lr, scale, agc, pmin, beta1,
            beta2, eps, weight_decay, decay, nesterov,
        )  # fmt: skip


@torch.no_grad()
def ema_ref_(
    slow: Sequence[Tensor], fast: Sequence[Tensor], rate: float, finite: Tensor | None = None
) -> None:
    """`ema_` in plain PyTorch, one tensor after the other."""
    for old, new in zip(slow, fast, strict=True):
        mixed = rate * new + (1.0 - rate) * old
        old.copy_(mixed if finite is None else torch.where(finite, mixed, old))


def ema_(
    slow: Sequence[Tensor], fast: Sequence[Tensor], rate: float, finite: Tensor | None = None
) -> None:
    """slow <- rate * fast + (1 - rate) * slow over two lists of float32 tensors, in place.

    Args:
        slow, fast: lists of float32 tensors of equal shapes.
        rate: share of the fast tensors, in [0, 1].
        finite: () bool; False leaves everything as it was.
    Raises:
        ValueError, TypeError: lists of unequal length, shapes or types that do not fit.
    Equivalent to:
        for s, f in zip(slow, fast): s.lerp_(f, rate)
    """
    _check_lists("ema_", ("slow", "fast"), (slow, fast))
    if not _fused((slow,)):
        return ema_ref_(slow, fast, rate, finite)
    with torch.no_grad():
        return raw.ema_(list(slow), list(fast), rate, finite)


@register_fake("laprop_agc_")
def _(params, grads, mu, nu, step, lr, grad_scale, agc, pmin, beta1, beta2, eps, weight_decay,
      decay, nesterov):  # fmt: skip
    return lr.new_empty(()), lr.new_empty((), dtype=torch.bool)


@register_fake("ema_")
def _(slow, fast, rate, finite):
    return None
