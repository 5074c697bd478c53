"""Two-hot distributions over fixed bins: the loss, the mean and the symexp-spaced bins.

Letters: V bins. Everything is float32 inside; bfloat16 logits are accepted and their gradient
comes back in bfloat16; CUDA kernels read and write it without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastwm.ops._backend import available, operand, raw, register_fake, wants_grad
from fastwm.ops._check import check_dtype, check_same_device, check_shape
from fastwm.ops._twohot_linear import MAX_BINS, LinearLogits

__all__ = [
    "LinearLogits",
    "symexp",
    "symexp_bins",
    "symlog",
    "symlog_bins",
    "twohot_loss",
    "twohot_loss_linear",
    "twohot_loss_linear_ref",
    "twohot_loss_ref",
    "twohot_mean",
    "twohot_mean_linear",
    "twohot_mean_linear_ref",
    "twohot_mean_ref",
]

BIN_LIMIT = 20.0  # the bins span symexp(-20) .. symexp(20), about +-4.85e8


def symlog(x: Tensor) -> Tensor:  # (…) -> (…)
    """sign(x) * log(1 + |x|), elementwise; differentiable; the inverse of `symexp`."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:  # (…) -> (…)
    """sign(x) * (exp(|x|) - 1), elementwise; differentiable; the inverse of `symlog`."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def symexp_bins(n: int, device: torch.device | str | None = None) -> Tensor:  # (V,)
    """The n symexp-spaced bins of DreamerV3's reward and value distributions.

    Odd n: symexp of n points on a line from -20 to 20. Even n: two halves of n/2 points that
    both end in a zero bin. Built in float64 and rounded to float32 once, so that every machine
    has the same bins, exactly antisymmetric: bins[i] == -bins[n-1-i].

    Args:
        n: number of bins, at least 2.
        device: where the bins shall live.
    Returns:
        (V,) float32, ascending.
    Raises:
        ValueError: n < 2.
    """
    if n < 2:
        raise ValueError(f"symexp_bins: expected n >= 2, got {n}")
    half = symexp(torch.linspace(-BIN_LIMIT, 0.0, (n + 1) // 2, dtype=torch.float64))
    mirrored = half if n % 2 == 0 else half[:-1]
    bins = torch.cat([half, -mirrored.flip(0)]).to(torch.float32)
    return (bins + 0.0).to(device)  # + 0.0: no negative zero


def symlog_bins(n: int, device: torch.device | str | None = None) -> Tensor:  # (V,)
    """The n evenly spaced bins from -20 to 20 of the 2023 algorithm, on the symlog scale.

    Use them with `squash=True` in `twohot_loss` and `twohot_mean`. Even n has no zero bin. Exactly
    antisymmetric, built like `symexp_bins`.

    Args:
        n: number of bins, at least 2.
        device: where the bins shall live.
    Returns:
        (V,) float32, ascending.
    Raises:
        ValueError: n < 2.
    Equivalent to:
        torch.linspace(-20, 20, n)
    """
    if n < 2:
        raise ValueError(f"symlog_bins: expected n >= 2, got {n}")
    line = torch.linspace(-BIN_LIMIT, BIN_LIMIT, n, dtype=torch.float64)
    return (0.5 * (line - line.flip(0))).to(torch.float32).to(device)


def _as_pair(
    target: Tensor | Sequence[Tensor], weights: Sequence[float] | None
) -> tuple[list[Tensor], list[float]]:
    """One target or a pair, and the weight of each."""
    targets = [target] if isinstance(target, Tensor) else list(target)
    if len(targets) not in (1, 2):
        raise ValueError(f"twohot_loss: expected one target or a pair, got {len(targets)}")
    scale = [1.0] * len(targets) if weights is None else [float(w) for w in weights]
    if len(scale) != len(targets):
        raise ValueError(
            f"twohot_loss: expected {len(targets)} weights, one per target, got {len(scale)}"
        )
    return targets, scale


def _check_logits(op: str, logits: Tensor, bins: Tensor) -> None:
    if logits.dim() < 1:
        raise ValueError(f"{op}: expected logits of shape (..., V), got ()")
    check_shape(op, "bins", bins, "(V,)", tuple(logits.shape[-1:]))
    check_dtype(op, "logits", logits)
    check_dtype(op, "bins", bins, torch.float32, torch.float64)
    check_same_device(op, logits=logits, bins=bins)


def _check_targets(logits: Tensor, targets: Sequence[Tensor]) -> None:
    for target in targets:
        check_shape("twohot_loss", "target", target, "(...)", tuple(logits.shape[:-1]))
        check_dtype("twohot_loss", "target", target)
        check_same_device("twohot_loss", logits=logits, target=target)


def _fused(logits: Tensor, op: str) -> bool:
    wide = logits.dtype == torch.float64
    return available(logits, op) and not wide and 1 <= logits.shape[-1] <= MAX_BINS


def twohot_weights(target: Tensor, bins: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two bins around each target and their weights: (below, above, w_below, w_above)."""
    last = bins.shape[0] - 1
    value = target.unsqueeze(-1)
    below = ((bins <= value).sum(-1) - 1).clamp(0, last)
    above = (bins.shape[0] - (bins > value).sum(-1)).clamp(0, last)
    same = below == above
    to_below = torch.where(same, 1.0, (bins[below] - target).abs())
    to_above = torch.where(same, 1.0, (bins[above] - target).abs())
    total = to_below + to_above
    return below, above, to_above / total, to_below / total


