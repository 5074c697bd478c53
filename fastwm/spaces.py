"""What an observation or action looks like, as plain data.

Environments describe themselves with these, agents build their networks from them, and checkpoints
carry them, so that a policy loads without gymnasium.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod

KINDS = ("image", "vector", "discrete", "continuous")


@dataclass(frozen=True)
class Space:
    """One array of an observation or action.

    kind "image":      shape (H, W, C), uint8, observations only.
    kind "vector":     any shape, float32, observations only.
    kind "discrete":   any shape, int32; `classes` holds a class count per element, so an action of
                       two choices with 3 and 5 options has shape (2,) and classes (3, 5).
    kind "continuous": shape (A,), float32 in [-1, 1], actions only.
    """

    kind: str
    shape: tuple[int, ...]
    classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Space: expected kind to be one of {KINDS}, got {self.kind!r}")
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "classes", tuple(int(n) for n in self.classes))
        if self.kind == "image" and len(self.shape) != 3:
            raise ValueError(f"Space: expected an image of shape (H, W, C), got {self.shape}")
        wanted = prod(self.shape) if self.kind == "discrete" else 0
        if len(self.classes) != wanted:
            raise ValueError(
                f"Space: expected {wanted} class counts for kind {self.kind!r} of shape "
                f"{self.shape}, got {self.classes}"
            )

    @property
    def dtype(self) -> str:
        """Name of the numpy and torch dtype that carries it."""
        return {"image": "uint8", "discrete": "int32"}.get(self.kind, "float32")

    @property
    def encoded_size(self) -> int:
        """Width after flattening, with every discrete element as a one-hot."""
        return sum(self.classes) if self.kind == "discrete" else prod(self.shape)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Space:
        return cls(data["kind"], tuple(data["shape"]), tuple(data["classes"]))
