"""Layers, encoder, decoder and heads.

Every hidden layer is Linear, RMSNorm, SiLU. Letters are those of docs/conventions.md. Source of the
architecture: arXiv:2301.04104 and its 2024 reference implementation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastwm import ops
from fastwm.spaces import Space

# A normal truncated at two standard deviations has standard deviation 0.8796.
TRUNCATION = 1.0 / 0.87962566103423978


@torch.no_grad()
def init_weight_(weight: Tensor, fan_in: int, outscale: float = 1.0) -> Tensor:
    """Truncated normal with real standard deviation `outscale / sqrt(fan_in)`, in place."""
    if outscale == 0.0:
        return weight.zero_()
    nn.init.trunc_normal_(weight, 0.0, 1.0, -2.0, 2.0)
    return weight.mul_(outscale * TRUNCATION / sqrt(fan_in))


class Linear(nn.Module):
    """y = x W^T + b."""

    def __init__(self, in_features: int, out_features: int, *, outscale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        init_weight_(self.weight, in_features, outscale)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return F.linear(x, self.weight, self.bias)


class NormLinear(Linear):
    """silu(rmsnorm(Linear(x)))."""

    one_hots = 0  # how many of the inputs, the last ones, are of one-hots; see FirstLayers

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.scale = nn.Parameter(torch.ones(out_features))

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return self.finish(super().forward(x))

    def finish(self, product: Tensor) -> Tensor:  # (..., out)
        """The layer from its product x W^T + b on."""
        return ops.rms_silu(product, self.scale)

    def recall(self, product: Tensor, x: Tensor) -> Tensor:  # (..., out), (..., in) -> (..., out)
        """The layer whose product is known from a pass without gradient; none reaches x."""
        return self.finish(_KnownProduct.apply(product, x, self.weight, self.bias, self.one_hots))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.bias, self.scale


class _KnownProduct(torch.autograd.Function):
    """x W^T + b that was computed before: costs nothing forward, gives W and b their gradients."""

    @staticmethod
    def forward(ctx, product, x, weight, bias, one_hots):
        ctx.save_for_backward(x)
        ctx.one_hots = one_hots
        return product.view_as(product)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        rows, inputs = grad.flatten(0, -2), x.flatten(0, -2).to(grad.dtype)
        weight = ops.sparse_weight_grad(rows, inputs, ctx.one_hots)
        return None, None, weight.float(), rows.sum(0, dtype=torch.float32), None


class WeightWatch:
    """Tells whether weights of some modules have changed: for what is computed from them once."""

    def __init__(self, *modules: nn.Module) -> None:
        self.slots = [
            (part._parameters, name)
            for module in modules
            for part in module.modules()
            for name, parameter in part._parameters.items()
            if parameter is not None
        ]
        self.seen: list[int] = []

    def changed(self) -> bool:
        """Since the last call; True in the first one. In place or another tensor: both count."""
        now = []
        for parameters, name in self.slots:
            parameter = parameters[name]
            now += (parameter.data_ptr(), parameter._version)
        changed, self.seen = now != self.seen, now
        return changed


class FirstLayers:
    """The first layers of several MLPs that read the same features, as one product.

    Features of one-hots (NormLinear.one_hots) are looked up.
    Use under `torch.no_grad()` while the weights stay as they are.
    """

    def __init__(self, mlps: Sequence[MLP]) -> None:
        layers = [mlp[0] for mlp in mlps]
        self.sizes = [layer.bias.shape[0] for layer in layers]
        self.weight = torch.cat([layer.weight for layer in layers])
        self.bias = torch.cat([layer.bias for layer in layers])
        one_hots = min(layer.one_hots for layer in layers)
        self.dense = self.weight.shape[1] - one_hots
        self.lookup = None
        if one_hots:
            lookup = ops.SparseLinear(self.weight[:, self.dense :], self.bias)
            self.lookup = None if lookup.packed is None else lookup

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:  # (N, in) -> one (N, units) per MLP
        if self.lookup is None:
            return F.linear(x, self.weight, self.bias).split(self.sizes, -1)
        looked_up = self.lookup(x[:, self.dense :])
        product = looked_up.addmm_(x[:, : self.dense], self.weight[:, : self.dense].t())
        return product.split(self.sizes, -1)


class BlockLinear(nn.Module):
    """G independent linear maps over contiguous slices of the input.

    The initial standard deviation counts the whole input as fan-in, not one block's share.
    """

    def __init__(self, in_features: int, out_features: int, blocks: int) -> None:
        super().__init__()
        if in_features % blocks or out_features % blocks:
            raise ValueError(
                f"BlockLinear: expected sizes divisible by blocks = {blocks}, "
                f"got {in_features} -> {out_features}; change the number of blocks or the sizes"
            )
        self.weight = nn.Parameter(
            torch.empty(blocks, in_features // blocks, out_features // blocks)
        )
        self.bias = nn.Parameter(torch.zeros(out_features))
        init_weight_(self.weight, in_features)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        blocks, width, _ = self.weight.shape
        rows = x.reshape(-1, blocks, width).transpose(0, 1)  # (G, N, in/G)
        out = torch.bmm(rows, self.weight.to(rows.dtype)).transpose(0, 1)  # (N, G, out/G)
        return out.reshape(*x.shape[:-1], -1) + self.bias


class BlockNormLinear(BlockLinear):
    """Holds a block-linear layer with the RMSNorm scale over all its outputs."""

    def __init__(self, in_features: int, out_features: int, blocks: int) -> None:
        super().__init__(in_features, out_features, blocks)
        self.scale = nn.Parameter(torch.ones(out_features))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.bias, self.scale


class MLP(nn.Sequential):
    """`layers` hidden layers of `units`."""

    def __init__(self, in_features: int, units: int, layers: int) -> None:
        sizes = [in_features] + [units] * layers
        super().__init__(*(NormLinear(i, o) for i, o in zip(sizes, sizes[1:], strict=False)))
        self.out_features = sizes[-1]

    def recall(self, product: Tensor, x: Tensor) -> Tensor:
        """forward(x) where the first layer's product is known; see NormLinear.recall."""
        return self.rest(self[0].recall(product, x))

    def rest(self, x: Tensor) -> Tensor:
        """What follows the first layer."""
        for layer in list(self)[1:]:
            x = layer(x)
        return x


