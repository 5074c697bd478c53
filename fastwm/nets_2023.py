"""Layers, encoder, decoder and heads of the 2023 networks.

Every hidden layer is Linear without bias, LayerNorm (eps 1e-3, gain and offset), SiLU. Images go
through 4x4 convolutions of stride 2. Letters are those of docs/conventions.md. Source of the
architecture: arXiv:2301.04104, first version.
"""

from __future__ import annotations

from math import prod, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastwm.nets import (
    TRUNCATION,
    Linear,
    head_name,
    select_keys,
    split_keys,
    stacked_image_shape,
)
from fastwm.nets import Encoder as Encoder2024
from fastwm.spaces import Space

EPS = 1e-3


@torch.no_grad()
def init_hidden_(weight: Tensor, fan_in: int, fan_out: int) -> Tensor:
    """Truncated normal of variance 1 / mean(fans), in place."""
    nn.init.trunc_normal_(weight, 0.0, 1.0, -2.0, 2.0)
    return weight.mul_(TRUNCATION * sqrt(2.0 / (fan_in + fan_out)))


@torch.no_grad()
def init_output_(weight: Tensor, fan_in: int, fan_out: int, outscale: float) -> Tensor:
    """Uniform of variance outscale / mean(fans), in place; zero for outscale 0."""
    limit = sqrt(6.0 * outscale / (fan_in + fan_out))
    return weight.uniform_(-limit, limit) if limit else weight.zero_()


