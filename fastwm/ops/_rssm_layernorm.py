"""The dense GRU step of 2023: one Linear over [x, deter], one LayerNorm over all three gates.

Part of the stem `rssm`. The product is the library's; norm and gates are one kernel, forward and
backward (csrc/cpu/rssm_layernorm.cpp, csrc/cuda/rssm_layernorm.cu).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastwm.ops._backend import available, raw, register_fake, wants_grad
from fastwm.ops._check import check_dim, check_dtype, check_same_device, check_shape

EPS = 1e-3  # inside the root of every LayerNorm of the 2023 networks


def gates_ref(parts: Tensor, scale: Tensor, shift: Tensor, deter: Tensor, eps: float) -> Tensor:
    """`gates` in plain PyTorch."""
    parts = F.layer_norm(parts.to(deter.dtype), parts.shape[-1:], scale, shift, eps)
    reset, cand, update = parts.chunk(3, -1)
    cand = torch.tanh(torch.sigmoid(reset) * cand)
    update = torch.sigmoid(update - 1)
    return update * cand + (1 - update) * deter


def gates(
    parts: Tensor,  # (B, 3D)
    scale: Tensor,  # (3D,)
    shift: Tensor,  # (3D,)
    deter: Tensor,  # (B, D)
    eps: float = EPS,
) -> Tensor:  # (B, D)
    """Norm and gates of a product that is there already; unchecked, float32 under autocast too."""
    with torch.autocast(deter.device.type, enabled=False):
        if deter.dtype != torch.float32 or not available(deter, "gru_layernorm"):
            return gates_ref(parts, scale, shift, deter, eps)
        args = (parts.float(), scale, shift, deter, eps)
        return _Gates.apply(*args) if wants_grad(*args[:4]) else raw.gru_layernorm(*args)


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts, scale, shift, deter, eps):
        ctx.save_for_backward(parts, scale, shift, deter)
        ctx.eps = eps
        return raw.gru_layernorm(parts, scale, shift, deter, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        parts, scale, shift, deter = raw.gru_layernorm_backward(grad, *ctx.saved_tensors, ctx.eps)
        return parts, scale, shift, deter, None


def gru_step_layernorm_ref(
    x: Tensor,  # (B, X)
    deter: Tensor,  # (B, D)
    weight: Tensor,  # (3D, X+D)
    scale: Tensor,  # (3D,)
    shift: Tensor,  # (3D,)
    eps: float = EPS,
) -> Tensor:  # (B, D)
    """Plain PyTorch form of `gru_step_layernorm`."""
    return gates_ref(F.linear(torch.cat([x, deter], -1), weight), scale, shift, deter, eps)


def gru_step_layernorm(
    x: Tensor,  # (B, X) float
    deter: Tensor,  # (B, D) float
    weight: Tensor,  # (3D, X+D) float
    scale: Tensor,  # (3D,) float
    shift: Tensor,  # (3D,) float
    eps: float = EPS,
) -> Tensor:  # (B, D)
    """One step of a GRU whose three gates share one Linear without bias and one LayerNorm.

    Args:
        x: (B, X) the step's input. deter: (B, D) the state before it.
        weight: (3D, X+D); rows are reset, candidate, update, columns are x, then deter.
        scale, shift: (3D,) gain and offset of the LayerNorm. eps: added to the variance.
    Returns:
        (B, D) in the type of the weight. Gradient: everything but eps.
    Raises:
        ValueError: shapes; TypeError: dtypes or devices.
    Equivalent to:
        y = F.layer_norm(F.linear(torch.cat([x, deter], -1), weight), (3 * D,), scale, shift, eps)
        r, c, u = y.chunk(3, -1); u = sigmoid(u - 1); u * tanh(sigmoid(r) * c) + (1 - u) * deter
    Numerics: under autocast the product runs in its dtype; norm, gates and the carry are float32.
    """
    op = "gru_step_layernorm"
    check_dim(op, "deter", deter, "(B, D)", 2)
    check_dim(op, "x", x, "(B, X)", 2)
    (batch, size), inputs = deter.shape, x.shape[1]
    check_shape(op, "x", x, "(B, X)", (batch, inputs))
    check_shape(op, "weight", weight, "(3D, X+D)", (3 * size, inputs + size))
    check_shape(op, "scale", scale, "(3D,)", (3 * size,))
    check_shape(op, "shift", shift, "(3D,)", (3 * size,))
    for name, tensor in (("x", x), ("deter", deter), ("scale", scale), ("shift", shift)):
        check_dtype(op, name, tensor)
        check_same_device(op, weight=weight, **{name: tensor})
    check_dtype(op, "weight", weight)
    x, deter, scale, shift = (t.to(weight.dtype) for t in (x, deter, scale, shift))
    return gates(F.linear(torch.cat([x, deter], -1), weight), scale, shift, deter, eps)


@register_fake("gru_layernorm")
def _(parts, scale, shift, deter, eps):
    return deter.new_empty(deter.shape)


@register_fake("gru_layernorm_backward")
def _(grad, parts, scale, shift, deter, eps):
    like = (parts, scale, shift, deter)
    out = [x.new_empty(x.shape) for x in like]
    return out[0], out[1], out[2], out[3]
