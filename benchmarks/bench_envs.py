"""Environments: our rows against envpool's own step, with random actions, in one run; and the whole
training loop, random policy and replay writes and metrics.jsonl, without updates (its parts:
loop_parts.py).

extra_info: share_of_raw is raw time over our time, medians of alternating rounds; env_steps_per_s
counts decisions of all environments together. share_of_raw_cpu compares the processor time of all
threads, which other programs hardly disturb.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
from loop_parts import Loop, random_actions

from fastwm import assemble, envs
from fastwm import config as settings
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


def step_all(env, plan):
    for action in plan:
        env.step(action)


@pytest.mark.parametrize("num_envs", [8, 16, 64])
def test_cartpole(benchmark, num_envs):
    compare(benchmark, "cartpole", num_envs, steps=200, rounds=30)


@pytest.mark.parametrize("task", ["atari_pong", "carracing"])
def test_images(benchmark, task):
    compare(benchmark, task, 8, steps=25, rounds=5)


@pytest.mark.parametrize("num_envs", [8, 64])
def test_loop_cartpole(benchmark, num_envs, tmp_path):
    compare(benchmark, "cartpole", num_envs, steps=200, rounds=30, folder=tmp_path)


@pytest.mark.parametrize("task", ["atari_pong", "carracing"])
def test_loop_images(benchmark, task, tmp_path):
    compare(benchmark, task, 64, steps=10, rounds=5, folder=tmp_path)


@pytest.mark.parametrize("task", ["cartpole", "dmc_walker_walk", "atari_pong"])
def test_overlap(benchmark, task, tmp_path):
    """Training with environments that step while the learner updates, and with waiting ones: the
    two take turns, a log interval each. extra_info: share, time of overlapping over waiting."""
    runs, spent = {}, {True: [], False: []}
    for overlap in spent:
        flags = {"task": task, "overlap": overlap, "steps": 10**9, "log.every_s": 0}
        flags |= {"log.tensorboard": False, "log.video_every": 0, "replay.capacity": 20_000}
        flags |= {"checkpoint.every": 0, "eval.every": 0, "batch_length": 32, "train_ratio": 8}
        config = settings.resolve("dreamerv3", ["size1m"], flags)[0]
        runs[overlap] = assemble.online_run(config, tmp_path / str(overlap))
        runs[overlap].begin(None)
    benchmark.group = f"{task}, 16 environments, size1m, updates included"

    def turn(overlap):
        run, start = runs[overlap], time.perf_counter()
        for _ in range(32):  # 512 rows: 8 updates of 16 x 32
            run.act()
            run.learn()
            run.receive()
        spent[overlap].append(time.perf_counter() - start)

    while runs[True].updates == 0 or runs[False].updates == 0:
        turn(True), turn(False)
    spent[True].clear(), spent[False].clear()
    benchmark.pedantic(turn, (True,), setup=lambda: turn(False), rounds=5)
    both = np.median(np.divide(spent[True], spent[False]))
    benchmark.extra_info["share"] = round(float(both), 3)


def compare(benchmark, task: str, num_envs: int, steps: int, rounds: int, folder=None) -> None:
    """Times our step; envpool's own takes its turn before every round, on the same machine load.

    folder: times the whole loop instead, which writes there.
    """
    import envpool

    env_id, settings = CASES[task]
    benchmark.group = f"{task}, {steps} steps"
    seeds = spread_seeds(0, num_envs)
    raw = envpool.make_gymnasium(env_id, num_envs=num_envs, seed=seeds, **settings)
    ours = envs.make(task, num_envs)
    plan, spent = random_actions(ours, steps), []
    native = [ours.env._act.batch(action) for action in plan]  # the same decisions
    for env, choices in ((raw, native), (ours, plan)):
        env.reset()
        step_all(env, choices)
    cpu = {"raw": [], "ours": []}
    loop = Loop(ours, task, folder, **{"log.tensorboard": False}) if folder else None

    def raw_first():
        start, before = time.perf_counter(), time.process_time()
        step_all(raw, native)
        spent.append(time.perf_counter() - start)
        cpu["raw"].append(time.process_time() - before)

    def ours_then():
        before = time.process_time()
        step_all(loop or ours, plan)
        cpu["ours"].append(time.process_time() - before)

    benchmark.pedantic(ours_then, setup=raw_first, rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = benchmark.stats.stats.median
    benchmark.extra_info["env_steps_per_s"] = round(steps * num_envs / median)
    benchmark.extra_info["raw_env_steps_per_s"] = round(steps * num_envs / np.median(spent))
    benchmark.extra_info["share_of_raw"] = round(float(np.median(spent)) / median, 3)
    share = np.median(cpu["raw"]) / np.median(cpu["ours"])
    benchmark.extra_info["share_of_raw_cpu"] = round(float(share), 3)
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
