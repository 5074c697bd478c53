"""The row contract: golden streams of a counting environment through every adapter."""

from __future__ import annotations

import numpy as np
import pytest

from fastwm import envs

gymnasium = pytest.importorskip("gymnasium")

LENGTHS = (2, 3, 5)


class Counting(gymnasium.Env):
    """Episode e of environment i lasts LENGTHS[i] steps; odd episodes terminate, even are cut."""

    observation_space = gymnasium.spaces.Box(-1, 100, (2,), np.float64)
    action_space = gymnasium.spaces.Discrete(100)

    def __init__(self, index: int) -> None:
        self.index, self.length, self.seen = index, LENGTHS[index], []

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return self._observe(), {}

    def step(self, action):
        self.count += 1
        done = self.count == self.length
        return self._observe(), 10.0 * self.count + action / 100, done and self.index == 1, done, {}

    def _observe(self):
        return np.array([self.count, self.index], np.float64)


def expected_rows(steps: int):
    """The stream, row by row, without any vector logic: (count, first, last, terminal)."""
    rows = []
    for i, length in enumerate(LENGTHS):
        episode = [(c, c == 0, c == length, c == length and i == 1) for c in range(length + 1)]
        rows.append((episode * steps)[: steps + 1])
    return rows


def counting_envs():
    from fastwm.envs.gymnasium import GymEnv, GymVectorEnv

    def single():
        indices = iter(range(3))
        return GymEnv(lambda: Counting(next(indices)), 3)

    def vector(mode, kind=gymnasium.vector.SyncVectorEnv, **options):
        factories = [lambda i=i: Counting(i) for i in range(3)]
        return GymVectorEnv(kind(factories, autoreset_mode=mode, **options))

    modes = gymnasium.vector.AutoresetMode
    kinds = {"sync": gymnasium.vector.SyncVectorEnv, "async": gymnasium.vector.AsyncVectorEnv}
    cases = {"single": single}
    for mode in modes:
        for name, kind in kinds.items():
            cases[f"{name}-{mode.name}"] = lambda mode=mode, kind=kind: vector(mode, kind)
        cases[f"nocopy-{mode.name}"] = lambda mode=mode: vector(mode, copy=False)
    return cases


@pytest.mark.parametrize("name", counting_envs())
def test_golden_stream(name):
    env = counting_envs()[name]()
    steps = 24
    rows = [env.reset()]
    actions = np.stack([(7 * np.arange(3) + t) % 100 for t in range(steps)]).astype(np.int32)
    for action in actions:
        rows.append(env.step(action))
    env.close()
    for i, stream in enumerate(expected_rows(steps)):
        for t, (count, first, last, terminal) in enumerate(stream):
            row = {key: value[i] for key, value in rows[t].items()}
            assert row["vector"].tolist() == [count, i], (i, t)
            assert row["is_first"] == first and row["is_last"] == last, (i, t)
            assert row["is_terminal"] == terminal, (i, t)
            # Every reward is the answer to the caller's own action; a first row has none.
            reward = 0.0 if first else 10 * count + actions[t - 1, i] / 100
            assert row["reward"] == np.float32(reward), (i, t)
    assert {value.dtype.name for value in rows[-1].values()} == {"float32", "bool"}


@pytest.mark.parametrize("task", ["cartpole", "pendulum", "dummy", "dummy_image"])
def test_make(task):
    with envs.make(task, 3, seed=4) as env:
        assert env.reset()["is_first"].all()
        action = np.zeros((3, *env.act_space.shape), env.act_space.dtype)
        rows = env.step(action)
        for name, space in env.obs_space.items():
            assert rows[name].shape == (3, *space.shape)
            assert rows[name].dtype == space.dtype
