"""A corridor of your own: `python -m fastwm.train dreamerv3 --task examples.custom_env:make`.

Any gymnasium.Env will do. fastwm calls `make` once per environment, with the options of the task.
"""

from __future__ import annotations

import gymnasium
import numpy as np


class Corridor(gymnasium.Env):
    """Walk to the goal on the right; the view is one-hot. 1 for arriving, -0.01 per step."""

    def __init__(self, size: int = 9) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 1, (size,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(2)  # left, right

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.place = int(self.np_random.integers(0, self.observation_space.shape[0] - 1))
        return self._view(), {}

    def step(self, action):
        goal = self.observation_space.shape[0] - 1
        self.place = int(np.clip(self.place + (1 if action else -1), 0, goal))
        arrived = self.place == goal
        return self._view(), 1.0 if arrived else -0.01, arrived, False, {}

    def _view(self) -> np.ndarray:
        return np.eye(self.observation_space.shape[0], dtype=np.float32)[self.place]


def make(corridor: int = 9) -> gymnasium.Env:
    """Terminated means the future is worth 0; a time limit is only a cut."""
    return gymnasium.wrappers.TimeLimit(Corridor(corridor), max_episode_steps=50)
