"""The components that come with the modular recipe.

What each slot must offer stands in `modular_components`. All work on any leading dimensions (...),
usually (B, T); observations arrive as floats (see `Prepare` there).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

from fastwm.nets import head_name, split_keys
from fastwm.spaces import Space

ACTIVATIONS = {"relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class Dense(nn.Sequential):
    """Linear layers of the widths `hidden` with an activation after each, then a linear output.

    outputs None leaves the last one out. Weights are orthogonal, biases zero; gain: of the output.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int] | int,
        outputs: int | None,
        activation: str = "relu",
        gain: float = 1.0,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"Dense: expected activation to be one of {tuple(ACTIVATIONS)}, got {activation!r}"
            )
        layers: list[nn.Module] = []
        for width in widths(hidden):
            layers += [_linear(inputs, width, 2**0.5), ACTIVATIONS[activation]()]
            inputs = width
        if outputs is not None:
            layers.append(_linear(inputs, outputs, gain))
        super().__init__(*layers)
        self.out_features = inputs if outputs is None else outputs


def widths(hidden: Any) -> list[int]:
    """Layer widths from what a configuration holds: a number, a list, or text like 64,64."""
    if isinstance(hidden, str):
        hidden = hidden.split(",")
    try:
        found = [int(width) for width in (hidden if isinstance(hidden, Sequence) else (hidden,))]
    except (TypeError, ValueError):
        found = [0]
    if any(width < 1 for width in found):
        raise ValueError(
            f"hidden: expected positive widths like 64,64, got {hidden!r}; one number per layer"
        )
    return found


def _linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


# ---- observations to features, and back


class VectorEncoder(nn.Module):
    """Every observation flattened and concatenated, through dense layers."""

    def __init__(
        self,
        obs_space: dict[str, Space],
        *,
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.space = dict(obs_space)
        inputs = sum(space.encoded_size for space in obs_space.values())
        self.net = Dense(inputs, hidden, None, activation)
        self.out_features = self.net.out_features

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        flat = []
        for name, space in self.space.items():
            dims = 1 if space.kind == "discrete" else len(space.shape)
            x = obs[name]
            flat.append(x.flatten(-dims) if dims else x.unsqueeze(-1))
        return self.net(torch.cat(flat, -1))


class ConvEncoder(nn.Module):
    """Images through strided convolutions (kernel 4, stride 2), the rest through dense layers."""

    def __init__(
        self,
        obs_space: dict[str, Space],
        *,
        depths: Sequence[int] = (32, 64, 128, 256),
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.images, vectors = split_keys(obs_space)
        height, width, channels = _image_shape("ConvEncoder", obs_space, self.images, len(depths))
        widths = [channels, *depths]
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 4, 2, 1) for i, o in zip(widths, widths[1:], strict=False)
        )
        self.activation = ACTIVATIONS[activation]()
        self.out_features = (height >> len(depths)) * (width >> len(depths)) * widths[-1]
        self.vectors = None
        if vectors:
            spaces = {name: obs_space[name] for name in vectors}
            self.vectors = VectorEncoder(spaces, hidden=hidden, activation=activation)
            self.out_features += self.vectors.out_features

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        x = torch.cat([obs[name] for name in self.images], -1)  # (..., H, W, C)
        lead = x.shape[:-3]
        x = x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2) - 0.5
        for conv in self.convs:
            x = self.activation(conv(x))
        x = x.reshape(*lead, -1)
        return x if self.vectors is None else torch.cat([x, self.vectors(obs)], -1)