class LayerNormLinear(nn.Module):
    """silu(layernorm(x W^T)): weight (out, in), scale and shift (out,)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.scale = nn.Parameter(torch.ones(out_features))
        self.shift = nn.Parameter(torch.zeros(out_features))
        init_hidden_(self.weight, in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return self.activate(F.linear(x, self.weight))

    def activate(self, x: Tensor) -> Tensor:
        """Norm and nonlinearity of a product that is there already."""
        return F.silu(
            F.layer_norm(x.to(self.scale.dtype), x.shape[-1:], self.scale, self.shift, EPS)
        )


class Output(Linear):
    """y = x W^T + b with the initial weights of the 2023 output layers."""

    def __init__(self, in_features: int, out_features: int, *, outscale: float = 1.0) -> None:
        super().__init__(in_features, out_features)
        init_output_(self.weight, in_features, out_features, outscale)


class MLP(nn.Sequential):
    """`layers` hidden layers of `units`."""

    def __init__(self, in_features: int, units: int, layers: int) -> None:
        sizes = [in_features] + [units] * layers
        super().__init__(*(LayerNormLinear(i, o) for i, o in zip(sizes, sizes[1:], strict=False)))
        self.out_features = sizes[-1]


class Head(nn.Module):
    """An MLP and a linear output; the output is float32 under autocast too."""

    def __init__(
        self, in_features: int, out_features: int, *, units: int, layers: int, outscale: float
    ) -> None:
        super().__init__()
        self.mlp = MLP(in_features, units, layers)
        self.out = Output(self.mlp.out_features, out_features, outscale=outscale)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return self.out(self.mlp(x)).float()


class Conv(nn.Module):
    """A 4x4 kernel, and either gain and offset of the norm that follows or, at the end, a bias.

    up: a transposed convolution, kernel (C, C', 4, 4) instead of (C', C, 4, 4).
    """

    def __init__(self, channels: int, out_channels: int, *, up: bool, last: bool = False) -> None:
        super().__init__()
        shape = (channels, out_channels) if up else (out_channels, channels)
        self.up, fans = up, (16 * channels, 16 * out_channels)
        self.weight = nn.Parameter(torch.empty(*shape, 4, 4))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if last else None
        self.scale = None if last else nn.Parameter(torch.ones(out_channels))
        self.shift = None if last else nn.Parameter(torch.zeros(out_channels))
        init_output_(self.weight, *fans, 1.0) if last else init_hidden_(self.weight, *fans)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C', H/2, W/2) or (.., 2H, 2W)
        convolve = F.conv_transpose2d if self.up else F.conv2d
        x = convolve(x, self.weight, self.bias, stride=2, padding=1)
        if self.scale is None:
            return x
        x = x.permute(0, 2, 3, 1).float()
        x = F.silu(F.layer_norm(x, x.shape[-1:], self.scale, self.shift, EPS))
        return x.permute(0, 3, 1, 2)


def stages_of(obs_space: dict[str, Space], keys: list[str], minres: int) -> int:
    """How often the images are halved until their shorter side is `minres` pixels."""
    side = min(min(obs_space[key].shape[:2]) for key in keys)
    stages = max((side // minres).bit_length() - 1, 1)
    if side != minres << stages:
        raise ValueError(
            f"Encoder: expected the shorter side of images to be minres = {minres} times a power "
            f"of 2, got {side}; set env.size or the minres of encoder and decoder"
        )
    return stages


class Encoder(Encoder2024):
    """Observations (B, T, ...) -> tokens (B, T, E): an MLP for vectors, a CNN for images.

    out_features: E.  Widths of the convolutions are depth, 2 depth, 4 depth, ...
    """

    def __init__(
        self,
        obs_space: dict[str, Space],
        *,
        depth: int,
        minres: int,
        layers: int,
        units: int,
        symlog: bool,
        cnn_keys: str = ".*",
        mlp_keys: str = ".*",
    ) -> None:
        nn.Module.__init__(self)
        obs_space = select_keys(obs_space, cnn_keys, mlp_keys)
        if not obs_space:
            raise ValueError("Encoder: expected at least one observation key, got none")
        self.space, self.symlog = dict(obs_space), symlog
        self.image_keys, self.vector_keys = split_keys(obs_space)
        self.out_features = 0
        if self.vector_keys:
            width = sum(obs_space[key].encoded_size for key in self.vector_keys)
            self.mlp = MLP(width, units, layers)
            self.out_features += self.mlp.out_features
        if self.image_keys:
            stages = stages_of(obs_space, self.image_keys, minres)
            height, width, channels = stacked_image_shape(obs_space, self.image_keys, stages)
            widths = [channels] + [depth << i for i in range(stages)]
            self.convs = nn.Sequential(
                *(Conv(i, o, up=False) for i, o in zip(widths, widths[1:], strict=False))
            )
            self.out_features += (height >> stages) * (width >> stages) * widths[-1]

    def encode_images(self, obs: dict[str, Tensor]) -> Tensor:
        x = torch.cat([obs[key] for key in self.image_keys], -1)  # (B, T, H, W, C) uint8
        lead = x.shape[:-3]
        x = x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2).float() / 255.0 - 0.5
        return self.convs(x).permute(0, 2, 3, 1).reshape(*lead, -1)


class Decoder(nn.Module):
    """State (deter, stoch) -> one prediction per observation key, as `fastwm.nets.Decoder`.

    Images are not squashed: what the network gives plus a half, or its sigmoid with `sigmoid`.
    """

    def __init__(
        self,
        obs_space: dict[str, Space],
        feat_size: int,
        *,
        depth: int,
        minres: int,
        layers: int,
        units: int,
        sigmoid: bool,
        cnn_keys: str = ".*",
        mlp_keys: str = ".*",
    ) -> None:
        super().__init__()
        obs_space = select_keys(obs_space, cnn_keys, mlp_keys)
        self.space, self.sigmoid = dict(obs_space), sigmoid
        self.image_keys, self.vector_keys = split_keys(obs_space)
        if self.vector_keys:
            self.mlp = MLP(feat_size, units, layers)
            sizes = {key: obs_space[key].encoded_size for key in self.vector_keys}
            self.heads = nn.ModuleDict({head_name(k): Output(units, n) for k, n in sizes.items()})
        if self.image_keys:
            stages = stages_of(obs_space, self.image_keys, minres)
            height, width, channels = stacked_image_shape(obs_space, self.image_keys, stages)
            widths = [depth << i for i in reversed(range(stages))]
            self.grid = (height >> stages, width >> stages, widths[0])
            self.first = Output(feat_size, prod(self.grid))
            self.convs = nn.Sequential(
                *(Conv(i, o, up=True) for i, o in zip(widths, widths[1:], strict=False)),
                Conv(widths[-1], channels, up=True, last=True),
            )

    def forward(self, deter: Tensor, stoch: Tensor) -> dict[str, Tensor]:  # (..., D), (..., S*K)
        features, lead, out = torch.cat([deter, stoch], -1), deter.shape[:-1], {}
        if self.vector_keys:
            x = self.mlp(features)
            for key in self.vector_keys:
                out[key] = self.heads[head_name(key)](x).float()
                if self.space[key].kind == "vector":
                    out[key] = out[key].reshape(*lead, *self.space[key].shape)
        if self.image_keys:
            x = self.first(features).reshape(-1, *self.grid).permute(0, 3, 1, 2)
            x = self.convs(x).float().permute(0, 2, 3, 1)
            x = torch.sigmoid(x) if self.sigmoid else x + 0.5
            sizes = [self.space[key].shape[2] for key in self.image_keys]
            x = x.reshape(*lead, *x.shape[1:])
            # The gradient of a split is a copy: not for one image.
            images = x.split(sizes, -1) if len(sizes) > 1 else [x]
            out.update(zip(self.image_keys, images, strict=True))
        return out
