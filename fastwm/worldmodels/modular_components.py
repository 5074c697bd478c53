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
    """__init__(obs_space, **options). Called with what `prepare` returns."""

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
    """__init__(obs_space, state_size, **options). Predicts what `prepare` returns."""

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


def prepare(obs: Mapping[str, Tensor], spaces: dict[str, Space], symlog: bool) -> dict[str, Tensor]:
    """Observations as the components see them, floats with any leading dimensions.

    Images (..., H, W, C) in [0, 1]; discrete ones as concatenated one-hots (..., sum(classes));
    vectors as they are, or through symlog.
    """
    found = {}
    for name, space in spaces.items():
        x = obs[name]
        if space.kind == "image":
            found[name] = x.float() / 255.0
        elif space.kind == "discrete":
            found[name] = one_hot_encode(x, space.classes, x.dim() - len(space.shape))
        else:
            found[name] = ops.symlog(x.float()) if symlog else x.float()
    return found
