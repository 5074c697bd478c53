"""World Models' C: a controller of some hundred numbers, evaluated for a whole population at once.

`ActionCode` says what its outputs mean: for the environment, and for M, which reads actions in the
form that the 2018 data has them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastwm.spaces import Space

INPUTS = ("z", "zh", "zc", "zch")


@dataclass(frozen=True)
class Controller:
    """A linear map of what V and M say, or one hidden tanh layer.

    latent: Z. hidden: R. outputs: how many numbers. inputs: "z", "zh", "zc" or "zch", with h and c
    of M's LSTM. units: width of the hidden layer, 0 for none. bias: of the output.
    """

    latent: int
    hidden: int
    outputs: int
    inputs: str = "zh"
    units: int = 0
    bias: bool = True

    def __post_init__(self) -> None:
        if self.inputs not in INPUTS:
            raise ValueError(
                f"Controller: expected inputs to be one of {INPUTS}, got {self.inputs!r}"
            )

    @property
    def width(self) -> int:
        """Length of one feature vector."""
        return self.latent + self.hidden * (len(self.inputs) - 1)

    @property
    def size(self) -> int:
        """How many parameters one candidate has."""
        first = (self.width + 1) * self.units if self.units else 0
        return first + ((self.units or self.width) + self.bias) * self.outputs

    def features(self, z: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        """(N, width) of z (N, Z) and M's state (h, c)."""
        h, c = state
        part = {"z": z, "h": h, "c": c}
        return torch.cat([part[name] for name in self.inputs], -1)

    def act(self, params: Tensor, features: Tensor) -> Tensor:
        """Outputs (P, S, outputs) of P candidates (P, size) on S feature vectors each (P, S, F)."""
        if params.ndim != 2 or params.shape[1] != self.size:
            raise ValueError(
                f"Controller: expected parameters of shape (P, {self.size}), "
                f"got {tuple(params.shape)}"
            )
        x, used = features, 0
        if self.units:
            x, used = torch.tanh(self._layer(params, 0, x, self.units, True)), self._first
        return self._layer(params, used, x, self.outputs, self.bias)

    @property
    def _first(self) -> int:
        return (self.width + 1) * self.units

    def _layer(self, params: Tensor, start: int, x: Tensor, out: int, bias: bool) -> Tensor:
        end = start + out * x.shape[-1]
        weight = params[:, start:end].unflatten(1, (out, x.shape[-1]))
        y = torch.bmm(x, weight.mT)
        return y + params[:, None, end : end + out] if bias else y

    def centred(self, params: Tensor, mean: Tensor) -> Tensor:  # (P, size), (width,)
        """Parameters that do to features what the given ones do to features - mean.

        The same family of controllers: only the first layer's bias moves.
        """
        out = self.units or self.outputs
        end = out * self.width
        if not (self.units or self.bias):
            raise ValueError("Controller: expected a bias to take a mean up, got none")
        moved = params.clone()
        weight = params[:, :end].unflatten(1, (out, self.width))
        moved[:, end : end + out] -= weight @ mean
        return moved

    def state_dict(self, params: Tensor) -> dict[str, Tensor]:  # (size,)
        """One candidate as the weights of torch Linear layers: fc.* or hidden.* and fc.*"""
        parts, used = {}, 0
        layers = [("fc", self.units or self.width, self.outputs, self.bias)]
        if self.units:
            layers.insert(0, ("hidden", self.width, self.units, True))
        for name, wide, out, bias in layers:
            end = used + wide * out
            parts[f"{name}.weight"] = params[used:end].reshape(out, wide)
            if bias:
                parts[f"{name}.bias"] = params[end : end + out]
            used = end + out * bias
        return parts

    def flat(self, parts: dict[str, Tensor]) -> Tensor:
        """The inverse of `state_dict`; ValueError where the sizes are of another controller."""
        wanted = self.state_dict(torch.zeros(self.size))
        shapes = {name: tuple(part.shape) for name, part in wanted.items()}
        found = {name: tuple(part.shape) for name, part in parts.items()}
        if shapes != found:
            raise ValueError(f"Controller: expected weights of shapes {shapes}, got {found}")
        return torch.cat([parts[name].flatten().float() for name in wanted])


@dataclass(frozen=True)
class ActionCode:
    """What a controller's outputs u mean.

    car:    three outputs; M reads steering tanh u0, gas (tanh u1 + 1) / 2, brake max(tanh u2, 0).
    tanh:   as many outputs as the action has elements; M reads tanh(u).
    thirds: one output; M reads tanh(u); the environment gets a choice of three: the middle third
            of [-1, 1] is `order[1]`, below it `order[0]`, above it `order[2]`.
    """

    kind: str
    outputs: int
    order: tuple[int, int, int] = (0, 1, 2)

    @classmethod
    def of(cls, kind: str, space: Space | None = None) -> ActionCode:
        """The code `kind` for an environment's action space; "auto" takes what fits.

        Raises: ValueError when they do not fit.
        """
        if kind == "auto" and space is not None:
            kind = "tanh" if space.kind == "continuous" else "thirds"
        if kind not in ("car", "tanh", "thirds"):
            raise ValueError(
                f"ActionCode: expected 'car', 'tanh', 'thirds' or 'auto', got {kind!r}"
            )
        if space is None:
            return cls(kind, {"car": 3, "thirds": 1}.get(kind, 1))
        fits = {
            "car": space.kind == "continuous" and space.shape == (3,),
            "tanh": space.kind == "continuous",
            "thirds": space.kind == "discrete" and space.classes == (3,),
        }
        if not fits[kind]:
            wanted = {
                "car": "3 continuous numbers",
                "tanh": "continuous numbers",
                "thirds": "one choice of 3",
            }
            raise ValueError(
                f"ha: expected an action space of {wanted[kind]} for actions {kind!r}, got "
                f"{space.kind} {space.classes or space.shape}; World Models drives continuous "
                "tasks (--ctrl.action tanh) and choices of three (--ctrl.action thirds)"
            )
        return cls(kind, 1 if kind == "thirds" else space.shape[0])

    @property
    def model(self) -> int:
        """Width A of the action that M reads."""
        return self.outputs

    def low(self) -> np.ndarray:  # (A,)
        """The smallest actions that M reads; the largest are 1."""
        return np.array([-1, 0, 0] if self.kind == "car" else [-1] * self.model, np.float32)

    def code(self, raw: Tensor) -> Tensor:  # (..., outputs) -> (..., A)
        """The action that M reads, of a controller's outputs."""
        squashed = torch.tanh(raw)
        if self.kind != "car":
            return squashed
        steer, gas, brake = squashed.unbind(-1)
        return torch.stack([steer, (gas + 1) / 2, brake.clamp_min(0)], -1)

    def to_env(self, action: np.ndarray, space: Space) -> np.ndarray:  # (N, A) -> (N, *shape)
        """The action that a VecEnv takes, of the one that M reads."""
        if self.kind == "thirds":
            choice = 1 + (action[:, 0] > 1 / 3).astype(int) - (action[:, 0] < -1 / 3)
            return np.array(self.order, np.int32)[choice].reshape(-1, *space.shape)
        if self.kind == "car":  # gas and brake from 0 .. 1 to -1 .. 1
            action = np.stack([action[:, 0], 2 * action[:, 1] - 1, 2 * action[:, 2] - 1], 1)
        return np.ascontiguousarray(action, np.float32)