def _wide(x: Tensor) -> Tensor:
    """float64 stays (for gradient checks), everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def twohot_loss_ref(
    logits: Tensor,  # (…, V)
    target: Tensor | Sequence[Tensor],  # (…) or a pair of (…)
    bins: Tensor,  # (V,)
    weights: Sequence[float] | None = None,
    *,
    squash: bool = False,
) -> Tensor:  # (…)
    """`twohot_loss` in plain PyTorch."""
    targets, scale = _as_pair(target, weights)
    targets = [symlog(goal) for goal in targets] if squash else targets
    log_probs = torch.log_softmax(_wide(logits), -1)
    bins = bins.to(log_probs.dtype)
    loss = torch.zeros_like(log_probs[..., 0])
    for goal, factor in zip(targets, scale, strict=True):
        below, above, w_below, w_above = twohot_weights(goal.detach().to(bins.dtype), bins)
        picked = w_below * log_probs.gather(-1, below.unsqueeze(-1)).squeeze(
            -1
        ) + w_above * log_probs.gather(-1, above.unsqueeze(-1)).squeeze(-1)
        loss = loss - factor * picked
    return loss


def twohot_loss(
    logits: Tensor | LinearLogits,  # (…, V)
    target: Tensor | Sequence[Tensor],  # (…) or a pair of (…)
    bins: Tensor,  # (V,)
    weights: Sequence[float] | None = None,
    *,
    squash: bool = False,
) -> Tensor:  # (…)
    """Cross entropy between the two-hot code of a number and softmax(logits).

    A target y between bins[i] <= y < bins[i+1] has weight (bins[i+1]-y)/(bins[i+1]-bins[i]) on
    bin i and the rest on bin i+1; outside of the bins all weight is on the end bin.
    loss = -sum_v w_v log_softmax(logits)_v.

    Args:
        logits: (…, V) float32 or bfloat16; or LinearLogits.
        target: (…) float32, in the units of the bins; a pair of targets costs one pass over the
            logits and gives weights[0]*CE(target[0]) + weights[1]*CE(target[1]).
        bins: (V,) float32, ascending.
        weights: one number per target; ones if left out.
        squash: the bins lie on the symlog scale: the target goes through `symlog` first (the 2023
            algorithm, with `symlog_bins`).
    Returns:
        (…) float32. Gradient: logits only; of LinearLogits x, weight and bias.
    Raises:
        ValueError: shapes that do not fit. TypeError: types or devices.
    Equivalent to:
        p = two_hot(target, bins)                       # (…, V)
        -(p * torch.log_softmax(logits, -1)).sum(-1)
    """
    targets, scale = _as_pair(target, weights)
    head = None
    if isinstance(logits, LinearLogits):
        check_shape("twohot_loss", "bins", bins, "(V,)", tuple(logits.bias.shape))
        head = logits if logits.fused() and bins.dtype == torch.float32 else None
        logits = logits.tensor() if head is None else head.known(bins)
    _check_logits("twohot_loss", logits, bins)
    _check_targets(logits, targets)
    if not _fused(logits, "twohot_loss"):
        return twohot_loss_ref(logits, targets, bins, scale, squash=squash)
    targets = [goal.detach().float() for goal in targets]
    targets = [symlog(goal) for goal in targets] if squash else targets
    second = targets[1] if len(targets) == 2 else None
    args = (operand(logits), bins.float(), targets[0], second, scale[0], scale[-1])
    if head is not None and head.wants_grad():
        return _LinearLoss.apply(head.x, head.weight, head.bias, *args)
    return _TwohotLoss.apply(*args) if wants_grad(logits) else raw.twohot_loss(*args)[0]


def twohot_loss_linear_ref(
    x: Tensor,  # (…, U)
    weight: Tensor,  # (V, U)
    bias: Tensor,  # (V,)
    target: Tensor | Sequence[Tensor],  # (…) or a pair of (…)
    bins: Tensor,  # (V,)
    weights: Sequence[float] | None = None,
    *,
    squash: bool = False,
) -> Tensor:  # (…)
    """`twohot_loss_linear` in plain PyTorch."""
    return twohot_loss_ref(F.linear(x, weight, bias), target, bins, weights, squash=squash)


def twohot_loss_linear(
    x: Tensor,  # (…, U)
    weight: Tensor,  # (V, U)
    bias: Tensor,  # (V,)
    target: Tensor | Sequence[Tensor],  # (…) or a pair of (…)
    bins: Tensor,  # (V,)
    weights: Sequence[float] | None = None,
    *,
    squash: bool = False,
) -> Tensor:  # (…)
    """`twohot_loss` of the logits x W^T + b; see `LinearLogits`, which shares them with a mean.

    Args:
        x: (…, U) float32, the last hidden layer. weight: (V, U). bias: (V,).
        target, bins, weights, squash: as in `twohot_loss`.
    Returns:
        (…) float32. Gradient: x, weight, bias.
    Raises:
        ValueError: shapes that do not fit. TypeError: types or devices.
    Equivalent to:
        p = two_hot(target, bins)                       # (…, V)
        -(p * torch.log_softmax(F.linear(x, weight, bias), -1)).sum(-1)
    """
    return twohot_loss(LinearLogits(x, weight, bias), target, bins, weights, squash=squash)


class _TwohotLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, bins, target, second, weight, second_weight):
        loss, exp_sum = raw.twohot_loss(logits, bins, target, second, weight, second_weight)
        ctx.save_for_backward(exp_sum, logits, bins, target, second)
        ctx.weights = weight, second_weight
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        grad = raw.twohot_loss_backward(grad_loss, *ctx.saved_tensors, *ctx.weights)
        return grad, None, None, None, None, None


class _LinearLoss(torch.autograd.Function):
    """The loss of logits x W^T + b that are known."""

    @staticmethod
    def forward(ctx, x, weight, bias, logits, bins, target, second, first_scale, second_scale):
        loss, exp_sum = raw.twohot_loss(logits, bins, target, second, first_scale, second_scale)
        ctx.save_for_backward(exp_sum, logits, bins, target, second, x, weight)
        ctx.scales = first_scale, second_scale
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        *saved, x, weight = ctx.saved_tensors
        wants_x = ctx.needs_input_grad[0]
        args = (grad_loss, *saved, *ctx.scales, x, weight, wants_x)
        grad_x, grad_weight, grad_bias = raw.twohot_linear_backward(*args)
        return grad_x if wants_x else None, grad_weight, grad_bias, *[None] * 6


@register_fake("twohot_loss")
def _(logits, bins, target, second, weight, second_weight):
    rows = logits.shape[:-1]
    return tuple(logits.new_empty(rows, dtype=torch.float32) for _ in range(2))


@register_fake("twohot_loss_backward")
def _(grad_loss, exp_sum, logits, bins, target, second, weight, second_weight):
    return logits.new_empty(logits.shape)


def twohot_mean_ref(
    logits: Tensor,  # (…, V)
    bins: Tensor,  # (V,)
    *,
    squash: bool = False,
) -> Tensor:  # (…)
    """`twohot_mean` in plain PyTorch."""
    probs = torch.softmax(_wide(logits), -1)
    count = bins.shape[0]
    half = count // 2
    upper = probs[..., count - half :]
    lower = probs[..., :half].flip(-1)
    mean = ((upper - lower) * bins[count - half :].to(probs.dtype)).sum(-1)
    return symexp(mean) if squash else mean


def twohot_mean(
    logits: Tensor | LinearLogits,  # (…, V)
    bins: Tensor,  # (V,)
    *,
    squash: bool = False,
) -> Tensor:  # (…)
    """The mean of softmax(logits) over antisymmetric bins.

    sum_i b_i (p_(+i) - p_(-i)) over the positive bins: the same number as sum_v b_v p_v, but
    exactly 0 for uniform logits under any compiler, and about three times more accurate.

    Args:
        logits: (…, V) float32 or bfloat16; or LinearLogits.
        bins: (V,) float32, antisymmetric: bins[i] == -bins[V-1-i].
        squash: the bins lie on the symlog scale: the mean there goes through `symexp` (the 2023
            algorithm, with `symlog_bins`).
    Returns:
        (…) float32. Gradient: logits.
    Raises:
        ValueError: shapes that do not fit. TypeError: types or devices.
    Equivalent to:
        (torch.softmax(logits, -1) * bins).sum(-1)
    """
    if isinstance(logits, LinearLogits):
        check_shape("twohot_mean", "bins", bins, "(V,)", tuple(logits.bias.shape))
        if logits.fused() and bins.dtype == torch.float32 and not logits.wants_grad():
            mean = logits.mean(bins)
            return symexp(mean) if squash else mean
        logits = logits.tensor()
    _check_logits("twohot_mean", logits, bins)
    if not _fused(logits, "twohot_mean"):
        return twohot_mean_ref(logits, bins, squash=squash)
    args = (operand(logits), bins.float())
    mean = _TwohotMean.apply(*args) if wants_grad(logits) else raw.twohot_mean(*args)
    return symexp(mean) if squash else mean


class _TwohotMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, bins):
        ctx.save_for_backward(logits, bins)
        return raw.twohot_mean(logits, bins)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_mean):
        return raw.twohot_mean_backward(grad_mean, *ctx.saved_tensors), None


def twohot_mean_linear_ref(
    x: Tensor,  # (…, U)
    weight: Tensor,  # (V, U)
    bias: Tensor,  # (V,)
    bins: Tensor,  # (V,)
    *,
    squash: bool = False,
) -> Tensor:  # (…)
    """`twohot_mean_linear` in plain PyTorch."""
    return twohot_mean_ref(F.linear(x, weight, bias), bins, squash=squash)


def twohot_mean_linear(
    x: Tensor,  # (…, U)
    weight: Tensor,  # (V, U)
    bias: Tensor,  # (V,)
    bins: Tensor,  # (V,)
    *,
    squash: bool = False,
) -> Tensor:  # (…)
    """`twohot_mean` of the logits x W^T + b. On a CPU they are never written.

    Args:
        x: (…, U) float32, the last hidden layer. weight: (V, U). bias: (V,).
        bins, squash: as in `twohot_mean`.
    Returns:
        (…) float32. Gradient: x, weight, bias, by way of the logits.
    Raises:
        ValueError: shapes that do not fit. TypeError: types or devices.
    Equivalent to:
        (torch.softmax(F.linear(x, weight, bias), -1) * bins).sum(-1)
    """
    op, tensors = "twohot_mean_linear", {"x": x, "weight": weight, "bias": bias, "bins": bins}
    if x.dim() < 1:
        raise ValueError(f"{op}: expected x of shape (..., U), got ()")
    check_shape(op, "weight", weight, "(V, U)", (*weight.shape[:1], x.shape[-1]))
    for name in ("bias", "bins"):
        check_shape(op, name, tensors[name], "(V,)", (weight.shape[0],))
    for name, tensor in tensors.items():
        check_dtype(op, name, tensor)
    check_same_device(op, **tensors)
    narrow = all(tensor.dtype == torch.float32 for tensor in tensors.values())
    low = torch.is_autocast_enabled(x.device.type)
    sizes = 1 <= weight.shape[0] <= MAX_BINS and weight.shape[1] >= 1
    if not narrow or low or not sizes or not available(x, op) or wants_grad(x, weight, bias):
        return twohot_mean(F.linear(x, weight, bias), bins, squash=squash)
    mean = raw.twohot_mean_linear(x, weight, bias, bins)
    return symexp(mean) if squash else mean


@register_fake("twohot_mean")
def _(logits, bins):
    return logits.new_empty(logits.shape[:-1], dtype=torch.float32)


@register_fake("twohot_mean_linear")
def _(x, weight, bias, bins):
    return x.new_empty(x.shape[:-1])


@register_fake("twohot_linear")
def _(x, weight, bias, bins):
    rows = x.shape[:-1]
    return x.new_empty((*rows, weight.shape[0])), x.new_empty(rows)


@register_fake("twohot_linear_backward")
def _(grad_loss, exp_sum, logits, bins, target, second, weight, second_weight, x, kernel, wants_x):
    shapes = (x.shape if wants_x else (0,)), kernel.shape, (kernel.shape[0],)
    return tuple(x.new_empty(shape) for shape in shapes)


@register_fake("twohot_mean_backward")
def _(grad_mean, logits, bins):
    return logits.new_empty(logits.shape)
