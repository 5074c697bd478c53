"""Nearest-neighbour upsampling by two followed by a 5x5 SAME convolution, without upsampling.

Each of the four output phases (row parity, column parity) of that pair sees only 3x3 distinct
input pixels, so the pair equals one 3x3 convolution to four times the channels and a pixel
shuffle: 2.8 times fewer multiplications, a quarter of the input bytes, the same result.
On the CPU the phases share their products in a kernel of ours (docs/kernels.md). This stem has no
CUDA file: there the convolution is the library's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastwm.ops._backend import available, raw, register_fake, wants_grad
from fastwm.ops._check import check_dtype, check_shape
from fastwm.ops.norm import rms_silu, rms_silu_ref

__all__ = [
    "upsample_conv2d", "upsample_conv2d_ref", "upsample_conv2d_silu", "upsample_conv2d_silu_ref",
]  # fmt: skip


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, op: str = "upsample_conv2d") -> None:
    if x.dim() != 4:
        raise ValueError(f"{op}: expected x of shape (N, C, H, W), got {tuple(x.shape)}")
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (x.shape[1], 5, 5):
        raise ValueError(
            f"{op}: expected weight of shape (C', C, 5, 5) = "
            f"(C', {x.shape[1]}, 5, 5), got {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"{op}: expected bias of shape (C',) = ({weight.shape[0]},), got {tuple(bias.shape)}"
        )


def upsample_conv2d_ref(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C', C, 5, 5)
    bias: Tensor | None = None,  # (C',)
) -> Tensor:  # (N, C', 2H, 2W)
    """`upsample_conv2d` said literally: upsample, then convolve."""
    _check(x, weight, bias)
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=2)


def _phase_map(like: Tensor) -> Tensor:  # (2, 3, 5)
    """1 where tap u of phase a falls on input offset d; made on the device: graphs can hold it."""
    # Output row 2i + phase reads upsampled rows 2i + phase + tap - 2, which is input row
    # i + floor((phase + tap - 2) / 2), and input offset d is row i - 1 + d.
    tap, offset, phase = (torch.arange(n, device=like.device) for n in (5, 3, 2))
    falls_on = (phase[:, None] + tap - 2).div(2, rounding_mode="floor") + 1
    return (falls_on[:, None] == offset[:, None]).to(like.dtype)


def phase_weight(weight: Tensor) -> Tensor:  # (C', C, 5, 5) -> (4C', C, 3, 3)
    """The 3x3 kernels of the four phases: row parity, column parity, C'."""
    fold = _phase_map(weight)
    phases = torch.einsum("adu,bev,ocuv->abocde", fold, fold, weight)
    return phases.reshape(4 * weight.shape[0], weight.shape[1], 3, 3)


def upsample_conv2d(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C', C, 5, 5)
    bias: Tensor | None = None,  # (C',)
) -> Tensor:  # (N, C', 2H, 2W)
    """Nearest-neighbour upsampling by two, then a 5x5 convolution with SAME zero padding.

    Args:
        x: (N, C, H, W), contiguous or channels_last.
        weight: (C', C, 5, 5).
        bias: (C',) or None.
    Returns:
        (N, C', 2H, 2W) in the type of the inputs. Gradient: x, weight, bias.
    Raises:
        ValueError: shapes that do not fit.
    Equivalent to:
        F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=2)
    """
    _check(x, weight, bias)
    if x.numel() == 0 or weight.numel() == 0:  # no sizes to infer
        return upsample_conv2d_ref(x, weight, bias)
    if _has_kernel("upsample_conv2d", x, weight, bias):
        args = x.permute(0, 2, 3, 1), weight, bias
        y = _Upconv.apply(*args) if wants_grad(*args) else raw.upsample_conv2d(*args)
        return y.permute(0, 3, 1, 2)
    return _by_library(x, weight, bias)


def _has_kernel(op: str, *tensors: Tensor | None) -> bool:
    """Whether our kernel takes these: float32 on the CPU, outside of autocast."""
    device = tensors[0].device
    plain = all(t is None or (t.dtype == torch.float32 and t.device == device) for t in tensors)
    plain = plain and not torch.is_autocast_enabled(device.type)
    return plain and available(device, op)


