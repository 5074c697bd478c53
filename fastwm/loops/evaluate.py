"""Plays episodes with a frozen agent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastwm.checkpoint import write_with
from fastwm.log import gif
from fastwm.settings import ConfigError

Watcher = Callable[[np.ndarray, dict[str, np.ndarray], Any], None]


def evaluate(
    agent: Any,
    make_envs: Callable[[int, int], Any],
    *,
    episodes: int,
    envs: int,
    mode: str,
    seed: int,
    max_steps: int = 0,
    watch: Watcher | None = None,
) -> dict[str, list]:
    """Scores of exactly `episodes` whole episodes.

    Every environment plays a quota that is fixed beforehand. Taking whichever episodes end first
    would prefer short ones, and on CartPole that means the failures.

    Args:    agent: has act and initial_state. make_envs: (num_envs, seed) -> VecEnv, closed again
             here. episodes, envs: how many, on how many in parallel at most. mode: "greedy" or
             "sample". seed: of the environments and of the agent's noise. max_steps: actions after
             which an episode counts as it stands, and what follows as another one; 0: never.
             watch: called with (numbers of the environments whose episodes count, rows, envs) at
             every row; a row where an episode was counted has is_last.
    Returns: "scores" (sums of rewards), "lengths" (actions taken) and "cut" (whether it was longer
             than max_steps), ordered by environment.
    The agent's own generators and state are not touched: training goes on as if nothing happened.
    """
    count = min(envs, episodes)
    quota = np.full(count, episodes // count) + (np.arange(count) < episodes % count)
    scores: list[list[float]] = [[] for _ in range(count)]
    lengths: list[list[int]] = [[] for _ in range(count)]
    cuts: list[list[bool]] = [[] for _ in range(count)]
    score, length = np.zeros(count), np.zeros(count, np.int64)
    noise = torch.Generator(agent.device).manual_seed(seed)
    vec_env = make_envs(count, seed)
    try:
        rows, state = vec_env.reset(), agent.initial_state(count)
        while True:
            score = np.where(rows["is_first"], 0.0, score) + rows["reward"]
            length = np.where(rows["is_first"], 0, length + 1)
            counted = np.array([len(done) for done in scores]) < quota
            over = rows["is_last"] | (length >= max_steps if max_steps else False)
            if watch is not None:
                watch(np.flatnonzero(counted), {**rows, "is_last": over}, vec_env)
            for i in np.flatnonzero(over & counted):
                scores[i].append(float(score[i]))
                lengths[i].append(int(length[i]))
                cuts[i].append(not rows["is_last"][i])
            score, length = np.where(over, 0.0, score), np.where(over, 0, length)
            if all(len(done) == n for done, n in zip(scores, quota, strict=True)):
                break
            action, state, _ = agent.act(rows, state, mode, noise)
            rows = vec_env.step(action)
    finally:
        vec_env.close()
    return {
        "scores": [s for done in scores for s in done],
        "lengths": [n for done in lengths for n in done],
        "cut": [c for done in cuts for c in done],
    }


def seed_of(seed: int, *branch: int) -> int:
    """A seed below 2**31 that is far from those of other branches, e.g. of other env_steps."""
    return int(np.random.SeedSequence([seed, *branch]).generate_state(1)[0] & 0x7FFFFFFF)


def summarize(found: dict[str, list]) -> dict[str, float]:
    """Mean, standard deviation and number of the scores of `evaluate`."""
    scores = np.asarray(found["scores"], np.float64)
    return {
        "mean": float(scores.mean()),
        "std": float(scores.std()),
        "n": len(scores),
        "min": float(scores.min()),
        "max": float(scores.max()),
        "length": float(np.mean(found["lengths"])),
        "cut": sum(found["cut"]),
    }


class Film:
    """Watches one environment and writes every episode as <folder>/episode-<number>.gif.

    Pictures come from render(), or from the image observation where there is none.
    """

    def __init__(self, folder: Path, fps: int) -> None:
        self.folder, self.fps = folder, fps
        self.frames: list[np.ndarray] = []
        self.paths: list[Path] = []

    def __call__(self, counted: np.ndarray, rows: dict[str, np.ndarray], envs: Any) -> None:
        if 0 not in counted:
            return
        if rows["is_first"][0]:
            self.frames = []
        self.frames.append(self._picture(rows, envs))
        if rows["is_last"][0]:
            path = self.folder / f"episode-{len(self.paths):03d}.gif"
            write_with(path, lambda partial: partial.write_bytes(gif(self.frames, self.fps)))
            self.paths.append(path)
            self.frames = []

    def _picture(self, rows: dict[str, np.ndarray], envs: Any) -> np.ndarray:
        pictures = envs.render()
        if pictures is not None:
            return pictures[0]
        for key, space in envs.obs_space.items():
            if space.kind == "image":
                image = rows[key][0]
                return image[..., -3:] if image.shape[-1] >= 3 else image[..., -1:].repeat(3, -1)
        raise ConfigError(
            f"play: expected pictures from {envs.task}, got none: it has neither "
            "render() nor an image observation; leave --save-gif out"
        )
