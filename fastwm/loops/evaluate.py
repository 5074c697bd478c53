"""Plays episodes with a frozen agent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastwm.checkpoint import write_with
from fastwm.log import gif, open_bar
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
    watch: Sequence[Watcher] = (),
    record: Callable[[dict, np.ndarray, dict], None] | None = None,
) -> dict[str, list]:
    """Scores of exactly `episodes` whole episodes.

    Every environment plays a quota that is fixed beforehand. Taking whichever episodes end first
    would prefer short ones, and on CartPole that means the failures.

    Args:    agent: has act and initial_state. make_envs: (num_envs, seed) -> VecEnv, closed again
             here. episodes, envs: how many, on how many in parallel at most. mode: "greedy" or
             "sample". seed: of the environments and of the agent's noise. max_steps: actions after
             which an episode counts as it stands, and what follows as another one; 0: never.
             watch: each called with (numbers of the environments whose episodes count, rows, envs)
             at every row; a row where an episode was counted has is_last. record: called with
             (rows, actions, latents) at every decision.
    Returns: "scores" (sums of rewards), "lengths" (actions taken) and "cut" (whether it was longer
             than max_steps), ordered by environment.
    The agent's own generators and state are not touched: training goes on as if nothing happened.
    """
    count = min(envs, episodes)
    tally = Tally(count, episodes, max_steps)
    noise = torch.Generator(agent.device).manual_seed(seed)
    vec_env = make_envs(count, seed)
    try:
        rows, state = vec_env.reset(), agent.initial_state(count)
        while True:
            counted = tally.open
            over = tally.add(rows)
            for look in watch:
                look(np.flatnonzero(counted), {**rows, "is_last": over}, vec_env)
            if not tally.open.any():
                return tally.found()
            action, state, latents = agent.act(rows, state, mode, noise)
            if record is not None:
                record(rows, action, latents)
            rows = vec_env.step(action)
    finally:
        vec_env.close()


class Tally:
    """Scores of the episodes that count, `episodes` of them shared out over `count` environments.

    max_steps: actions after which an episode counts as it stands; 0: never.
    """

    def __init__(self, count: int, episodes: int, max_steps: int) -> None:
        self.quota = np.full(count, episodes // count) + (np.arange(count) < episodes % count)
        self.episodes: list[list[tuple[float, int, bool]]] = [[] for _ in range(count)]
        self.score, self.length = np.zeros(count), np.zeros(count, np.int64)
        self.max_steps = max_steps

    @property
    def open(self) -> np.ndarray:
        """(N,) bool: environments that still owe episodes."""
        return np.array([len(done) for done in self.episodes]) < self.quota

    def add(self, rows: dict[str, np.ndarray]) -> np.ndarray:
        """Count a row of every environment; returns where an episode ends or is cut off."""
        self.score = np.where(rows["is_first"], 0.0, self.score) + rows["reward"]
        self.length = np.where(rows["is_first"], 0, self.length + 1)
        over = rows["is_last"] | (self.length >= self.max_steps if self.max_steps else False)
        for i in np.flatnonzero(over & self.open):
            cut = not rows["is_last"][i]
            self.episodes[i].append((float(self.score[i]), int(self.length[i]), cut))
        self.score = np.where(over, 0.0, self.score)
        self.length = np.where(over, 0, self.length)
        return over

    def found(self) -> dict[str, list]:
        """scores, lengths and cut of all episodes, ordered by environment."""
        every = [episode for done in self.episodes for episode in done]
        names = ("scores", "lengths", "cut")
        return {name: [episode[i] for episode in every] for i, name in enumerate(names)}


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


class Progress:
    """Watches an evaluation and shows how far it is, on stderr: a context manager around it."""

    def __init__(self, episodes: int) -> None:
        self.bar, self.steps = open_bar(episodes, "episodes", leave=False), 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def __call__(self, counted: np.ndarray, rows: dict[str, np.ndarray], envs: Any) -> None:
        self.steps += len(counted)
        self.bar.set_description_str(f"{self.steps:,} steps", refresh=False)
        self.bar.update(np.count_nonzero(rows["is_last"][counted]))


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
