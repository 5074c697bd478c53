"""Dense layers in a stack, without gradient, on weights that were packed once: what acting needs.
And a layer that reads one-hots, which looks its weights up.

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
from fastwm.ops._check import check_dim, check_dtype, check_same_device, check_shape
from fastwm.ops.norm import rms_silu, rms_silu_ref
from fastwm.ops.twohot import symlog

__all__ = [
    "PackedMLP",
    "SparseLinear",
    "mlp",
    "mlp_ref",
    "packed_mlp",
    "sparse_linear",
    "sparse_linear_ref",
    "sparse_weight_grad",
]

MAX_LAYERS = 16  # more than that run one by one
SPARSE_INPUTS = 256  # of fewer one-hots a product makes the gradient of the weight sooner


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


def _check_sparse(x: Tensor | None, weight: Tensor, bias: Tensor) -> None:
    who = "sparse_linear"
    check_dim(who, "weight", weight, "(out, in)", 2)
    check_shape(who, "bias", bias, "(out,)", weight.shape[:1])
    tensors = {"weight": weight, "bias": bias}
    if x is not None:
        check_shape(who, "x", x, "(..., in)", (*x.shape[:-1], weight.shape[1]))
        tensors["x"] = x
    for name, tensor in tensors.items():
        check_dtype(who, name, tensor)
    check_same_device(who, **tensors)


def sparse_linear_ref(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`sparse_linear` in plain PyTorch."""
    return F.linear(x, weight, bias)


def sparse_linear(
    x: Tensor,  # (…, in)
    weight: Tensor,  # (out, in)
    bias: Tensor,  # (out,)
) -> Tensor:  # (…, out)
    """x W^T + b where nearly all of x is zero, as in one-hots: adds up weights that it looks up.

    Right for any x and finite weights, but slower than a product where most of x is not zero.

    Args:
        x: (…, in). weight: (out, in). bias: (out,). float32 for the kernel.
    Returns:
        (…, out). Gradient: x, weight, bias; that of the weight is added up row by row as well.
    Raises:
        ValueError: shapes that do not fit. TypeError: types or devices.
    Equivalent to:
        F.linear(x, weight, bias)
    """
    _check_sparse(x, weight, bias)
    low = torch.is_autocast_enabled(x.device.type)
    if x.dtype != torch.float32 or low or not _fits_sparse(weight, bias):
        return F.linear(x, weight, bias)
    if wants_grad(x, weight, bias):
        return _SparseLinear.apply(x, weight, bias)
    return SparseLinear(weight, bias)(x)


def _fits_sparse(weight: Tensor, bias: Tensor) -> bool:
    narrow = weight.dtype == bias.dtype == torch.float32
    kernels = available(weight, "sparse_linear") and available(weight, "sparse_linear_backward")
    return narrow and kernels and weight.numel() > 0


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return SparseLinear(weight, bias)(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        rows = grad_y.flatten(0, -2) if grad_y.dim() > 1 else grad_y.unsqueeze(0)
        grad_x = grad_y @ weight if ctx.needs_input_grad[0] else None
        grad_weight = raw.sparse_linear_backward(rows, x.reshape(len(rows), x.shape[-1]))
        return grad_x, grad_weight, rows.sum(0)


class SparseLinear:
    """`sparse_linear` many times with the same weights, which are regrouped once; no gradient.

    It does not see later changes of the weights: make a new one. Where no kernel runs, it is the
    product.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        _check_sparse(None, weight, bias)
        self.weight, self.bias = weight.detach().clone(), bias.detach().clone()
        fits = _fits_sparse(weight, bias) and not torch.is_autocast_enabled(weight.device.type)
        self.packed = raw.sparse_linear_pack(self.weight) if fits else None

    def __call__(self, x: Tensor) -> Tensor:  # (…, in) -> (…, out)
        check_shape("sparse_linear", "x", x, "(..., in)", (*x.shape[:-1], self.weight.shape[1]))
        if self.packed is None or x.dtype != torch.float32:
            return F.linear(x, self.weight, self.bias)
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y = raw.sparse_linear(rows, self.packed, self.bias)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def sparse_weight_grad(
    grad_y: Tensor,  # (N, out)
    x: Tensor,  # (N, in)
    one_hots: int,
) -> Tensor:  # (out, in)
    """grad_y^T x, where nearly all of the last `one_hots` columns of x is zero.

    These are added up row by row where that is faster than a product. No gradient.
    """
    fits = grad_y.dtype == x.dtype == torch.float32 and one_hots >= SPARSE_INPUTS
    # Turned: the library shares the wider side out among threads (16384 x 64 and 640: a sixth).
    if not fits or not available(x, "sparse_linear_backward"):
        return (x.t() @ grad_y).t().contiguous()
    dense = x.shape[1] - one_hots
    grad = x.new_empty(grad_y.shape[1], x.shape[1])
    grad[:, :dense] = (x[:, :dense].t() @ grad_y).t()
    grad[:, dense:] = raw.sparse_linear_backward(grad_y, x[:, dense:])
    return grad


@register_fake("sparse_linear_backward")
def _(grad_y, x):
    return x.new_empty(grad_y.shape[1], x.shape[1])


@register_fake("sparse_linear_pack")
def _(weight):
    return weight.new_empty(weight.shape[1] * ((weight.shape[0] + 63) // 64 * 64) + 16)


@register_fake("sparse_linear")
def _(x, packed, bias):
    return x.new_empty(x.shape[0], bias.shape[0])


@register_fake("mlp_pack")
def _(weights):
    layers = weights[::3]
    floats = sum((w.shape[0] + 31) // 32 * 32 * w.shape[1] + 16 for w in layers)
    return weights[0].new_empty(floats + 16)


@register_fake("mlp")
def _(x, packed, weights, squash):
    return x.new_empty((*x.shape[:-1], weights[(len(weights) - 1) // 3 * 3].shape[0]))
