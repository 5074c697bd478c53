"""Policies of the modular recipe: distributions over actions with gradients through the sample.

Noise comes in as an argument, so that a run repeats exactly; None means the mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastwm.distributions import BoundedNormal, MultiCategorical
from fastwm.spaces import Space
from fastwm.worldmodels.modular_parts import Dense


class GumbelCategorical(MultiCategorical):
    """One categorical per action element; samples are concatenated one-hots (..., A)."""

    def sample(self, noise: Tensor | None) -> Tensor:  # (..., A) uniform -> (..., A)
        scores = [part.detach() for part in self.log_probs]
        if noise is not None:
            gumbels = gumbel(noise).split(self.classes, -1)
            scores = [part + more for part, more in zip(scores, gumbels, strict=True)]
        return torch.cat([one_hot_of_max(part) for part in scores], -1)

    def rsample(self, noise: Tensor, tau: float, hard: bool) -> Tensor:  # (..., A) -> (..., A)
        """softmax((log p + gumbel) / tau), as one-hot in the forward pass where `hard`."""
        parts = []
        gumbels = gumbel(noise).split(self.classes, -1)
        for logits, more in zip(self.log_probs, gumbels, strict=True):
            soft = F.softmax((logits + more) / tau, -1)
            parts.append(one_hot_of_max(soft.detach()) - soft.detach() + soft if hard else soft)
        return torch.cat(parts, -1)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform noise in [0, 1)."""
    tiny = torch.finfo(uniform.dtype).tiny
    return -torch.log(-torch.log(uniform.clamp(tiny, 1.0 - 2.0**-24)))


def one_hot_of_max(scores: Tensor) -> Tensor:
    return F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype)


class CategoricalPolicy(nn.Module):
    """Discrete actions. unimix: share of the uniform distribution in every categorical."""

    def __init__(
        self,
        state_size: int,
        act_space: Space,
        *,
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
        unimix: float = 0.0,
    ) -> None:
        super().__init__()
        if act_space.kind != "discrete":
            raise ValueError(
                f"CategoricalPolicy: expected discrete actions, got {act_space.kind}; "
                "use --policy.name tanh_normal"
            )
        self.space, self.unimix = act_space, unimix
        self.net = Dense(state_size, hidden, act_space.encoded_size, activation, 0.01)

    def forward(self, state: Tensor) -> GumbelCategorical:
        return GumbelCategorical(self.net(state), self.space.classes, self.unimix)

    def noise(self, lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Uniform noise (*lead, A)."""
        size = self.space.encoded_size
        return torch.rand(*lead, size, generator=generator, device=generator.device)

    def to_env(self, action: Tensor) -> Tensor:  # (N, A) -> (N, *shape)
        parts = [part.argmax(-1) for part in action.split(self.space.classes, -1)]
        return torch.stack(parts, -1).reshape(-1, *self.space.shape).to(torch.int32)


class ReparameterizedNormal(BoundedNormal):
    """Independent normals with tanh mean; a sample is differentiable in mean and spread."""

    def rsample(self, noise: Tensor, tau: float, hard: bool) -> Tensor:
        return self.sample(noise)


class TanhNormalPolicy(nn.Module):
    """Continuous actions: a normal whose mean is scaled to [-1, 1] by tanh."""

    def __init__(
        self,
        state_size: int,
        act_space: Space,
        *,
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
        min_std: float = 0.1,
        max_std: float = 1.0,
    ) -> None:
        super().__init__()
        if act_space.kind == "discrete":
            raise ValueError(
                "TanhNormalPolicy: expected continuous actions, got discrete ones; "
                "use --policy.name categorical"
            )
        self.space, self.std_range = act_space, (min_std, max_std)
        self.net = Dense(state_size, hidden, 2 * act_space.encoded_size, activation, 0.01)

    def forward(self, state: Tensor) -> ReparameterizedNormal:
        mean, std = self.net(state).chunk(2, -1)
        return ReparameterizedNormal(mean, std, *self.std_range)

    def noise(self, lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Normal noise (*lead, A)."""
        size = self.space.encoded_size
        return torch.randn(*lead, size, generator=generator, device=generator.device)

    def to_env(self, action: Tensor) -> Tensor:  # (N, A) -> (N, A)
        return action