class Head(nn.Module):
    """An MLP and a linear output of any shape; the output is float32 under autocast too."""

    def __init__(
        self, in_features: int, out_features: int, *, units: int, layers: int, outscale: float
    ) -> None:
        super().__init__()
        self.mlp = MLP(in_features, units, layers)
        self.out = Linear(self.mlp.out_features, out_features, outscale=outscale)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return self.out(self.mlp(x)).float()

    def recall(self, product: Tensor, x: Tensor) -> Tensor:
        """forward(x) where the first layer's product is known; see NormLinear.recall."""
        return self.out(self.mlp.recall(product, x)).float()

    def logits(self, x: Tensor, product: Tensor | None = None) -> ops.LinearLogits:
        """forward(x) as `ops.twohot_loss` takes it. product: see `recall`."""
        hidden = self.mlp(x) if product is None else self.mlp.recall(product, x)
        return ops.LinearLogits(hidden, self.out.weight, self.out.bias)

    def mean(self, x: Tensor, bins: Tensor, product: Tensor | None = None) -> Tensor:  # (..., F)
        """The two-hot mean of what the head says of x. product: see `recall`."""
        hidden = self.mlp(x) if product is None else self.mlp.recall(product, x)
        return ops.twohot_mean_linear(hidden, self.out.weight, self.out.bias, bins)