class VectorDecoder(nn.Module):
    """One dense trunk and a linear output per observation, in the observation's shape."""

    def __init__(
        self,
        obs_space: dict[str, Space],
        state_size: int,
        *,
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.shapes = {
            name: (space.encoded_size,) if space.kind == "discrete" else space.shape
            for name, space in obs_space.items()
        }
        self.trunk = Dense(state_size, hidden, None, activation)
        self.heads = nn.ModuleDict(
            {
                head_name(name): _linear(self.trunk.out_features, prod(shape), 1.0)
                for name, shape in self.shapes.items()
            }
        )

    def forward(self, state: Tensor) -> dict[str, Tensor]:
        x, lead = self.trunk(state), state.shape[:-1]
        return {
            name: self.heads[head_name(name)](x).reshape(*lead, *shape)
            for name, shape in self.shapes.items()
        }


class ConvDecoder(nn.Module):
    """Images from transposed convolutions (kernel 4, stride 2), the rest from dense layers."""

    def __init__(
        self,
        obs_space: dict[str, Space],
        state_size: int,
        *,
        depths: Sequence[int] = (256, 128, 64, 32),
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.images, vectors = split_keys(obs_space)
        height, width, channels = _image_shape("ConvDecoder", obs_space, self.images, len(depths))
        self.channels = [obs_space[name].shape[2] for name in self.images]
        self.grid = (int(depths[0]), height >> len(depths), width >> len(depths))
        self.start = nn.Linear(state_size, prod(self.grid))
        widths = [*depths, channels]
        self.convs = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 4, 2, 1) for i, o in zip(widths, widths[1:], strict=False)
        )
        self.activation = ACTIVATIONS[activation]()
        self.vectors = None
        if vectors:
            spaces = {name: obs_space[name] for name in vectors}
            self.vectors = VectorDecoder(spaces, state_size, hidden=hidden, activation=activation)

    def forward(self, state: Tensor) -> dict[str, Tensor]:
        lead = state.shape[:-1]
        x = self.start(state.reshape(-1, state.shape[-1])).reshape(-1, *self.grid)
        for conv in self.convs:
            x = conv(self.activation(x))
        x = torch.sigmoid(x).permute(0, 2, 3, 1)
        x = x.reshape(*lead, *x.shape[1:])
        found = dict(zip(self.images, x.split(self.channels, -1), strict=True))
        return found if self.vectors is None else found | self.vectors(state)


def _image_shape(
    who: str, obs_space: dict[str, Space], images: list[str], stages: int
) -> tuple[int, int, int]:
    shapes = {name: obs_space[name].shape for name in images}
    sizes = {shape[:2] for shape in shapes.values()}
    if len(sizes) != 1 or any(n % (1 << stages) for size in sizes for n in size):
        raise ValueError(
            f"{who}: expected images of one size divisible by {1 << stages}, got {shapes}; "
            "set env.size, or give fewer depths"
        )
    return *sizes.pop(), sum(shape[2] for shape in shapes.values())


# ---- features to states


