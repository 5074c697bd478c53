"""Optimizer steps over lists of tensors: LaProp behind adaptive clipping (DreamerV3), and Adam.

On CUDA a step is two launches for up to 448 tensors, and nothing is read on the host; `step` and
`lr` have to live beside the parameters, else the plain PyTorch path is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastwm.ops._backend import available, raw, register_fake

__all__ = [
    "Copies",
    "adam_",
    "adam_ref_",
    "ema_",
    "ema_ref_",
    "laprop_agc_",
    "laprop_agc_ref_",
]


class Copies(NamedTuple):
    """Copies of the parameters that an optimizer step writes while it has them in cache."""

    slow: Sequence[Tensor | None] = ()  # float32: slow <- rate p + (1 - rate) slow; None: has none
    rate: float = 0.0
    low: Sequence[Tensor] = ()  # bfloat16: low <- p


NONE = Copies()


def _check_lists(
    who: str,
    names: Sequence[str],
    lists: Sequence[Sequence[Tensor]],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Equal lengths and shapes; all but the first in `dtype`, the first in float32."""
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
            wanted = torch.float32 if tensors is first else dtype
            if b.dtype != wanted:
                raise TypeError(f"{who}: expected {name}[{number}] in {wanted}, got {b.dtype}")


def _check(who, params, grads, mu, nu, step, lr, decay_mask, copies) -> None:
    _check_lists(who, ("params", "grads", "mu", "nu"), (params, grads, mu, nu))
    if step.dim() != 0 or step.dtype not in (torch.int64, torch.float32):
        raise TypeError(
            f"{who}: expected step as a 0-d int64 or float32 tensor, "
            f"got {tuple(step.shape)} {step.dtype}"
        )
    if lr.dim() != 0 or lr.dtype != torch.float32:
        raise TypeError(
            f"{who}: expected lr as a 0-d float32 tensor, got {tuple(lr.shape)} {lr.dtype}"
        )
    if decay_mask is not None and len(decay_mask) != len(params):
        raise ValueError(
            f"{who}: expected decay_mask of length {len(params)}, got {len(decay_mask)}"
        )
    if copies.slow:
        slow = [p if s is None else s for s, p in zip(copies.slow, params, strict=False)]
        slow += copies.slow[len(params) :]
        _check_lists(who, ("params", "slow copies"), (params, slow))
    if copies.low:
        _check_lists(who, ("params", "low copies"), (params, copies.low), torch.bfloat16)


def _fused(written: Sequence[Sequence[Tensor]], op: str) -> bool:
    """Whether there is something to do, on one device with kernels, and all of it row-major."""
    tensors = [tensor for group in written for tensor in group]
    device = tensors[0].device if written[0] else None
    return (
        device is not None
        and available(device, op)
        and all(t.device == device and t.is_contiguous() for t in tensors)
    )


def _norm(x: Tensor) -> Tensor:
    """The 2-norm, summed in float64: no overflow, hardly any rounding."""
    return torch.linalg.vector_norm(x, dtype=torch.float64)


def _unscaled(grads, grad_scale, lr) -> tuple[Sequence[Tensor], list[Tensor], Tensor]:
    """Gradients over `grad_scale`, the norm of each, and that of all."""
    if grad_scale is not None:
        grads = [g / grad_scale for g in grads]
    norms = [_norm(g) for g in grads]
    return grads, norms, torch.stack(norms).square().sum().sqrt() if norms else lr.double() * 0.0


def _write(finite: Tensor, written: Sequence[tuple[Tensor, Tensor]]) -> None:
    for old, new in written:
        old.copy_(torch.where(finite, new, old))


def _write_copies(copies: Copies, params: Sequence[Tensor], finite: Tensor) -> None:
    for slow, p in zip(copies.slow, params, strict=False):
        if slow is not None:
            _write(finite, [(slow, copies.rate * p + (1.0 - copies.rate) * slow)])
    for low, p in zip(copies.low, params, strict=False):
        _write(finite, [(low, p.to(low.dtype))])