class Conv(nn.Module):
    """A convolution kernel (C', C, k, k), bias, and the scale of the norm that follows, if any."""

    def __init__(self, channels: int, out_channels: int, kernel: int, *, norm: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.scale = nn.Parameter(torch.ones(out_channels)) if norm else None
        init_weight_(self.weight, channels * kernel * kernel)


def select_keys(obs_space: dict[str, Space], cnn_keys: str, mlp_keys: str) -> dict[str, Space]:
    """The observations whose names match: images the first pattern, all others the second."""
    try:
        patterns = {True: re.compile(cnn_keys), False: re.compile(mlp_keys)}
    except re.error as error:
        raise ValueError(
            f"cnn_keys, mlp_keys: expected regular expressions, got {cnn_keys!r} and {mlp_keys!r}: "
            f"{error}"
        ) from None
    return {
        key: space for key, space in obs_space.items() if patterns[space.kind == "image"].match(key)
    }


def split_keys(obs_space: dict[str, Space]) -> tuple[list[str], list[str]]:
    """Sorted image keys and sorted vector keys (discrete ones count as vectors)."""
    images = sorted(key for key, space in obs_space.items() if space.kind == "image")
    vectors = sorted(key for key in obs_space if key not in images)
    return images, vectors


def one_hot_encode(x: Tensor, classes: tuple[int, ...], lead: int) -> Tensor:
    """Discrete elements behind `lead` leading dims -> concatenated one-hots (..., sum(classes))."""
    flat = x.reshape(*x.shape[:lead], -1).long()
    if len(classes) == 1 or len(set(classes)) == 1:
        return F.one_hot(flat, classes[0]).flatten(-2).float()
    parts = [F.one_hot(flat[..., i], n) for i, n in enumerate(classes)]
    return torch.cat(parts, -1).float()


class Encoder(nn.Module):
    """Observations (B, T, ...) -> tokens (B, T, E): an MLP for vectors, a CNN for images.

    out_features: E.  Images of all keys are stacked along channels and must share H and W.
    """

    def __init__(
        self,
        obs_space: dict[str, Space],
        *,
        depth: int,
        mults: tuple[int, ...],
        layers: int,
        units: int,
        kernel: int,
        symlog: bool,
        cnn_keys: str = ".*",
        mlp_keys: str = ".*",
    ) -> None:
        super().__init__()
        obs_space = select_keys(obs_space, cnn_keys, mlp_keys)
        self.space, self.symlog, self.kernel = dict(obs_space), symlog, kernel
        self.image_keys, self.vector_keys = split_keys(obs_space)
        if not obs_space:
            raise ValueError("Encoder: expected at least one observation key, got none")
        self.out_features = 0
        if self.vector_keys:
            width = sum(obs_space[key].encoded_size for key in self.vector_keys)
            self.mlp = MLP(width, units, layers)
            self.out_features += self.mlp.out_features
        if self.image_keys:
            height, width, channels = stacked_image_shape(obs_space, self.image_keys, len(mults))
            widths = [channels] + [depth * mult for mult in mults]
            self.convs = nn.ModuleList(
                Conv(i, o, kernel) for i, o in zip(widths, widths[1:], strict=False)
            )
            self.out_features += (height >> len(mults)) * (width >> len(mults)) * widths[-1]

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        tokens = []
        if self.vector_keys:
            tokens.append(self.mlp(self.encode_vectors(obs)))
        if self.image_keys:
            tokens.append(self.encode_images(obs))
        return tokens[0] if len(tokens) == 1 else torch.cat([t.float() for t in tokens], -1)

    def encode_vectors(self, obs: dict[str, Tensor]) -> Tensor:
        parts = []
        for key in self.vector_keys:
            x, space = obs[key], self.space[key]
            lead = x.dim() - len(space.shape)
            if space.kind == "discrete":
                parts.append(one_hot_encode(x, space.classes, lead))
            else:
                x = x.float().reshape(*x.shape[:lead], -1)
                parts.append(ops.symlog(x) if self.symlog else x)
        return torch.cat(parts, -1)

    def encode_images(self, obs: dict[str, Tensor]) -> Tensor:
        images = [obs[key] for key in self.image_keys]
        x = images[0] if len(images) == 1 else torch.cat(images, -1)  # (B, T, H, W, C) uint8
        lead = x.shape[:-3]
        x = x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2)
        for conv in self.convs:
            x = ops.conv_pool_silu(x, conv.weight, conv.bias, conv.scale)
        return x.permute(0, 2, 3, 1).reshape(*lead, -1)


def stacked_image_shape(
    obs_space: dict[str, Space], keys: list[str], stages: int
) -> tuple[int, int, int]:
    """(H, W, all channels) of the images, checked to survive `stages` halvings."""
    shapes = {key: obs_space[key].shape for key in keys}
    sizes = {shape[:2] for shape in shapes.values()}
    if len(sizes) != 1:
        raise ValueError(
            f"Encoder: expected all images of one height and width, got {shapes}; resize them"
        )
    height, width = sizes.pop()
    low, high = 3 << stages, 16 << stages
    if any(n % (1 << stages) or not low <= n <= high for n in (height, width)):
        raise ValueError(
            f"Encoder: expected image height and width divisible by {1 << stages} and between "
            f"{low} and {high} for {stages} stages, got {height}x{width}; set env.size or the mults"
        )
    return height, width, sum(shape[2] for shape in shapes.values())


