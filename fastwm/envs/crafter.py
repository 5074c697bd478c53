"""Crafter with gymnasium's interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastwm.envs.base import EnvOptionError, UnknownTaskError, import_package

PIP = "crafter"
REWARDS = {"reward": True, "noreward": False}


def crafter_factory(
    who: str, name: str, size: tuple[int, int], settings: dict[str, Any]
) -> Callable[[], Any]:
    """A function that makes one world. name: "reward" or "noreward". settings: of crafter.Env."""
    if name not in REWARDS:
        raise UnknownTaskError(
            f"envs.make: expected one of {', '.join(f'crafter_{n}' for n in REWARDS)}, got {who!r}"
        )
    package = import_package("crafter", PIP, who)
    spaces = import_package("gymnasium.spaces", "gymnasium", who)
    settings = {**settings, "reward": REWARDS[name]}

    def build() -> CrafterEnv:
        try:
            return CrafterEnv(package.Env, spaces, size, settings)
        except TypeError as error:
            raise EnvOptionError(
                f"{who}: expected options of crafter.Env, got {settings}: {error}"
            ) from error

    return build


class CrafterEnv:
    """One world: a picture, 17 actions. Death is terminal, the end of its `length` a truncation."""

    render_mode = "rgb_array"

    def __init__(
        self, world: Any, spaces: Any, size: tuple[int, int], settings: dict[str, Any]
    ) -> None:
        height, width = size
        self._make = lambda seed: world(size=(width, height), seed=seed, **settings)
        self._env = self._make(0)
        self.observation_space = spaces.Box(0, 255, (height, width, 3), np.uint8)
        self.action_space = spaces.Discrete(self._env.action_space.n)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        if seed is not None:
            self._env = self._make(seed)
        return self._env.reset(), {}

    def step(self, action: Any) -> tuple:
        image, reward, done, info = self._env.step(int(action))
        terminated = info["discount"] == 0
        return image, float(reward), terminated, done and not terminated, info

    def render(self) -> np.ndarray:  # (256, 256, 3) uint8
        return self._env.render((256, 256))

    def close(self) -> None:
        self._env = None
