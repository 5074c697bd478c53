"""Stages of the image encoder: convolution, 2x2 max pooling, bias, RMSNorm over channels, SiLU.

Letters: N images, C channels in, C' out, k kernel. `pool_silu` is all that follows the convolution,
in one pass over its result. `conv_pool_silu` is the whole stage. On the CPU a 5 x 5 convolution is
ours: its result, four times as large as what is pooled of it, is never written; and so is the
gradient of any, because three of four results were not the largest of their square and have none.
Elsewhere the convolution is the library's. CUDA kernels read and write bfloat16 themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastwm.ops._backend import available, operand, raw, register_fake, wants_grad
from fastwm.ops._check import check_dim, check_dtype, check_same_device, check_shape
from fastwm.ops.norm import rms_silu_ref

__all__ = ["conv_pool_silu", "conv_pool_silu_ref", "pool_silu", "pool_silu_ref"]


def _check(op: str, channels: int, x: Tensor, *types: torch.dtype, **tensors: Tensor) -> None:
    """types: of x, besides the floating ones."""
    check_dim(op, "x", x, "(N, C, H, W)", 4)
    if min(x.shape[2:]) < 2:
        raise ValueError(f"{op}: expected H and W of at least 2, got {tuple(x.shape[2:])}")
    for name in ("bias", "scale"):
        check_shape(op, name, tensors[name], "(C,)", (channels,))
    for name, tensor in tensors.items():
        check_dtype(op, name, tensor)
    if x.dtype not in types:
        check_dtype(op, "x", x)
    check_same_device(op, x=x, **tensors)


def pool_silu_ref(x: Tensor, bias: Tensor, scale: Tensor, eps: float = 1e-4) -> Tensor:
    """`pool_silu` in plain PyTorch."""
    wide = x if x.dtype == torch.float64 else x.float()
    pooled = F.max_pool2d(wide, 2) + bias.to(wide.dtype)[:, None, None]
    return rms_silu_ref(pooled.permute(0, 2, 3, 1), scale, eps).permute(0, 3, 1, 2).to(x.dtype)


def pool_silu(
    x: Tensor,  # (N, C, H, W)
    bias: Tensor,  # (C,)
    scale: Tensor,  # (C,)
    eps: float = 1e-4,
) -> Tensor:  # (N, C, H/2, W/2)
    """silu(rms(max_pool2x2(x) + bias) * scale), the norm over the channels of each pixel.

    Args:
        x: (N, C, H, W) float32, bfloat16 or float16; channels_last is read as it lies.
        bias: (C,) float32, what a convolution without bias leaves out: max(x + b) = max(x) + b.
        scale: (C,) float32.
        eps: added to the mean square.
    Returns:
        (N, C, H // 2, W // 2), channels_last, in the type of x; float32 inside.
        Gradient: x, bias, scale; where several of four are largest, the first gets it.
    Raises:
        ValueError: shapes that do not fit, H or W below 2. TypeError: types or devices.
    Equivalent to:
        y = (F.max_pool2d(x.float(), 2) + bias[:, None, None]).permute(0, 2, 3, 1)
        F.silu(F.rms_norm(y, y.shape[-1:], scale, eps)).permute(0, 3, 1, 2).to(x.dtype)
    """
    _check("pool_silu", x.shape[1] if x.dim() == 4 else 0, x, bias=bias, scale=scale)
    if not available(x, "pool_silu") or x.dtype == torch.float64:
        return pool_silu_ref(x, bias, scale, eps)
    args = operand(x).permute(0, 2, 3, 1), bias.float(), scale.float(), eps
    y = _PoolSilu.apply(*args) if wants_grad(x, bias, scale) else raw.pool_silu(*args)[0]
    return y.to(x.dtype).permute(0, 3, 1, 2)


class _PoolSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, scale, eps):  # x (N, H, W, C)
        y, pooled, index = raw.pool_silu(x, bias, scale, eps)
        ctx.save_for_backward(pooled, index, scale)
        ctx.eps, ctx.size = eps, x.shape[1:3]
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        return *raw.pool_silu_backward(grad_y, *ctx.saved_tensors, ctx.eps, *ctx.size), None


def _numbers(x: Tensor, like: Tensor) -> Tensor:
    """Bytes of images as the network sees them, in [-1/2, 1/2]."""
    wide = torch.promote_types(like.dtype, torch.float32)
    return x.to(wide).div_(255.0).sub_(0.5).to(like.dtype)


def _check_conv(op: str, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> None:
    check_dim(op, "x", x, "(N, C, H, W)", 4)
    check_dim(op, "weight", weight, "(C', C, k, k)", 4)
    kernel = weight.shape[-1]
    if weight.shape[1:] != (x.shape[1], kernel, kernel) or kernel % 2 == 0:
        raise ValueError(
            f"{op}: expected weight of shape (C', C, k, k) = (C', {x.shape[1]}, k, k) with odd k, "
            f"got {tuple(weight.shape)}"
        )
    _check(op, weight.shape[0], x, torch.uint8, weight=weight, bias=bias, scale=scale)


def conv_pool_silu_ref(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, eps: float = 1e-4
) -> Tensor:
    """`conv_pool_silu` in plain PyTorch."""
    if x.dtype == torch.uint8:
        x = _numbers(x, weight)
    y = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    return pool_silu_ref(y, bias, scale, eps)


def conv_pool_silu(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C', C, k, k)
    bias: Tensor,  # (C',)
    scale: Tensor,  # (C',)
    eps: float = 1e-4,
) -> Tensor:  # (N, C', H/2, W/2)
    """A convolution with SAME zero padding, then `pool_silu`.

    Args:
        x: (N, C, H, W) float32, bfloat16 or float16, or uint8: bytes count as x / 255 - 1/2, in
            the type of weight. channels_last is the fast layout.
        weight: (C', C, k, k) of odd k. bias, scale: (C',). eps: added to the mean square.
    Returns:
        (N, C', H // 2, W // 2), channels_last, in the type of the convolution's result.
        Gradient: x, weight, bias, scale; none of bytes.
    Raises:
        ValueError: shapes that do not fit, H or W below 2. TypeError: types or devices.
    Equivalent to:
        y = F.max_pool2d(F.conv2d(x, weight, bias, padding=k // 2), 2).permute(0, 2, 3, 1)
        F.silu(F.rms_norm(y, y.shape[-1:], scale, eps)).permute(0, 3, 1, 2)
    """
    _check_conv("conv_pool_silu", x, weight, bias, scale)
    plain = x.dtype in (torch.float32, torch.uint8) and weight.dtype == torch.float32
    if plain and not torch.is_autocast_enabled(x.device.type):
        wanted, own = wants_grad(x, weight, bias, scale), _is_ours(x, weight)
        args = x.permute(0, 2, 3, 1), weight, bias.float(), scale.float(), eps
        if wanted and all(available(x, name) for name in ("pool_silu", "pool_conv_backward")):
            return _ConvPoolSilu.apply(*args, own).permute(0, 3, 1, 2)
        if own and not wanted:
            return raw.pool_conv(*args)[0].permute(0, 3, 1, 2)
    if x.dtype == torch.uint8:
        x = _numbers(x, weight)
    y = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    return pool_silu(y, bias, scale, eps)


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    """Whether our convolution runs."""
    return weight.shape[-1] == 5 and available(x, "pool_conv")


class _ConvPoolSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, eps, own):  # x (N, H, W, C)
        if own:
            y, pooled, index = raw.pool_conv(x, weight, bias, scale, eps)
        else:
            x = x if x.is_floating_point() else _numbers(x, weight)
            y = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=weight.shape[-1] // 2)
            y, pooled, index = raw.pool_silu(y.permute(0, 2, 3, 1), bias, scale, eps)
        ctx.save_for_backward(pooled, index, scale, x, weight)
        ctx.eps = eps
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        pooled, index, scale, x, weight = ctx.saved_tensors
        want_x = ctx.needs_input_grad[0]
        grad_x, *others = raw.pool_conv_backward(
            grad_y, pooled, index, scale, ctx.eps, x, weight, want_x
        )
        return grad_x if want_x else None, *others, None, None


@register_fake("pool_silu")
def _(x, bias, scale, eps):
    count, height, width, channels = x.shape
    size = (count, height // 2, width // 2, channels)
    return x.new_empty(size), x.new_empty(size), x.new_empty(size, dtype=torch.uint8)


@register_fake("pool_silu_backward")
def _(grad_y, pooled, index, scale, eps, height, width):
    grad_x = pooled.new_empty(pooled.shape[0], height, width, pooled.shape[3])
    return grad_x, scale.new_empty(scale.shape), scale.new_empty(scale.shape)


@register_fake("pool_conv")
def _(x, weight, bias, scale, eps):
    size = (x.shape[0], x.shape[1] // 2, x.shape[2] // 2, weight.shape[0])
    return *(weight.new_empty(size) for _ in range(2)), weight.new_empty(size, dtype=torch.uint8)


@register_fake("pool_conv_backward")
def _(grad_y, pooled, index, scale, eps, x, weight, want_x):
    like = [weight.new_empty(t.shape) for t in (weight, scale, scale)]
    return weight.new_empty(x.shape if want_x else 0), *like
