"""Distributions that the heads predict. Noise comes in as an argument; None means the mode."""

from __future__ import annotations

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fastwm import ops


class MultiCategorical:
    """One categorical per action element, mixed with `unimix` of the uniform distribution.

    logits: (..., A) with A = sum(classes). Samples are concatenated one-hots (..., A).
    """

    def __init__(self, logits: Tensor, classes: tuple[int, ...], unimix: float) -> None:
        self.classes, self.unimix = classes, unimix
        self.logits = logits.split(classes, -1)

    @cached_property
    def log_probs(self) -> list[Tensor]:
        """Log of the mixed probabilities, one (..., classes[i]) per element."""
        if self.unimix == 0.0:
            return [F.log_softmax(part, -1) for part in self.logits]
        mixed = [
            (1.0 - self.unimix) * F.softmax(part, -1) + self.unimix / part.shape[-1]
            for part in self.logits
        ]
        return [part.log() for part in mixed]

    def sample(self, noise: Tensor | None) -> Tensor:  # (..., len(classes)) uniform -> (..., A)
        parts = []
        for i, part in enumerate(self.logits):
            u = None if noise is None else noise[..., i : i + 1]
            logits = part.detach().unsqueeze(-2)
            index, _ = ops.latent_sample(logits, u, self.unimix)
            hot = ops.straight_through(index, logits, self.unimix)  # without gradient: one-hot
            parts.append(hot.squeeze(-2).to(part.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def log_prob(self, action: Tensor) -> Tensor:  # (..., A) -> (...)
        return (action * torch.cat(self.log_probs, -1)).sum(-1)

    def entropy(self) -> Tensor:  # (...)
        return torch.stack([-(lp.exp() * lp).sum(-1) for lp in self.log_probs]).sum(0)

    def max_entropy(self) -> float:
        return sum(math.log(n) for n in self.classes)


class BoundedNormal:
    """Independent normals with tanh mean and a standard deviation between `low` and `high`.

    raw_mean, raw_std: (..., A). Samples are not squashed; the environment clips them.
    """

    def __init__(self, raw_mean: Tensor, raw_std: Tensor, low: float, high: float) -> None:
        self.mean = torch.tanh(raw_mean)
        self.std = (high - low) * torch.sigmoid(raw_std + 2.0) + low

    def sample(self, noise: Tensor | None) -> Tensor:  # (..., A) standard normal -> (..., A)
        return self.mean if noise is None else self.mean + self.std * noise

    def log_prob(self, action: Tensor) -> Tensor:  # (..., A) -> (...)
        z = (action - self.mean) / self.std
        return (-0.5 * z * z - self.std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:  # (...)
        return (self.std.log() + 0.5 * math.log(2 * math.pi) + 0.5).sum(-1)

    def max_entropy(self) -> None:
        """Unbounded over the reals, so there is no share of the maximum to report."""


def bernoulli_loss(logit: Tensor, target: Tensor) -> Tensor:  # (...), (...) in [0, 1] -> (...)
    """Cross entropy of a soft binary target."""
    return F.binary_cross_entropy_with_logits(logit, target, reduction="none")


def symlog_mse(pred: Tensor, target: Tensor, dims: int) -> Tensor:  # (..., *shape) x2 -> (...)
    """Squared error in symlog space, summed over the last `dims` dimensions."""
    error = (pred - ops.symlog(target.float())).square()
    return error.sum(tuple(range(-dims, 0))) if dims else error


def image_mse(pred: Tensor, image: Tensor) -> Tensor:  # (..., H, W, C) in [0, 1], uint8 -> (...)
    """Squared error against image/255, summed over pixels and channels."""
    return (pred - image.float() / 255.0).square().sum((-3, -2, -1))


def multi_categorical_loss(logits: Tensor, index: Tensor, classes: tuple[int, ...]) -> Tensor:
    """Cross entropy summed over elements; logits (..., sum(classes)), index (..., *shape)."""
    index = index.reshape(*logits.shape[:-1], len(classes)).long()
    total = logits.new_zeros(logits.shape[:-1])
    for i, part in enumerate(logits.split(classes, -1)):
        log_probs = F.log_softmax(part, -1)
        total = total - log_probs.gather(-1, index[..., i : i + 1]).squeeze(-1)
    return total
