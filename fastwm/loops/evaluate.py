"""Plays episodes with a frozen agent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Watcher = Callable[[np.ndarray, dict[str, np.ndarray], Any], None]


def evaluate(
    agent: Any,
    make_envs: Callable[[int, int], Any],
    *,
    episodes: int,
    envs: int,
    mode: str,
    seed: int,
    watch: Watcher | None = None,
) -> dict[str, list]:
    """Scores of exactly `episodes` whole episodes.

    Every environment plays a quota that is fixed beforehand. Taking whichever episodes end first
    would prefer short ones, and on CartPole that means the failures.

    Args:    agent: has act and initial_state. make_envs: (num_envs, seed) -> VecEnv, closed again
             here. episodes, envs: how many, on how many in parallel at most. mode: "greedy" or
             "sample". seed: of the environments and of the agent's noise. watch: called with
             (numbers of the environments whose episodes count, rows, envs) at every row.
    Returns: "scores" (sums of rewards) and "lengths" (actions taken), ordered by environment.
    The agent's own generators and state are not touched: training goes on as if nothing happened.
    """
    count = min(envs, episodes)
    quota = np.full(count, episodes // count) + (np.arange(count) < episodes % count)
    scores: list[list[float]] = [[] for _ in range(count)]
    lengths: list[list[int]] = [[] for _ in range(count)]
    score, length = np.zeros(count), np.zeros(count, np.int64)
    noise = torch.Generator(agent.device).manual_seed(seed)
    vec_env = make_envs(count, seed)
    try:
        rows, state = vec_env.reset(), agent.initial_state(count)
        while True:
            score = np.where(rows["is_first"], 0.0, score) + rows["reward"]
            length = np.where(rows["is_first"], 0, length + 1)
            counted = np.array([len(done) for done in scores]) < quota
            if watch is not None:
                watch(np.flatnonzero(counted), rows, vec_env)
            for i in np.flatnonzero(rows["is_last"] & counted):
                scores[i].append(float(score[i]))
                lengths[i].append(int(length[i]))
            if all(len(done) == n for done, n in zip(scores, quota, strict=True)):
                break
            action, state, _ = agent.act(rows, state, mode, noise)
            rows = vec_env.step(action)
    finally:
        vec_env.close()
    return {
        "scores": [s for done in scores for s in done],
        "lengths": [n for done in lengths for n in done],
    }


def seed_of(seed: int, *branch: int) -> int:
    """A seed below 2**31 that is far from those of other branches, e.g. of other env_steps."""
    return int(np.random.SeedSequence([seed, *branch]).generate_state(1)[0] & 0x7FFFFFFF)
