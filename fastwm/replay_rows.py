"""What one replay row holds: names, shapes, types, sizes, and the checks on arrival."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch

Spec = dict[str, tuple[tuple[int, ...], str]]

LATENTS = ("deter", "stoch")
REQUIRED = {"action": None, "reward": "float32", "is_first": "bool", "is_last": "bool",
            "is_terminal": "bool"}  # fmt: skip
RESERVED = ("prev_action", "ids")

# numpy has no bfloat16: its bits are stored as uint16
_NUMPY = {"bool": np.bool_, "uint8": np.uint8, "int8": np.int8, "int16": np.int16,
          "int32": np.int32, "int64": np.int64, "float16": np.float16, "float32": np.float32,
          "bfloat16": np.uint16}  # fmt: skip
# what is converted on arrival, besides the exact type
_ACCEPTED = {"bfloat16": ("float32", "float16"), "int32": ("int64",)}


class Key:
    """One stored array: its ring (N, L, *shape), and which rows of a window it hands out."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str, window: int) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype
        self.numpy = np.dtype(_NUMPY[dtype])
        self.torch = getattr(torch, dtype)
        self.plain = dtype != "bfloat16"  # numpy has no type for its bits
        self.record = prod(shape) * self.numpy.itemsize  # bytes per row
        self.ring: Any = np.empty(0)  # a tensor where the rings lie on a device
        # the action of row t - 1 led to row t: shifting is only a matter of where the copy starts
        self.out = "prev_action" if name == "action" else name
        self.context = name in LATENTS
        self.first = 0 if self.context or name == "action" else 1
        self.rows = 1 if self.context else window

    def batch_shape(self, batch: int) -> tuple[int, ...]:
        return (batch, *self.shape) if self.context else (batch, self.rows, *self.shape)

    def check(self, value: Any, lead: tuple[int, ...], letters: str) -> np.ndarray:
        """`value` as a contiguous array (*lead, *shape) in the stored type; raises otherwise."""
        # What comes with every step of every run.
        if type(value) is np.ndarray and value.dtype == self.numpy and self.plain:
            if value.shape == (*lead, *self.shape):
                return np.ascontiguousarray(value)
        value = self._expect(value, lead, letters)
        if self.dtype == "bfloat16":
            tensor = torch.as_tensor(value).detach().cpu().to(torch.bfloat16)
            return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy()
        return np.ascontiguousarray(value, dtype=self.numpy)

    def check_tensor(self, value: Any, lead: tuple[int, ...], letters: str) -> torch.Tensor:
        """The same as a contiguous tensor, on the device where `value` is."""
        value = self._expect(value, lead, letters)
        if not isinstance(value, torch.Tensor):
            value = torch.from_numpy(np.require(value, requirements=("C", "W")))
        return value.detach().to(self.torch).contiguous()

    def _expect(self, value: Any, lead: tuple[int, ...], letters: str) -> Any:
        """`value`, something with a shape and a dtype that fit; raises otherwise."""
        value = value if hasattr(value, "dtype") else np.asarray(value)
        want = (*lead, *self.shape)
        if tuple(value.shape) != want:
            raise ValueError(
                f"replay: expected {self.name} of shape ({letters}, *{self.shape}) = {want}, "
                f"got {tuple(value.shape)}; the first axis is the environment"
            )
        name = str(value.dtype).removeprefix("torch.")
        if name != self.dtype and name not in _ACCEPTED.get(self.dtype, ()):
            raise TypeError(
                f"replay: expected {self.name} of shape {want} as {self.dtype}, got {name}; "
                "convert it before it is added"
            )
        return value


def read_spec(spec: Spec, window: int) -> dict[str, Key]:
    """Check the description of a row and turn it into keys."""
    for name, dtype in REQUIRED.items():
        if name not in spec or (dtype and (tuple(spec[name][0]), spec[name][1]) != ((), dtype)):
            wanted = f"((), {dtype!r})" if dtype else "(shape, dtype)"
            raise ValueError(
                f"replay: expected spec[{name!r}] = {wanted}, got {spec.get(name, 'no such key')}"
            )
    keys = {}
    for name, (shape, dtype) in spec.items():
        if name in RESERVED:
            raise ValueError(
                f"replay: expected other key names than {RESERVED}, which a batch holds itself, "
                f"got {name!r}; rename the observation"
            )
        if dtype not in _NUMPY:
            raise TypeError(f"replay: expected dtype of {name} in {tuple(_NUMPY)}, got {dtype!r}")
        keys[name] = Key(name, tuple(int(n) for n in shape), dtype, window)
    return keys


def announce(keys: dict[str, Key], rows: int, place: str, free: int | None) -> str:
    """One line: bytes at capacity by kind, against what was free before allocation."""
    share = {"images": 0, "latents": 0, "other": 0}
    for key in keys.values():
        image = key.dtype == "uint8" and len(key.shape) == 3
        share["latents" if key.context else "images" if image else "other"] += key.record * rows
    parts = ", ".join(f"{kind} {gigabytes(n)}" for kind, n in share.items())
    left = "unknown" if free is None else f"{gigabytes(free)} GB"
    whole = gigabytes(sum(share.values()))
    return f"replay   {whole} GB at capacity ({parts}); {place} free {left}"


# What else to try where the rows do not fit, by the place that `replay_io.place_of` names.
_ELSEWHERE = {"RAM": ", use --replay.storage mmap", "GPU memory": ", use --replay.storage ram"}


def check_fits(keys: dict[str, Key], rows: int, place: str, free: int | None) -> None:
    """Refuse a ring of more than 0.8 of what is free: the run would be killed hours later."""
    record = sum(key.record for key in keys.values())
    if free is None or rows * record <= 0.8 * free:
        return
    raise ValueError(
        f"replay.capacity: expected at most 0.8 of the free {place} = {gigabytes(0.8 * free)} GB, "
        f"got {gigabytes(rows * record)} GB for {rows} rows of {record} bytes; lower "
        f"--replay.capacity to {int(0.8 * free) // record} or less{_ELSEWHERE.get(place, '')}, or "
        "pass --replay.force true"
    )


def gigabytes(n: float) -> str:
    """Three digits, in units of 1e9 bytes."""
    value = n / 1e9
    if n == 0 or value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.6f}"
