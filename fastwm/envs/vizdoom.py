"""ViZDoom inside envpool: a folder for the files that Doom writes, and the TakeCover game.

Doom writes `_vizdoom.ini` and `_vizdoom/` into the folder that it is started in, which would be
the user's. So envpool is given a two-line script in a temporary folder, which starts each Doom in a
folder of its own there: two that create the same `_vizdoom/` at the same time end in a crash.
"""

from __future__ import annotations

import gc
import os
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastwm.envs.base import EnvOptionError
from fastwm.envs.convert import ObsOptions
from fastwm.envs.envpool import EnvpoolEnv

ROWS_SHOWN, ROWS = 400, 480  # of Doom's picture: the floor below the last fireball is cut off
STAY, RIGHT, LEFT = range(3)  # envpool's combined actions of the buttons MOVE_LEFT, MOVE_RIGHT
LENGTH = 2100  # tics, 60 s at Doom's 35 a second


def sandboxed(env_id: str) -> tuple[dict[str, Any], tempfile.TemporaryDirectory | None]:
    """(settings that start Doom in a folder of its own, that folder); empty for other games.

    The folder must live as long as the pool: see `end`.
    """
    from envpool.registration import registry

    module, _, defaults = registry.specs.get(env_id, ("", "", {}))
    if module != "envpool.vizdoom" or os.name != "posix":
        return {}, None
    folder = tempfile.TemporaryDirectory(prefix="fastwm-doom-", ignore_cleanup_errors=True)
    script = Path(folder.name) / "vizdoom"
    here, doom = shlex.quote(folder.name), shlex.quote(defaults["vzd_path"])
    own = f"{here}/$$"  # the process's number
    script.write_text(f'#!/bin/sh\nmkdir -p {own} && cd {own} && exec {doom} "$@"\n')
    script.chmod(0o700)
    return {"vzd_path": str(script)}, folder


def end(state: dict[str, Any]) -> None:
    """Drops the pool of an EnvpoolEnv's attributes, and then the folder that Doom writes into."""
    state["_pool"] = None
    folder, state["_folder"] = state.get("_folder"), None
    if folder is not None:
        gc.collect()  # an exception may still hold the pool
        folder.cleanup()


class TakeCover(EnvpoolEnv):
    """Stay alive while fireballs come: +1 for every tic, up to 2100 of them.

    Observation: rows 0 to 399 of Doom's 480, as `size` (64 x 64).
    Action:   "discrete" 0 stay, 1 right, 2 left; or "continuous" a in [-1, 1], which goes left
              below -1/3, right above 1/3, and stays in between (Ha & Schmidhuber, 2018).
    Reward:   1 for every decision, also for the one that is answered by death, so the return is
              the number of tics survived. envpool's own is shaped by health and is dropped.
    Episode:  ends by death (is_terminal) or at `length` (not terminal). Doom shows no picture of
              the death itself: the last observation repeats the one before.
    """

    def __init__(
        self,
        num_envs: int,
        seed: int = 0,
        *,
        task: str = "takecover",
        obs: ObsOptions | None = None,
        action_repeat: int = 1,
        actions: str = "discrete",
        length: int = LENGTH,
        seeds: Sequence[int] | None = None,
        num_threads: int = 0,
    ) -> None:
        if actions not in ("discrete", "continuous"):
            raise EnvOptionError(
                f"{task}: expected actions to be 'discrete' or 'continuous', got {actions!r}"
            )
        if length < 1:
            raise EnvOptionError(f"{task}: expected length of at least 1 tic, got {length}")
        obs = obs or ObsOptions()
        self._height, width = obs.size or (64, 64)
        self._continuous = actions == "continuous"
        super().__init__(
            "TakeCover-v1",
            num_envs,
            seed,
            task=task,
            obs=obs,
            action_repeat=action_repeat,
            seeds=seeds,
            num_threads=num_threads,
            use_combined_action=True,
            frame_skip=1,
            stack_num=1,
            max_episode_steps=int(length),
            img_width=width,
            img_height=-(-self._height * ROWS // ROWS_SHOWN),
        )

    def _make_pool(self, *args: Any) -> None:
        super()._make_pool(*args)
        self._pool = _Survival(self._pool, self._height, self._continuous)


class _Survival:
    """envpool's TakeCover with the top of the picture, the reward of staying alive, and buttons."""

    def __init__(self, pool: Any, height: int, continuous: bool) -> None:
        from gymnasium.spaces import Box

        self._pool, self._height, self._continuous = pool, height, continuous
        channels, _, width = pool.observation_space.shape
        self.observation_space = Box(0, 255, (channels, height, width), np.uint8)
        self.action_space = Box(-1, 1, (1,)) if continuous else pool.action_space

    def reset(self) -> tuple[np.ndarray, dict]:
        obs, info = self._pool.reset()
        return obs[:, :, : self._height], info

    def step(self, action: np.ndarray, *ids: np.ndarray) -> tuple:
        self.send(action, *ids)
        return self.recv()

    def send(self, action: np.ndarray, *ids: np.ndarray) -> None:
        self._pool.send(buttons(action[:, 0]) if self._continuous else action, *ids)

    def recv(self) -> tuple:
        obs, reward, *rest = self._pool.recv()
        return obs[:, :, : self._height], np.ones_like(reward), *rest

    def render(self, **options: Any) -> np.ndarray:
        return self._pool.render(**options)


def buttons(action: np.ndarray) -> np.ndarray:  # (N,) in [-1, 1] -> (N,) int32
    """The thirds of [-1, 1] as left, stay, right."""
    third = np.float32(1 / 3)
    return np.where(action < -third, LEFT, np.where(action > third, RIGHT, STAY)).astype(np.int32)
