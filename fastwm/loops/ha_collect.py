"""Stage collect: episodes of a random policy, many environments at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastwm.episodes import EpisodeStore
from fastwm.loops.evaluate import seed_of
from fastwm.loops.ha_run import HaRun, StageError
from fastwm.worldmodels.ha import SIDE, look
from fastwm.worldmodels.ha_controller import ActionCode

SEEDS = 10  # branch of the run's seed


class RandomActions:
    """Random actions in the form that M reads, (N, A) at every call.

    brownian: a += N(0, 1) / sqrt(50), kept in range. held: uniform, for 1 to 10 steps.
    mixed: uniform, for 1 to 100 steps, short and long times equally likely (by their logarithm),
    so that M also sees what comes of going on. white: uniform, new at every step.
    """

    def __init__(self, kind: str, code: ActionCode, count: int, seed: int) -> None:
        self.kind, self.count = kind, count
        self.low, self.high = code.low(), np.ones(code.model, np.float32)
        self.random = np.random.default_rng(seed)
        self.action = self._uniform(count)
        self.hold = self._holds(count)

    def __call__(self) -> np.ndarray:
        action = self.action.copy()
        if self.kind == "brownian":
            drift = self.random.standard_normal(self.action.shape) / np.sqrt(50)
            self.action = np.clip(self.action + drift, self.low, self.high).astype(np.float32)
            return action
        self.hold -= 1
        over = np.flatnonzero(self.hold <= 0)
        self.action[over], self.hold[over] = self._uniform(len(over)), self._holds(len(over))
        return action

    def _uniform(self, count: int) -> np.ndarray:
        span = self.high - self.low
        return (self.low + span * self.random.random((count, len(span)))).astype(np.float32)

    def _holds(self, count: int) -> np.ndarray:
        if self.kind == "mixed":
            return np.exp(self.random.random(count) * np.log(101)).astype(np.int64)
        return self.random.integers(1, 11 if self.kind == "held" else 2, count)


def collect(run: HaRun, code: ActionCode, key: str) -> None:
    """Fill the store, part by part. A run that was stopped goes on with the next batch."""
    options = run.config.collect
    store = EpisodeStore.create(run.data_folder, (SIDE, SIDE, 3), code.model)
    ends = np.cumsum(options.episodes)
    if len(store) >= ends[-1]:
        run.logger.say(f"collect  {len(store)} episodes are there")
        return
    while len(store) < ends[-1] and not run.stopped:
        part = int(np.searchsorted(ends, len(store), side="right"))
        policy = options.policy[part if len(options.policy) > 1 else 0]
        count = min(int(ends[part]) - len(store), options.envs)
        seed, before = seed_of(run.config.seed, SEEDS, len(store)), len(store)
        for episode in play_random(run, code, key, policy, count, seed):
            if len(episode["image"]) - 1 >= options.min_length:
                store.append(**episode)
        if len(store) == before:
            raise StageError(
                f"collect: expected an episode of at least collect.min_length = "
                f"{options.min_length} decisions, got none among {count}; lower it"
            )
        reached = float(np.add.reduceat(store.reward, store.starts, dtype=np.float64).mean())
        values = {"episodes": len(store), "rows": store.rows, "return": reached}
        run.log({f"collect/{name}": value for name, value in values.items()})
        run.logger.say(
            f"collect  {len(store)} of {ends[-1]} episodes ({policy}), {store.rows} rows, "
            f"random return {reached:.4g}"
        )


def play_random(
    run: HaRun, code: ActionCode, key: str, policy: str, count: int, seed: int
) -> list[dict]:
    """`count` episodes of at most collect.length decisions, as `EpisodeStore.append` takes them.

    policy: a kind of RandomActions.
    """
    config, length = run.config, run.config.collect.length
    random = RandomActions(policy, code, count, seed)
    lanes = run.make_lanes([seed_of(seed, i) for i in range(count)])
    image = np.empty((count, length + 1, SIDE, SIDE, 3), np.uint8)
    action = np.zeros((count, length + 1, code.model), np.float32)
    reward = np.zeros((count, length + 1), np.float32)
    ends, terminal = np.full(count, length), np.zeros(count, bool)
    live = np.arange(count)
    try:
        rows = lanes.reset()
        for t in range(length + 1):
            image[live, t] = seen(rows[key], config.env.rows)
            reward[live, t] = rows["reward"]
            done = rows["is_last"]
            ends[live[done]], terminal[live] = t, rows["is_terminal"]
            live = live[~done]
            if t == length or not len(live):
                break
            action[live, t] = random()[live]
            lanes.send(code.to_env(action[live, t], run.act_space), live)
            rows = lanes.receive()
            run.env_steps += len(live)
    finally:
        lanes.close()
    return [_episode(i, int(ends[i]) + 1, image, action, reward, terminal) for i in range(count)]


def seen(image: np.ndarray, rows: int) -> np.ndarray:
    return look(torch.from_numpy(image), rows).numpy()


def _episode(
    i: int,
    rows: int,
    image: np.ndarray,
    action: np.ndarray,
    reward: np.ndarray,
    terminal: np.ndarray,
) -> dict[str, Any]:
    return {
        "image": image[i, :rows],
        "action": action[i, :rows],
        "reward": reward[i, :rows],
        "terminal": bool(terminal[i]),
    }