def _raw_arguments(params, grads, mu, nu, step, lr, grad_scale) -> tuple:
    scale = grad_scale
    if isinstance(scale, Tensor):
        scale = scale.float().to(lr.device)
    elif scale is not None:
        scale = lr.new_full((), float(scale))  # no copy from the host: a graph can hold it
    return list(params), list(grads), list(mu), list(nu), step, lr, scale


def _raw_copies(copies: Copies) -> tuple:
    at = [i for i, slow in enumerate(copies.slow) if slow is not None]
    return [copies.slow[i] for i in at], at, float(copies.rate), list(copies.low)


def _note_changes(*lists: Sequence[Tensor | None]) -> None:
    """Tell autograd, and whoever keeps something computed from them, that tensors changed: a kernel
    writes through a pointer, which does not count as a change by itself."""
    if not torch.compiler.is_compiling():  # where the op's schema tells
        increment_version([x for tensors in lists for x in tensors if x is not None])


def _raw_decay(decay_mask: Sequence[bool] | None, count: int) -> list[int]:
    return [1] * count if decay_mask is None else [int(on) for on in decay_mask]


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
    copies: Copies = NONE,
) -> tuple[Tensor, Tensor]:  # (), ()
    """`laprop_agc_` in plain PyTorch, one tensor after the other."""
    grads, norms, total = _unscaled(grads, grad_scale, lr)
    finite, count = torch.isfinite(total), step.double() + 1.0
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
        _write(finite, [(p, p - lr * move), (mu[i], first), (nu[i], second)])
    _write_copies(copies, params, finite)
    step.add_(finite.to(step))  # which may live on another device
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
    copies: Copies = NONE,
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
        copies: slow and bfloat16 copies to write in the same pass.
    Returns:
        grad_norm () float32: norm of all gradients, unscaled, before clipping; finite () bool.
    Raises:
        ValueError, TypeError: lists of unequal length, shapes or types that do not fit.
    Equivalent to:
        g = g / (g.norm() / (agc * p.norm().clamp(min=pmin))).clamp(min=1)
        n.lerp_(g * g, 1 - beta2); m.lerp_(g / ((n / (1 - beta2**t)).sqrt() + eps), 1 - beta1)
        p -= lr * (m / (1 - beta1**t) + weight_decay * p)
    """
    lists = (params, grads, mu, nu)
    _check("laprop_agc_", *lists, step, lr, decay_mask, copies)
    if not _fused((params, mu, nu, _raw_copies(copies)[0], copies.low, (step, lr)), "laprop_agc_"):
        return laprop_agc_ref_(
            *lists, step, lr, agc=agc, pmin=pmin, beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=weight_decay, decay_mask=decay_mask, nesterov=nesterov,
            grad_scale=grad_scale, copies=copies,
        )  # fmt: skip
    with torch.no_grad():
        done = raw.laprop_agc_(
            *_raw_arguments(*lists, step, lr, grad_scale), agc, pmin, beta1, beta2, eps,
            weight_decay, _raw_decay(decay_mask, len(params)), nesterov, *_raw_copies(copies),
        )  # fmt: skip
    _note_changes(params, mu, nu, copies.slow, copies.low, (step,))
    return done


@torch.no_grad()
def adam_ref_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    mu: Sequence[Tensor],
    nu: Sequence[Tensor],
    step: Tensor,  # ()
    lr: Tensor,  # ()
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    decay_mask: Sequence[bool] | None = None,
    clip_norm: float = 0.0,
    clip_value: float = 0.0,
    grad_scale: Tensor | float | None = None,
    copies: Copies = NONE,
) -> tuple[Tensor, Tensor]:  # (), ()
    """`adam_` in plain PyTorch, one tensor after the other."""
    grads, _, total = _unscaled(grads, grad_scale, lr)
    finite, count = torch.isfinite(total), step.double() + 1.0
    correct1, correct2 = (1.0 - beta1**count).float(), (1.0 - beta2**count).float()
    excess = (total / clip_norm).clamp(min=1.0).float() if clip_norm > 0.0 else None
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        g = g if excess is None else g / excess
        g = g.clamp(-clip_value, clip_value) if clip_value > 0.0 else g
        decay = weight_decay if decay_mask is None or decay_mask[i] else 0.0
        g = g if decoupled or not decay else g + decay * p
        first = beta1 * mu[i] + (1.0 - beta1) * g
        second = beta2 * nu[i] + (1.0 - beta2) * g.square()
        move = first / correct1 / ((second / correct2).sqrt() + eps)
        move = move + decay * p if decoupled and decay else move
        _write(finite, [(p, p - lr * move), (mu[i], first), (nu[i], second)])
    _write_copies(copies, params, finite)
    step.add_(finite.to(step))  # which may live on another device
    return total.float(), finite


def adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    mu: Sequence[Tensor],
    nu: Sequence[Tensor],
    step: Tensor,  # ()
    lr: Tensor,  # ()
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    decay_mask: Sequence[bool] | None = None,
    clip_norm: float = 0.0,
    clip_value: float = 0.0,
    grad_scale: Tensor | float | None = None,
    copies: Copies = NONE,
) -> tuple[Tensor, Tensor]:  # (), ()
    """One step of Adam over a list of tensors, in place.

    With t the number of this update, counted from one, for every tensor:
        g  <- clamp(g / grad_scale / max(1, |all g| / clip_norm), -clip_value, clip_value)
        mu <- beta1 mu + (1-beta1) g;   nu <- beta2 nu + (1-beta2) g^2
        p  <- p - lr (mu / (1-beta1^t) / (sqrt(nu / (1-beta2^t)) + eps) + weight_decay p)
    A not-a-number or an infinity in any gradient leaves everything as it was.

    Args:
        params, grads, mu, nu, step, lr, grad_scale, copies: as in `laprop_agc_`.
        weight_decay: on the tensors for which decay_mask is true (all if None).
        decoupled: decay beside the update (AdamW); False: added to the clipped gradient.
        clip_norm: largest norm of all gradients together; clip_value: of one element; 0: off.
    Returns:
        grad_norm () float32: norm of all gradients, unscaled, before clipping; finite () bool.
    Raises:
        ValueError, TypeError: lists of unequal length, shapes or types that do not fit.
    Equivalent to:
        torch.nn.utils.clip_grad_norm_(params, clip_norm)     # and clip_grad_value_
        torch.optim.AdamW(params, lr, (beta1, beta2), eps, weight_decay).step()
    """
    lists = (params, grads, mu, nu)
    _check("adam_", *lists, step, lr, decay_mask, copies)
    if not _fused((params, mu, nu, _raw_copies(copies)[0], copies.low, (step, lr)), "adam_"):
        return adam_ref_(
            *lists, step, lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
            decoupled=decoupled, decay_mask=decay_mask, clip_norm=clip_norm,
            clip_value=clip_value, grad_scale=grad_scale, copies=copies,
        )  # fmt: skip
    with torch.no_grad():
        done = raw.adam_(
            *_raw_arguments(*lists, step, lr, grad_scale), clip_norm, clip_value, beta1, beta2,
            eps, weight_decay, _raw_decay(decay_mask, len(params)), decoupled,
            *_raw_copies(copies),
        )  # fmt: skip
    _note_changes(params, mu, nu, copies.slow, copies.low, (step,))
    return done


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
    if not _fused((slow,), "ema_"):
        return ema_ref_(slow, fast, rate, finite)
    with torch.no_grad():
        done = raw.ema_(list(slow), list(fast), rate, finite)
    _note_changes(slow)
    return done


@register_fake("laprop_agc_")
@register_fake("adam_")
def _(params, grads, mu, nu, step, lr, *settings):
    return lr.new_empty(()), lr.new_empty((), dtype=torch.bool)


@register_fake("ema_")
def _(slow, fast, rate, finite):
    return None
