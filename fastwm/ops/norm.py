"""RMSNorm and SiLU in one: what follows every Linear of DreamerV3. Letters: U features."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rms_silu", "rms_silu_ref"]


def _check(x: Tensor, scale: Tensor) -> None:
    if x.dim() < 1 or scale.dim() != 1 or x.shape[-1] != scale.shape[0]:
        raise ValueError(
            f"rms_silu: expected x of shape (..., U) and scale of shape (U,), "
            f"got {tuple(x.shape)} and {tuple(scale.shape)}"
        )


def rms_silu_ref(x: Tensor, scale: Tensor, eps: float = 1e-4) -> Tensor:  # (…,U), (U,) -> (…,U)
    """`rms_silu` in plain PyTorch."""
    _check(x, scale)
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
        ValueError: shapes that do not fit.
    Equivalent to:
        F.silu(F.rms_norm(x.float(), x.shape[-1:], scale, eps)).to(x.dtype)
    """
    return rms_silu_ref(x, scale, eps)
