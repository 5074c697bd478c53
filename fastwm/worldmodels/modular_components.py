"""What the components of the modular recipe have to offer, and how they are found by name.

A component is chosen in the configuration by `<slot>.name`: a name of COMPONENTS, or
`package.module:Class` for one of your own, which gets `<slot>.options` as keyword arguments after
the sizes that stand in its protocol's `__init__`. Letters: docs/conventions.md; here S is the size
of a state, E of the features, A of an encoded action, R of what a recurrent representation carries.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastwm import ops
from fastwm.nets import one_hot_encode
from fastwm.spaces import Space
from fastwm.worldmodels import modular_parts as parts
from fastwm.worldmodels import modular_policies as policies


class Encoder(Protocol):
    """__init__(obs_space, **options). Called with what `Prepare` returns."""

    out_features: int  # E

    def __call__(self, obs: dict[str, Tensor]) -> Tensor: ...  # (..., *shape) -> (..., E)


class Representation(Protocol):
    """__init__(feature_size, action_size, **options)."""

    state_size: int  # S
    carry_size: int  # R, 0 for one without memory

    def encode(
        self,
        features: Tensor,  # (B, T, E)
        action: Tensor,  # (B, T, A), taken before each row
        is_first: Tensor,  # (B, T) bool: forget what was before
        carry: Tensor,  # (B, R), zeros at first
    ) -> tuple[Tensor, Tensor]: ...  # states (B, T, S), carry (B, R)

    def loss(self, features: Tensor, states: Tensor) -> Tensor | None: ...  # own loss (B, T)


class Dynamics(Protocol):
    """__init__(state_size, action_size, **options)."""

    loss: str  # "mse" or "nll", what it is trained with

    def __call__(self, state: Tensor, action: Tensor) -> Any: ...

    # (..., S), (..., A) -> a distribution over (..., S) with mean, stddev, log_prob


class Reward(Protocol):
    """__init__(state_size, **options)."""

    def __call__(self, state: Tensor) -> Any: ...  # distribution (...): mean, stddev, log_prob


class Continue(Protocol):
    """__init__(state_size, **options)."""

    def __call__(self, state: Tensor) -> Any: ...  # Bernoulli (...) with probs, log_prob


class Decoder(Protocol):
    """__init__(obs_space, state_size, **options). Predicts what `Prepare` returns."""

    def __call__(self, state: Tensor) -> dict[str, Tensor]: ...  # (..., S) -> (..., *shape)


class ActionDistribution(Protocol):
    def sample(self, noise: Tensor | None) -> Tensor: ...  # (..., A); None: the mode

    def rsample(self, noise: Tensor, tau: float, hard: bool) -> Tensor: ...  # with gradients

    def entropy(self) -> Tensor: ...  # (...) nats

    def max_entropy(self) -> float | None: ...  # None where it has no bound


class Policy(Protocol):
    """__init__(state_size, act_space, **options)."""

    space: Space

    def __call__(self, state: Tensor) -> ActionDistribution: ...

    def noise(self, lead: tuple[int, ...], generator: torch.Generator) -> Tensor: ...

    def to_env(self, action: Tensor) -> Tensor: ...  # (N, A) -> (N, *shape)


class Value(Protocol):
    """__init__(state_size, **options)."""

    def __call__(self, state: Tensor) -> Tensor: ...  # (..., S) -> (...)


COMPONENTS: dict[str, dict[str, type]] = {
    "encoder": {"mlp": parts.VectorEncoder, "conv": parts.ConvEncoder},
    "representation": {
        "autoencoder": parts.Autoencoder,
        "identity": parts.Identity,
        "gru": parts.Recurrent,
    },
    "dynamics": {"mlp_det": parts.DeterministicDynamics, "mlp_gauss": parts.GaussianDynamics},
    "reward": {"normal": parts.NormalReward},
    "cont": {"bernoulli": parts.BernoulliContinue},
    "decoder": {"mlp": parts.VectorDecoder, "conv": parts.ConvDecoder},
    "policy": {"categorical": policies.CategoricalPolicy, "tanh_normal": policies.TanhNormalPolicy},
    "value": {"mlp": parts.DenseValue},
}
NEEDED = {  # attributes beside being callable
    "encoder": ("out_features",),
    "representation": ("state_size", "carry_size", "encode", "loss"),
    "dynamics": ("loss",),
    "policy": ("space", "noise", "to_env"),
}


def build(slot: str, name: str, options: Mapping[str, Any], *sizes: Any) -> nn.Module:
    """A component by slot and name.

    Raises: ValueError for an unknown name, an option that the component does not take, or a class
    without what its protocol asks for.
    """
    factory = find(slot, name)
    try:
        inspect.signature(factory).bind(*sizes, **options)
    except TypeError as error:
        known = [p.name for p in inspect.signature(factory).parameters.values()][len(sizes) :]
        raise ValueError(
            f"{slot}.options: expected options of {name} among {known}, got {dict(options)} "
            f"({error}); see docs/guide_modular.md"
        ) from None
    component = factory(*sizes, **options)
    missing = [attribute for attribute in NEEDED.get(slot, ()) if not hasattr(component, attribute)]
    if not isinstance(component, nn.Module) or missing:
        raise ValueError(
            f"{slot}.name: expected a torch.nn.Module with {NEEDED.get(slot, ())}, got "
            f"{name} = {type(component).__name__} without {missing or 'being a module'}; "
            "see fastwm/worldmodels/modular_components.py"
        )
    return component


def find(slot: str, name: str) -> Any:
    """The class of a name."""
    module, colon, attribute = name.partition(":")
    if not colon:
        if name not in COMPONENTS[slot]:
            raise ValueError(
                f"{slot}.name: expected one of {', '.join(COMPONENTS[slot])} or "
                f"package.module:Class, got {name!r}"
            )
        return COMPONENTS[slot][name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{slot}.name: expected package.module:Class that can be imported, got {name!r} "
            f"({error}); run from the folder that holds the package, or install it"
        ) from None


def default_name(slot: str, obs_space: dict[str, Space], act_space: Space) -> str:
    """What the name "auto" stands for."""
    if slot in ("encoder", "decoder"):
        return "conv" if any(space.kind == "image" for space in obs_space.values()) else "mlp"
    if slot == "policy":
        return "categorical" if act_space.kind == "discrete" else "tanh_normal"
    return next(iter(COMPONENTS[slot]))


class Prepare(nn.Module):
    """Observations as the components see them, floats with any leading dimensions.

    Images (..., H, W, C) in [0, 1]; discrete ones as concatenated one-hots (..., sum(classes));
    vectors as they are ("none"), through symlog ("symlog"), or with running mean 0 and deviation 1
    per element ("normalize").
    """

    RATE, FLOOR, LIMIT = 1e-3, 1e-3, 10.0  # of the newest batch; smallest deviation; largest value

    def __init__(self, spaces: dict[str, Space], scale: str) -> None:
        super().__init__()
        self.spaces, self.scale = dict(spaces), scale
        self.normalized = {}
        if scale == "normalize":
            vectors = [name for name, space in spaces.items() if space.kind == "vector"]
            self.normalized = {name: f"stats{i}" for i, name in enumerate(vectors)}
            for name, buffer in self.normalized.items():
                self.register_buffer(buffer, torch.zeros(2, *spaces[name].shape))
            self.register_buffer("batches", torch.zeros(()))

    def forward(self, obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, space in self.spaces.items():
            x = obs[name]
            if space.kind == "image":
                found[name] = x.float() / 255.0
            elif space.kind == "discrete":
                found[name] = one_hot_encode(x, space.classes, x.dim() - len(space.shape))
            elif name in self.normalized:
                mean, square = getattr(self, self.normalized[name])
                std = (square - mean.square()).clamp(min=self.FLOOR**2).sqrt()
                seen = torch.where(self.batches > 0, (x.float() - mean) / std, x.float())
                found[name] = seen.clamp(-self.LIMIT, self.LIMIT)
            else:
                found[name] = ops.symlog(x.float()) if self.scale == "symlog" else x.float()
        return found

    @torch.no_grad()
    def follow(self, obs: Mapping[str, Tensor]) -> None:
        """Note a batch (B, T, ...): the mean of all at first, of about 1 / RATE batches later.

        A batch that is not finite is passed over.
        """
        if not self.normalized:
            return
        new = {}
        for name, buffer in self.normalized.items():
            x = obs[name].float().flatten(0, 1)
            new[buffer] = torch.stack([x.mean(0), x.square().mean(0)])
        good = torch.stack([torch.isfinite(x).all() for x in new.values()]).all()
        rate = torch.where(good, (1.0 / (self.batches + 1.0)).clamp(min=self.RATE), 0.0)
        for buffer, sums in new.items():
            getattr(self, buffer).lerp_(torch.where(good, sums, 0.0), rate)
        self.batches.add_(good.float())