class _Upconv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):  # x (N, H, W, C)
        ctx.save_for_backward(x, weight)
        return raw.upsample_conv2d(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        want_x, *want = ctx.needs_input_grad
        grads = raw.upsample_conv2d_backward(grad_y, *ctx.saved_tensors, want_x, any(want))
        return tuple(g if w else None for g, w in zip(grads, (want_x, *want), strict=True))


def _by_library(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    phase_bias = None if bias is None else bias.repeat(4)
    y = F.conv2d(x, phase_weight(weight), phase_bias, padding=1)
    count, _, height, width = y.shape
    size = (count, 2 * height, 2 * width, weight.shape[0])
    if y.is_contiguous(memory_format=torch.channels_last):
        # Channels-last two neighbours of a row lie together: half of the library's pixel_shuffle.
        rows = y.permute(0, 2, 3, 1).unflatten(-1, (2, -1)).transpose(2, 3)  # (N, H, 2, W, 2C')
        return rows.reshape(size).permute(0, 3, 1, 2)
    phases = y.unflatten(1, (2, 2, -1)).permute(0, 3, 4, 1, 5, 2)  # (N, C', H, 2, W, 2)
    return phases.reshape(count, -1, *size[1:3])


def upsample_conv2d_silu_ref(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, eps: float = 1e-4
) -> Tensor:
    """`upsample_conv2d_silu` in plain PyTorch."""
    y = upsample_conv2d_ref(x, weight, bias)
    return rms_silu_ref(y.permute(0, 2, 3, 1), scale, eps).permute(0, 3, 1, 2)


def upsample_conv2d_silu(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C', C, 5, 5)
    bias: Tensor,  # (C',)
    scale: Tensor,  # (C',)
    eps: float = 1e-4,
) -> Tensor:  # (N, C', 2H, 2W)
    """`upsample_conv2d`, then silu(rms(y) * scale), the norm over the channels of each pixel.

    Args:
        x: (N, C, H, W) of a floating type, contiguous or channels_last.
        weight: (C', C, 5, 5). bias, scale: (C',). eps: added to the mean square.
    Returns:
        (N, C', 2H, 2W), channels_last, in the type of the convolution's result.
        Gradient: x, weight, bias, scale.
    Raises:
        ValueError: shapes that do not fit. TypeError: types.
    Equivalent to:
        y = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=2)
        F.silu(F.rms_norm(y.permute(0, 2, 3, 1), scale.shape, scale, eps)).permute(0, 3, 1, 2)
    """
    op = "upsample_conv2d_silu"
    _check(x, weight, bias, op)
    check_shape(op, "scale", scale, "(C',)", tuple(weight.shape[:1]))
    check_dtype(op, "scale", scale)
    if x.numel() == 0 or weight.numel() == 0 or not _has_kernel(op, x, weight, bias, scale):
        y = upsample_conv2d(x, weight, bias)
        return rms_silu(y.permute(0, 2, 3, 1), scale, eps).permute(0, 3, 1, 2)
    args = x.permute(0, 2, 3, 1), weight, bias, scale, eps
    record = wants_grad(x, weight, bias, scale)
    y = _UpconvSilu.apply(*args) if record else raw.upsample_conv2d_silu(*args, False)[0]
    return y.permute(0, 3, 1, 2)


class _UpconvSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, eps):  # x (N, H, W, C)
        z, y = raw.upsample_conv2d_silu(x, weight, bias, scale, eps, True)
        ctx.save_for_backward(y, scale, x, weight)
        ctx.eps = eps
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_z):
        y, scale, x, weight = ctx.saved_tensors
        want_x = ctx.needs_input_grad[0]
        grad_x, *others = raw.upsample_conv2d_silu_backward(
            grad_z, y, scale, ctx.eps, x, weight, want_x
        )
        return grad_x if want_x else None, *others, None


@register_fake("upsample_conv2d")
def _(x, weight, bias):
    return x.new_empty(x.shape[0], 2 * x.shape[1], 2 * x.shape[2], weight.shape[0])


@register_fake("upsample_conv2d_backward")
def _(grad_y, x, weight, want_x, want_weight):
    grad_x = x.new_empty(x.shape if want_x else 0)
    sizes = (weight.shape, weight.shape[:1]) if want_weight else (0, 0)
    return grad_x, *(weight.new_empty(size) for size in sizes)


@register_fake("upsample_conv2d_silu")
def _(x, weight, bias, scale, eps, save):
    size = x.shape[0], 2 * x.shape[1], 2 * x.shape[2], weight.shape[0]
    return x.new_empty(size), x.new_empty(size if save else 0)


@register_fake("upsample_conv2d_silu_backward")
def _(grad_z, y, scale, eps, x, weight, want_x):
    like = [weight.new_empty(t.shape) for t in (weight, scale, scale)]
    return x.new_empty(x.shape if want_x else 0), *like
