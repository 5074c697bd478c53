"""RMSNorm and SiLU in one: what follows every Linear of DreamerV3. Letters: U features.

CUDA kernels read and write bfloat16 themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastwm.ops._backend import available, operand, raw, register_fake, wants_grad
from fastwm.ops._check import check_dtype, check_same_device, check_shape

__all__ = ["rms_silu", "rms_silu_ref"]


def _check(x: Tensor, scale: Tensor) -> None:
    if x.dim() < 1:
        raise ValueError("rms_silu: expected x of shape (..., U), got ()")
    check_shape("rms_silu", "scale", scale, "(U,)", tuple(x.shape[-1:]))
    check_dtype("rms_silu", "x", x)
    check_dtype("rms_silu", "scale", scale)
    check_same_device("rms_silu", x=x, scale=scale)


def rms_silu_ref(x: Tensor, scale: Tensor, eps: float = 1e-4) -> Tensor:  # (…,U), (U,) -> (…,U)
    """`rms_silu` in plain PyTorch."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return torch.nn.functional.silu(normed * scale.to(wide.dtype)).to(x.dtype)


def rms_silu(x: Tensor, scale: Tensor, eps: float = 1e-4) -> Tensor:  # (…,U), (U,) -> (…,U)
    """silu(x * rsqrt(mean(x^2) + eps) * scale), the mean over the last dimension.

    Args:
        x: (…, U) float32, bfloat16 or float16; float32 inside, the result has the type of x.
        scale: (U,) float32.
        eps: added to the mean square.
    Returns:
        (…, U) in the type of x. Gradient: x, scale.
    Raises:
        ValueError: shapes that do not fit. TypeError: types or devices.
    Equivalent to:
        F.silu(F.rms_norm(x.float(), x.shape[-1:], scale, eps)).to(x.dtype)
    """
    _check(x, scale)
    if not available(x, "rms_silu") or x.dtype == torch.float64:
        return rms_silu_ref(x, scale, eps)
    x_in, gain = operand(x), scale.float()
    if wants_grad(x, scale):
        return _RmsSilu.apply(x_in, gain, eps).to(x.dtype)
    return raw.rms_silu(x_in, gain, eps).to(x.dtype)


class _RmsSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, eps):
        ctx.save_for_backward(x, scale)
        ctx.eps = eps
        return raw.rms_silu(x, scale, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        return *raw.rms_silu_backward(grad_y, *ctx.saved_tensors, ctx.eps), None


@register_fake("rms_silu")
def _(x, scale, eps):
    return x.new_empty(x.shape)


@register_fake("rms_silu_backward")
def _(grad_y, x, scale, eps):
    return x.new_empty(x.shape), scale.new_empty(scale.shape)
