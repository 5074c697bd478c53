"""Environments: our rows against envpool's own step, with random actions, in one run.

extra_info: share_of_raw is raw time over our time, medians of alternating rounds; env_steps_per_s
counts decisions of all environments together.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from fastwm import envs
from fastwm.envs.base import spread_seeds
from fastwm.envs.convert import resize

pytest.importorskip("envpool")
CASES = {
    "cartpole": ("CartPole-v1", {}),
    "atari_pong": (
        "Pong-v5",
        {"img_height": 64, "img_width": 64, "gray_scale": False, "stack_num": 1},
    ),
    "carracing": ("CarRacing-v3", {}),
}


def actions(task: str, steps: int, num_envs: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if task == "carracing":
        return rng.uniform(0, 1, (steps, num_envs, 3)).astype(np.float32)
    return rng.integers(0, 2, (steps, num_envs)).astype(np.int32)


def step_all(env, plan):
    for action in plan:
        env.step(action)


@pytest.mark.parametrize("num_envs", [8, 16, 64])
def test_cartpole(benchmark, num_envs):
    compare(benchmark, "cartpole", num_envs, steps=200, rounds=30)


@pytest.mark.parametrize("task", ["atari_pong", "carracing"])
def test_images(benchmark, task):
    compare(benchmark, task, 8, steps=25, rounds=5)


def compare(benchmark, task: str, num_envs: int, steps: int, rounds: int) -> None:
    """Times our step; envpool's own takes its turn before every round, on the same machine load."""
    import envpool

    env_id, settings = CASES[task]
    benchmark.group = f"{task}, {steps} steps"
    seeds = spread_seeds(0, num_envs)
    raw = envpool.make_gymnasium(env_id, num_envs=num_envs, seed=seeds, **settings)
    ours = envs.make(task, num_envs)
    plan, spent = actions(task, steps, num_envs), []
    for env in (raw, ours):
        env.reset()
        step_all(env, plan)

    def raw_first():
        start = time.perf_counter()
        step_all(raw, plan)
        spent.append(time.perf_counter() - start)

    benchmark.pedantic(step_all, (ours, plan), setup=raw_first, rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = benchmark.stats.stats.median
    benchmark.extra_info["env_steps_per_s"] = round(steps * num_envs / median)
    benchmark.extra_info["raw_env_steps_per_s"] = round(steps * num_envs / np.median(spent))
    benchmark.extra_info["share_of_raw"] = round(float(np.median(spent)) / median, 3)
    # The fastest rounds of both: what a busy machine cannot hide.
    benchmark.extra_info["share_of_raw_best"] = round(min(spent) / benchmark.stats.stats.min, 3)


@pytest.mark.parametrize("kind", ["pillow", "ours"])
def test_resize(benchmark, kind):
    """16 pictures of 96 x 96 to 64 x 64."""
    image = pytest.importorskip("PIL.Image")
    x = np.random.default_rng(0).integers(0, 256, (16, 96, 96, 3), dtype=np.uint8)
    benchmark.group = "resize 16 x 96 x 96 x 3 to 64 x 64"

    def pillow():
        small = [image.fromarray(y).resize((64, 64), image.Resampling.BILINEAR) for y in x]
        return np.stack([np.asarray(y) for y in small])

    benchmark(pillow if kind == "pillow" else lambda: resize(x, (64, 64)))
