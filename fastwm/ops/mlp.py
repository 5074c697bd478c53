"""Dense layers in a stack, without gradient, on weights that were packed once: what acting needs.

A few rows through many small layers cost more in calls than in arithmetic; here all of it is one
call. This stem has no CUDA file: elsewhere, and where a gradient is wanted, the same layers run one
by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastwm.ops._backend import available, raw, register_fake, wants_grad
from fastwm.ops._check import check_dtype, check_same_device, check_shape
from fastwm.ops.norm import rms_silu, rms_silu_ref
from fastwm.ops.twohot import symlog

__all__ = ["PackedMLP", "mlp", "mlp_ref", "packed_mlp"]

MAX_LAYERS = 16  # more than that run one by one


def _check(op: str, weights: Sequence[Tensor], x: Tensor | None) -> None:
    if len(weights) < 2 or len(weights) % 3 == 1:
        raise ValueError(
            f"{op}: expected weights of (weight, bias, scale) per layer, the last one with or "
            f"without scale, got {len(weights)} tensors"
        )
    if x is not None and x.dim() < 1:
        raise ValueError(f"{op}: expected x of shape (..., in), got ()")
    width = None if x is None else x.shape[-1]
    for i in range(0, len(weights), 3):
        layer = weights[i : i + 3]
        if layer[0].dim() != 2 or width not in (None, layer[0].shape[1]):
            want = "in" if width is None else width
            raise ValueError(
                f"{op}: expected weights[{i}] of shape (out, {want}), got {tuple(layer[0].shape)}"
            )
        width = layer[0].shape[0]
        for j, vector in enumerate(layer[1:], i + 1):
            check_shape(op, f"weights[{j}]", vector, "(out,)", (width,))
    for i, tensor in enumerate(weights):
        check_dtype(op, f"weights[{i}]", tensor)
        check_same_device(op, **{"weights[0]": weights[0], f"weights[{i}]": tensor})


def mlp_ref(
    x: Tensor,  # (…, in)
    weights: Sequence[Tensor],
    *,
    squash: bool = False,
) -> Tensor:  # (…, out)
    """`mlp` in plain PyTorch."""
    x = symlog(x) if squash else x
    for i in range(0, len(weights), 3):
        x = F.linear(x, weights[i], weights[i + 1])
        x = rms_silu_ref(x, weights[i + 2]) if i + 2 < len(weights) else x
    return x


def mlp(
    x: Tensor,  # (…, in)
    weights: Sequence[Tensor],
    *,
    squash: bool = False,
) -> Tensor:  # (…, out)
    """Hidden layers silu(rms_norm(x W^T + b) * scale), and perhaps a linear output.

    Args:
        x: (…, in) float32.
        weights: of every layer weight (out, in), bias (out,), scale (out,); a last layer without
            scale is a linear output.
        squash: the first layer reads symlog(x).
    Returns:
        (…, out) float32. Gradient: x and weights.
    Raises:
        ValueError: shapes that do not fit. TypeError: types or devices.
    Equivalent to:
        for w, b, s in layers: x = F.silu(F.rms_norm(F.linear(x, w, b), (len(b),), s, 1e-4))
        F.linear(x, *output)
    """
    _check("mlp", weights, x)
    check_dtype("mlp", "x", x)
    check_same_device("mlp", x=x, weights=weights[0])
    if x.dtype == torch.float32 and not wants_grad(x, *weights) and _fits(weights):
        weights = [tensor.detach() for tensor in weights]
        return raw.mlp(x, raw.mlp_pack(weights), weights, squash)
    x = symlog(x) if squash else x
    for i in range(0, len(weights), 3):
        x = F.linear(x, weights[i], weights[i + 1])
        x = rms_silu(x, weights[i + 2]) if i + 2 < len(weights) else x
    return x


def _fits(weights: Sequence[Tensor]) -> bool:
    narrow = all(tensor.dtype == torch.float32 for tensor in weights)
    return narrow and available(weights[0], "mlp") and len(weights) <= 3 * MAX_LAYERS


class PackedMLP:
    """`mlp` many times with the same weights: checked and packed once.

    None of it sees later changes of the weights: make a new one. x is float32.
    """

    def __init__(self, weights: Sequence[Tensor], squash: bool = False) -> None:
        self.weights, self.squash = [tensor.detach().contiguous() for tensor in weights], squash
        self.packed = raw.mlp_pack(self.weights)

    def __call__(self, x: Tensor) -> Tensor:  # (…, in) -> (…, out)
        return raw.mlp(x, self.packed, self.weights, self.squash)


def packed_mlp(weights: Sequence[Tensor], squash: bool = False) -> PackedMLP | None:
    """None where no kernel runs; then `mlp` does it. Raises as `mlp`."""
    _check("packed_mlp", weights, None)
    return PackedMLP(weights, squash) if _fits(weights) else None


@register_fake("mlp_pack")
def _(weights):
    layers = weights[::3]
    floats = sum((w.shape[0] + 31) // 32 * 32 * w.shape[1] + 16 for w in layers)
    return weights[0].new_empty(floats + 16)


@register_fake("mlp")
def _(x, packed, weights, squash):
    return x.new_empty((*x.shape[:-1], weights[(len(weights) - 1) // 3 * 3].shape[0]))
