"""Logits of a two-hot head by what they are made of; see fastwm/ops/twohot.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastwm.ops._backend import available, raw, wants_grad
from fastwm.ops._check import check_dtype, check_same_device, check_shape

MAX_BINS = 1024  # more than that run on the reference


class LinearLogits:
    """The logits x W^T + b of a two-hot head, as `twohot_mean` and `twohot_loss` take them.

    They are four times as wide as x. On a CPU a few rows of them at a time pass through product and
    mean, and their gradient through both products of the backward pass: it is never written.
    Elsewhere they are F.linear(x, weight, bias).

    Args:
        x: (…, U), the last hidden layer. weight: (V, U). bias: (V,). float32 for the kernels.
    Raises:
        ValueError: shapes that do not fit. TypeError: types or devices.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor) -> None:
        who, tensors = "LinearLogits", {"x": x, "weight": weight, "bias": bias}
        if x.dim() < 1:
            raise ValueError(f"{who}: expected x of shape (..., U), got ()")
        check_shape(who, "weight", weight, "(V, U)", (*weight.shape[:1], x.shape[-1]))
        check_shape(who, "bias", bias, "(V,)", (weight.shape[0],))
        for name, tensor in tensors.items():
            check_dtype(who, name, tensor)
        check_same_device(who, **tensors)
        self.x, self.weight, self.bias = x, weight, bias
        self._known: tuple[Tensor, tuple] | None = None  # without gradient, and of which weights
        self._tensor: Tensor | None = None

    def tensor(self) -> Tensor:  # (…, V)
        """All of them, with gradient to x, weight and bias; one product however often."""
        if self._tensor is None:
            with torch.enable_grad():  # a mean without gradient may ask first
                self._tensor = F.linear(self.x, self.weight, self.bias)
        return self._tensor if torch.is_grad_enabled() else self._tensor.detach()

    def fused(self) -> bool:
        """Whether the kernels take them."""
        parts = self.x, self.weight, self.bias
        narrow = all(part.dtype == torch.float32 for part in parts)
        low = torch.is_autocast_enabled(self.x.device.type)
        sizes = 1 <= self.weight.shape[0] <= MAX_BINS and self.weight.shape[1] >= 1
        kernels = ("twohot_linear", "twohot_loss", "twohot_linear_backward")
        return narrow and not low and sizes and all(available(self.x, name) for name in kernels)

    def wants_grad(self) -> bool:
        return wants_grad(self.x, self.weight, self.bias)

    def mean(self, bins: Tensor) -> Tensor:  # (…)
        """The mean over bins (V,), no gradient; keeps the logits for a loss that follows."""
        logits, mean = raw.twohot_linear(*(part.detach() for part in self._parts()), bins)
        self._known = logits, self._versions()
        return mean

    def known(self, bins: Tensor) -> Tensor:  # (…, V)
        """The logits without gradient, made again where x or a weight has changed since."""
        if self._known is None or self._known[1] != self._versions():
            self.mean(bins)
        return self._known[0]

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.weight, self.bias

    def _versions(self) -> tuple:
        if torch.compiler.is_compiling():
            return ()
        mode = torch.is_inference_mode_enabled()  # such logits are of no use to a gradient
        return mode, *(None if part.is_inference() else part._version for part in self._parts())
