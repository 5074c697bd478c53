"""The reconstruction loss of images, from what the decoder's last convolution gives.

This stem has no CUDA file: a GPU runs the reference, which torch.compile fuses there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastwm.ops._backend import available, raw, register_fake, wants_grad
from fastwm.ops._check import check_dtype, check_same_device, check_shape

__all__ = ["image_loss", "image_loss_ref"]


def image_loss_ref(logits: Tensor, target: Tensor) -> Tensor:  # (…,H,W,C) x2 -> (…)
    """`image_loss` in plain PyTorch."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    error = torch.sigmoid(wide) - target.to(wide.dtype) / 255.0
    return error.square().sum((-3, -2, -1))


def image_loss(logits: Tensor, target: Tensor) -> Tensor:  # (…,H,W,C) x2 -> (…)
    """sum (sigmoid(logits) - target / 255)^2 over the pixels and channels of each image.

    Args:
        logits: (…, H, W, C) float32, bfloat16 or float16; float32 inside.
        target: (…, H, W, C) uint8.
    Returns:
        (…) float32. Gradient: logits.
    Raises:
        ValueError: shapes that do not fit. TypeError: types or devices.
    Equivalent to:
        (torch.sigmoid(logits.float()) - target.float() / 255).square().sum((-3, -2, -1))
    """
    if logits.dim() < 3:
        raise ValueError(
            f"image_loss: expected logits of shape (..., H, W, C), got {tuple(logits.shape)}"
        )
    check_dtype("image_loss", "logits", logits)
    check_dtype("image_loss", "target", target, torch.uint8)
    check_shape("image_loss", "target", target, "(..., H, W, C)", tuple(logits.shape))
    check_same_device("image_loss", logits=logits, target=target)
    if not available(logits, "image_loss") or logits.dtype == torch.float64:
        return image_loss_ref(logits, target)
    lead, size = logits.shape[:-3], logits.shape[-3:]
    args = logits.float().reshape(lead.numel(), *size), target.reshape(lead.numel(), *size)
    loss = _ImageLoss.apply(*args) if wants_grad(logits) else raw.image_loss(*args)
    return loss.reshape(lead)


class _ImageLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target):
        ctx.save_for_backward(logits, target)
        return raw.image_loss(logits, target)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        return raw.image_loss_backward(grad_loss, *ctx.saved_tensors), None


@register_fake("image_loss")
def _(logits, target):
    return logits.new_empty(logits.shape[0])


@register_fake("image_loss_backward")
def _(grad_loss, logits, target):
    return logits.new_empty(logits.shape)
