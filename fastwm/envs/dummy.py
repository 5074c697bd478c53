"""Deterministic toys for tests: a counter with unequal episodes, and a picture to act on."""

from __future__ import annotations

import numpy as np

from fastwm.envs.base import (
    EnvError,
    EnvOptionError,
    Rows,
    VecEnv,
    check_action,
    check_num_envs,
    make_rows,
)
from fastwm.spaces import Space


class DummyEnv(VecEnv):
    """Counts steps. Environment i has episodes of `lengths[i]` decisions (3, 4, 5, ... by default).

    Observation "vector" (3,): [steps in the episode, finished episodes, i]. Reward: the step count.
    Every odd episode ends by termination, every even one (the first is number 0) by truncation.
    """

    def __init__(
        self, num_envs: int, seed: int = 0, *, lengths: tuple[int, ...] | None = None
    ) -> None:
        self.task, self.seed = "dummy", int(seed)
        self.num_envs = check_num_envs(self.task, num_envs)
        default = 3 + np.arange(self.num_envs)
        self._lengths = default if lengths is None else np.asarray(lengths, np.int64)
        if self._lengths.shape != (self.num_envs,) or self._lengths.min() < 1:
            raise EnvOptionError(
                f"dummy: expected lengths >= 1 of shape (N,) = ({self.num_envs},), got {lengths}"
            )
        self.obs_space = {"vector": Space("vector", (3,))}
        self.act_space = Space("discrete", (), (2,))
        self._last: np.ndarray | None = None

    def reset(self) -> Rows:
        self._count = np.zeros(self.num_envs, np.int64)
        if self._last is None:
            self._episode = np.zeros(self.num_envs, np.int64)
        else:
            self._episode = self._episode + 1
        self._last = np.zeros(self.num_envs, bool)
        return self._row(np.ones(self.num_envs, bool), None)

    def step(self, action: np.ndarray) -> Rows:  # (N,)
        if self._last is None:
            raise EnvError(f"{self.task}: expected reset() before the first step(), got step()")
        action = check_action(self.task, self.act_space, self.num_envs, action)
        first = self._last
        self._count = np.where(first, 0, self._count + 1)
        self._episode = self._episode + first
        return self._row(first, action)

    def _row(self, first: np.ndarray, action: np.ndarray | None) -> Rows:
        last = ~first & (self._count == self._lengths)
        terminal = last & (self._episode % 2 == 1)
        reward = np.where(first, 0, self._reward(action)).astype(np.float32)
        self._last = last.copy()
        return make_rows(self._observe(), reward, first.copy(), last, terminal)

    def _reward(self, action: np.ndarray | None) -> np.ndarray:
        return self._count

    def _observe(self) -> Rows:
        columns = [self._count, self._episode, np.arange(self.num_envs)]
        return {"vector": np.stack(columns, 1).astype(np.float32)}


class DummyImageEnv(DummyEnv):
    """A white square, left or right by a fixed pattern; reward 1 for the action naming the side.

    The picture after t decisions shows the side for decision t + 1, so that looking pays. Episodes
    last `length` decisions and end by truncation.
    """

    def __init__(self, num_envs: int, seed: int = 0, *, size: int = 64, length: int = 20) -> None:
        num_envs = check_num_envs("dummy_image", num_envs)
        super().__init__(num_envs, seed, lengths=(length,) * num_envs)
        self.task, self._size = "dummy_image", int(size)
        self.obs_space = {"image": Space("image", (self._size, self._size, 3))}

    def _side(self, count: np.ndarray) -> np.ndarray:
        # Knuth's multiplicative hash: cheap, the same on every machine, not periodic for an agent.
        place = count + 97 * self._episode + 31 * np.arange(self.num_envs) + self.seed
        return (place * 2654435761 >> 13) & 1

    def _reward(self, action: np.ndarray | None) -> np.ndarray:
        return np.zeros(self.num_envs) if action is None else action == self._side(self._count - 1)

    def _row(self, first: np.ndarray, action: np.ndarray | None) -> Rows:
        rows = super()._row(first, action)
        rows["is_terminal"][:] = False
        return rows

    def _observe(self) -> Rows:
        size, third = self._size, self._size // 3
        image = np.zeros((self.num_envs, size, size, 3), np.uint8)
        side = self._side(self._count)
        image[side == 0, third : 2 * third, :third] = 255
        image[side == 1, third : 2 * third, -third:] = 255
        return {"image": image}

    def render(self) -> np.ndarray | None:  # (N, H, W, 3) uint8
        return None if self._last is None else self._observe()["image"]
