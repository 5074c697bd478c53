"""Memory Maze with gymnasium's interface."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from fastwm.envs.base import MissingPackageError, UnknownTaskError
from fastwm.envs.oldgym import stand_in

PIP = "memory-maze 'mujoco<4'"
SIZES = ("9x9", "11x11", "13x13", "15x15")


def maze_factory(
    who: str, name: str, size: tuple[int, int], settings: dict[str, Any]
) -> Callable[[], Any]:
    """A function that makes one maze. name: one of SIZES. settings: of the package's task."""
    if name not in SIZES:
        raise UnknownTaskError(
            f"envs.make: expected one of {', '.join(f'memorymaze_{n}' for n in SIZES)}, got {who!r}"
        )
    tasks = _import_tasks(who)
    build = getattr(tasks, f"memory_maze_{name}")
    return lambda: MazeEnv(build, size, settings)


def _import_tasks(who: str) -> Any:
    """The package chooses the renderer while it is imported: EGL, unless MUJOCO_GL says else."""
    before = os.environ.get("MUJOCO_GL")
    try:
        with stand_in():
            return importlib.import_module("memory_maze.tasks")
    except ImportError as error:
        raise MissingPackageError(
            f"{who}: expected the package 'memory_maze' to be installed, got {error}; "
            f"run `pip install {PIP}`"
        ) from error
    finally:
        if before is None:
            os.environ.pop("MUJOCO_GL", None)


class MazeEnv:
    """One maze, four decisions a second, 6 actions; the border has the color to look for.

    Episodes end by the time limit alone, which is a truncation.
    """

    render_mode = "rgb_array"

    def __init__(
        self, build: Callable[..., Any], size: tuple[int, int], settings: dict[str, Any]
    ) -> None:
        from gymnasium import spaces

        plain = {"image_only_obs": True, "camera_resolution": max(size)}
        self._make = lambda seed: build(seed=seed, **{**plain, **settings})
        self._env = self._make(0)
        self._image: np.ndarray | None = None
        self.observation_space = _space(spaces, self._env.observation_spec())
        self.action_space = spaces.Discrete(self._env.action_spec().num_values)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        if seed is not None:
            self._env.close()
            self._env = self._make(seed)
        return self._observe(self._env.reset()), {}

    def step(self, action: Any) -> tuple:
        now = self._env.step(int(action))
        terminated = now.last() and now.discount == 0
        return self._observe(now), float(now.reward), terminated, now.last(), {}

    def _observe(self, now: Any) -> Any:
        seen = now.observation
        self._image = seen["image"] if isinstance(seen, dict) else seen
        return seen

    def render(self) -> np.ndarray:  # (H, W, 3) uint8
        return self._image

    def close(self) -> None:
        self._env.close()


def _space(spaces: Any, spec: Any) -> Any:
    if isinstance(spec, dict):
        return spaces.Dict({name: _space(spaces, child) for name, child in spec.items()})
    if np.dtype(spec.dtype) == np.uint8:
        return spaces.Box(0, 255, spec.shape, np.uint8)
    return spaces.Box(-np.inf, np.inf, spec.shape, spec.dtype)