def head_name(key: str) -> str:
    """A module name for any observation key: no dots, and no clash with methods of the dict."""
    return "obs_" + key.replace(".", "/")


class Decoder(nn.Module):
    """State (deter, stoch) -> one prediction per observation key.

    Vectors come back in symlog space (..., *shape), discrete keys as logits (..., sum(classes)),
    images as (..., H, W, C) in [0, 1], or as their logits without `squash`.
    """

    def __init__(
        self,
        obs_space: dict[str, Space],
        deter: int,
        stoch: int,  # S*K
        *,
        depth: int,
        mults: tuple[int, ...],
        layers: int,
        units: int,
        kernel: int,
        bspace: int,
        outscale: float,
        cnn_keys: str = ".*",
        mlp_keys: str = ".*",
    ) -> None:
        super().__init__()
        obs_space = select_keys(obs_space, cnn_keys, mlp_keys)
        self.space = dict(obs_space)
        self.image_keys, self.vector_keys = split_keys(obs_space)
        if kernel != 5 and self.image_keys:
            raise ValueError(f"Decoder: expected kernel = 5, got {kernel}")
        if self.vector_keys:
            self.mlp = MLP(stoch + deter, units, layers)
            self.heads = nn.ModuleDict(
                {
                    head_name(key): Linear(units, space.encoded_size, outscale=outscale)
                    for key, space in obs_space.items()
                    if key in self.vector_keys
                }
            )
        if self.image_keys:
            height, width, channels = stacked_image_shape(obs_space, self.image_keys, len(mults))
            self.grid = (height >> len(mults), width >> len(mults), depth * mults[-1], bspace)
            pixels = prod(self.grid[:3])
            self.from_deter = BlockLinear(deter, pixels, bspace)
            self.from_stoch = nn.Sequential(NormLinear(stoch, 2 * units), Linear(2 * units, pixels))
            self.scale = nn.Parameter(torch.ones(self.grid[2]))
            widths = [depth * mult for mult in reversed(mults)]
            self.convs = nn.ModuleList(
                Conv(i, o, kernel) for i, o in zip(widths, widths[1:], strict=False)
            )
            self.image_out = Conv(widths[-1], channels, kernel, norm=False)
            init_weight_(self.image_out.weight, widths[-1] * kernel * kernel, outscale)

    def forward(
        self,
        deter: Tensor,  # (..., D)
        stoch: Tensor,  # (..., S*K)
        squash: bool = True,
    ) -> dict[str, Tensor]:
        out = {}
        if self.vector_keys:
            x = self.mlp(torch.cat([stoch, deter], -1))
            for key in self.vector_keys:
                out[key] = self.heads[head_name(key)](x).float()
                if self.space[key].kind == "vector":
                    out[key] = out[key].reshape(*deter.shape[:-1], *self.space[key].shape)
        if self.image_keys:
            images = self.decode_images(deter, stoch)
            out |= {k: torch.sigmoid(x) for k, x in images.items()} if squash else images
        return out

    def decode_images(self, deter: Tensor, stoch: Tensor) -> dict[str, Tensor]:
        lead, (height, width, channels, bspace) = deter.shape[:-1], self.grid
        x0 = self.from_deter(deter.reshape(-1, deter.shape[-1]))
        x0 = x0.reshape(-1, bspace, height, width, channels // bspace)
        x0 = x0.permute(0, 2, 3, 1, 4).reshape(-1, height, width, channels)
        x1 = self.from_stoch(stoch.reshape(-1, stoch.shape[-1]))
        x = ops.rms_silu(x0 + x1.reshape(-1, height, width, channels), self.scale)
        x = x.permute(0, 3, 1, 2)  # channels-last (N, C, h, w)
        for conv in self.convs:
            x = ops.upsample_conv2d_silu(x, conv.weight, conv.bias, conv.scale)
        x = ops.upsample_conv2d(x, self.image_out.weight, self.image_out.bias)
        x = x.float().permute(0, 2, 3, 1)
        x = x.reshape(*lead, *x.shape[1:])
        sizes = [self.space[key].shape[2] for key in self.image_keys]
        images = x.split(sizes, -1) if len(sizes) > 1 else [x]  # the gradient of a split is a copy
        return dict(zip(self.image_keys, images, strict=True))