class Autoencoder(nn.Module):
    """A bottleneck: features -> states. With `reconstruct` also back, which gives it a loss."""

    carry_size = 0

    def __init__(
        self,
        feature_size: int,
        action_size: int,
        *,
        size: int = 64,
        hidden: Sequence[int] = (64,),
        activation: str = "relu",
        reconstruct: bool = False,
    ) -> None:
        super().__init__()
        self.state_size = size
        self.into = Dense(feature_size, hidden, size, activation)
        self.back = None
        if reconstruct:
            self.back = Dense(size, widths(hidden)[::-1], feature_size, activation)

    def encode(
        self, features: Tensor, action: Tensor, is_first: Tensor, carry: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.into(features), carry

    def loss(self, features: Tensor, states: Tensor) -> Tensor | None:
        if self.back is None:
            return None
        return (self.back(states) - features.detach()).square().mean(-1)


class Identity(nn.Module):
    """States are the encoder's features."""

    carry_size = 0

    def __init__(self, feature_size: int, action_size: int) -> None:
        super().__init__()
        self.state_size = feature_size

    def encode(
        self, features: Tensor, action: Tensor, is_first: Tensor, carry: Tensor
    ) -> tuple[Tensor, Tensor]:
        return features, carry

    def loss(self, features: Tensor, states: Tensor) -> Tensor | None:
        return None


class Recurrent(nn.Module):
    """A GRU over features and previous actions, for observations that do not show everything."""

    def __init__(self, feature_size: int, action_size: int, *, size: int = 64) -> None:
        super().__init__()
        self.state_size = self.carry_size = size
        self.cell = nn.GRUCell(feature_size + action_size, size)

    def encode(
        self, features: Tensor, action: Tensor, is_first: Tensor, carry: Tensor
    ) -> tuple[Tensor, Tensor]:
        going = (~is_first).unsqueeze(-1).to(features.dtype)  # (B, T, 1)
        inputs = torch.cat([features, action * going], -1)
        states = []
        for t in range(inputs.shape[1]):
            carry = self.cell(inputs[:, t], carry * going[:, t])
            states.append(carry)
        return torch.stack(states, 1), carry

    def loss(self, features: Tensor, states: Tensor) -> Tensor | None:
        return None


# ---- what states lead to


class DeterministicDynamics(nn.Module):
    """The next state as a point: a normal with a fixed, small spread, trained by squared error."""

    loss = "mse"

    def __init__(
        self,
        state_size: int,
        action_size: int,
        *,
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
        residual: bool = False,
        std: float = 0.01,
    ) -> None:
        super().__init__()
        self.residual, self.std = residual, std
        gain = 0.1 if residual else 1.0
        self.net = Dense(state_size + action_size, hidden, state_size, activation, gain)

    def forward(self, state: Tensor, action: Tensor) -> Normal:
        mean = self.net(torch.cat([state, action], -1))
        mean = state + mean if self.residual else mean
        return Normal(mean, torch.full_like(mean, self.std), validate_args=False)


class GaussianDynamics(nn.Module):
    """The next state as a normal with a learned spread, trained by its likelihood."""

    loss = "nll"

    def __init__(
        self,
        state_size: int,
        action_size: int,
        *,
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
        residual: bool = False,
        min_std: float = 0.1,
        max_std: float = 10.0,
    ) -> None:
        super().__init__()
        self.residual, self.min_std, self.max_std = residual, min_std, max_std
        self.net = Dense(state_size + action_size, hidden, 2 * state_size, activation)

    def forward(self, state: Tensor, action: Tensor) -> Normal:
        mean, raw = self.net(torch.cat([state, action], -1)).chunk(2, -1)
        mean = state + mean if self.residual else mean
        std = F.softplus(raw).clamp(self.min_std, self.max_std)
        return Normal(mean, std, validate_args=False)


class NormalReward(nn.Module):
    """Reward as a normal; its spread is learned, or fixed at `fixed_std`."""

    def __init__(
        self,
        state_size: int,
        *,
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
        learn_std: bool = True,
        fixed_std: float = 1.0,
        min_std: float = 0.1,
    ) -> None:
        super().__init__()
        self.learn_std, self.fixed_std, self.min_std = learn_std, fixed_std, min_std
        self.net = Dense(state_size, hidden, 2 if learn_std else 1, activation)

    def forward(self, state: Tensor) -> Normal:
        out = self.net(state)
        mean = out[..., 0]
        if self.learn_std:
            std = F.softplus(out[..., 1]) + self.min_std
        else:
            std = torch.full_like(mean, self.fixed_std)
        return Normal(mean, std, validate_args=False)


class BernoulliContinue(nn.Module):
    """The chance that the episode goes on."""

    def __init__(
        self, state_size: int, *, hidden: Sequence[int] = (256, 256), activation: str = "relu"
    ) -> None:
        super().__init__()
        self.net = Dense(state_size, hidden, 1, activation)

    def forward(self, state: Tensor) -> Bernoulli:
        return Bernoulli(logits=self.net(state).squeeze(-1), validate_args=False)


class DenseValue(nn.Module):
    """The return to expect from a state, one number."""

    def __init__(
        self, state_size: int, *, hidden: Sequence[int] = (256, 256), activation: str = "relu"
    ) -> None:
        super().__init__()
        self.net = Dense(state_size, hidden, 1, activation)

    def forward(self, state: Tensor) -> Tensor:  # (..., S) -> (...)
        return self.net(state).squeeze(-1)
