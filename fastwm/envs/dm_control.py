"""dm_control's suite with gymnasium's interface, for where envpool is not installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from fastwm.envs.base import UnknownTaskError, import_package

PIP = "dm_control 'mujoco<4'"  # mujoco 4 breaks dm_control 1.0


def suite_factory(
    who: str, name: str, size: tuple[int, int] | None, proprio: bool, camera: int
) -> Callable[[], Any]:
    """A function that makes one task, e.g. "walker_walk". size: of pictures; None: no image."""
    suite = _import_suite(who)
    spaces = import_package("gymnasium.spaces", "gymnasium", who)
    known = {f"{domain}_{task}": (domain, task) for domain, task in suite.ALL_TASKS}
    if name not in known:
        raise UnknownTaskError(
            f"{who}: expected dmc_<domain>_<task> of dm_control's suite, got {name!r}; there are "
            f"{', '.join(sorted(known))}"
        )
    return lambda: SuiteEnv(suite, spaces, known[name], size, proprio, camera)


def _import_suite(who: str) -> Any:
    """dm_control chooses its renderer while it is imported; without a display that is EGL."""
    before = os.environ.get("MUJOCO_GL")
    if before is None and "DISPLAY" not in os.environ:
        os.environ["MUJOCO_GL"] = "egl"
    try:
        return import_package("dm_control.suite", PIP, who)
    finally:
        if before is None:
            os.environ.pop("MUJOCO_GL", None)


class SuiteEnv:
    """One environment. The time limit is a truncation: the suite says so by discount 1."""

    render_mode = "rgb_array"

    def __init__(
        self,
        suite: Any,
        spaces: Any,
        names: tuple[str, str],
        size: tuple[int, int] | None,
        proprio: bool,
        camera: int,
    ) -> None:
        self._size, self._proprio, self._camera = size, proprio, camera
        self._load = lambda seed: suite.load(*names, task_kwargs={"random": seed})
        self._env = self._load(0)
        box = spaces.Box
        found = {}
        if proprio:
            for name, spec in self._env.observation_spec().items():
                found[name] = box(-np.inf, np.inf, spec.shape, np.float64)
        if size is not None:
            found["image"] = box(0, 255, (*size, 3), np.uint8)
        self.observation_space = spaces.Dict(found)
        spec = self._env.action_spec()
        low, high = (np.broadcast_to(side, spec.shape) for side in (spec.minimum, spec.maximum))
        self.action_space = box(low, high, spec.shape, np.float64)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        if seed is not None:
            self._env.close()
            self._env = self._load(seed)
        return self._observe(self._env.reset()), {}

    def step(self, action: np.ndarray) -> tuple:
        now = self._env.step(action)
        terminated = now.last() and now.discount == 0
        return self._observe(now), now.reward or 0.0, terminated, now.last(), {}

    def _observe(self, now: Any) -> dict[str, np.ndarray]:
        seen = dict(now.observation) if self._proprio else {}
        if self._size is not None:
            seen["image"] = self._env.physics.render(*self._size, camera_id=self._camera)
        return seen

    def render(self) -> np.ndarray:  # (240, 320, 3) uint8
        return self._env.physics.render(240, 320, camera_id=self._camera)

    def close(self) -> None:
        self._env.close()
