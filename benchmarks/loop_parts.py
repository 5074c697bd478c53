"""What a step of the training loop costs beside envpool's own, part by part, without updates.

    python benchmarks/loop_parts.py cartpole --envs 64

Every line adds a part to the line before; all take turns on one pool of environments with random
actions. us: median wall time of a step of all environments; cpu: processor time of all threads,
the least of all turns, which other programs hardly disturb; share: of the rate of `envpool.step`
with the same number of threads. Where the adapter chooses that number, the line before it is
`envpool.step` with as many threads as envpool starts by itself.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastwm import config as settings
from fastwm import envs
from fastwm.agents.random import RandomAgent
from fastwm.log import Logger
from fastwm.loops.online import OnlineRun
from fastwm.replay import Replay


def random_actions(env: Any, steps: int) -> list[np.ndarray]:
    agent = RandomAgent(env.obs_space, env.act_space)
    return [agent.act({"is_first": np.zeros(env.num_envs)}, ())[0] for _ in range(steps)]


class Loop:
    """Training of the random agent, with rows into a replay that it never asks for."""

    def __init__(self, env: Any, task: str, folder: Path, **more: Any) -> None:
        flags = {"replay.prefill": 10**9, "checkpoint.every": 0, "eval.every": 0}
        flags |= {"task": task, "envs": env.num_envs, "steps": 10**9, "log.video_every": 0, **more}
        config = settings.resolve("dreamerv3", overrides=flags)[0]
        spec = {key: (space.shape, space.dtype) for key, space in env.obs_space.items()}
        spec |= {"action": (env.act_space.shape, env.act_space.dtype), "reward": ((), "float32")}
        spec |= {name: ((), "bool") for name in ("is_first", "is_last", "is_terminal")}
        replay = Replay(spec, env.num_envs, env.num_envs * 200, config.batch_length)
        logger = Logger(folder, steps=config.steps, every_s=0, tensorboard=config.log.tensorboard)
        agent = RandomAgent(env.obs_space, env.act_space)
        self.run = OnlineRun(config, agent, env, replay, logger, None, folder)
        self.run.begin(None)

    def step(self, action: Any = None) -> None:
        self.run.act()
        self.run.learn()
        self.run.receive()
        self.run.log_if_due()


def parts(task: str, num_envs: int, folder: Path) -> dict[str, Callable[[np.ndarray], None]]:
    """Name -> a step with one action of all environments."""
    env = envs.make(task, num_envs)
    adapter = env.env
    pool, door, native = adapter._pool, adapter._door, adapter._act.batch
    steps: dict[str, Callable] = {}
    if pool.config["num_threads"]:  # the adapter's choice, for quick environments
        plain = envs.make(task, num_envs, num_threads=0).env._pool
        plain.reset()
        steps["its own threads"] = lambda action: plain.step(native(action))
    loops = [
        Loop(env, task, folder / str(i), **{"log.every": every, "log.tensorboard": board})
        for i, (every, board) in enumerate([(10**9, False), (400, False), (400, True)])
    ]
    agent, replay = loops[0].run.agent, loops[0].run.replay

    def compiled(action: np.ndarray) -> None:
        door.send(native(action))
        door.receive()

    def policy(action: np.ndarray) -> dict:
        return env.step(agent.act(loops[0].run.rows, ())[0])

    def stored(action: np.ndarray) -> None:
        replay.add({**policy(action), "action": action})

    return steps | {
        "envpool.step": lambda action: pool.step(native(action)),
        "its compiled step": compiled,
        "+ rows": adapter.step,
        "+ journal": env.step,
        "+ random policy": policy,
        "+ replay": stored,
        "+ loop": loops[0].step,
        "+ metrics.jsonl": loops[1].step,
        "+ TensorBoard": loops[2].step,
    }


def measure(steps: dict[str, Callable], plan: list[np.ndarray], turns: int) -> dict[str, list]:
    """Name -> (wall, processor) microseconds per step of every turn."""
    spent: dict[str, list] = {name: [] for name in steps}
    for turn in range(turns + 1):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for action in plan:
                step(action)
            pair = time.perf_counter() - wall, time.process_time() - cpu
            if turn:  # the first one warms up
                spent[name].append([seconds / len(plan) * 1e6 for seconds in pair])
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="?", default="cartpole")
    parser.add_argument("--envs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100, help="per turn and part")
    parser.add_argument("--turns", type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps = parts(args.task, args.envs, Path(folder))
        plan = random_actions(envs.make(args.task, args.envs), args.steps)
        spent = measure(steps, plan, args.turns)
        for step in steps.values():
            if isinstance(loop := getattr(step, "__self__", None), Loop):
                loop.run.logger.close()  # its thread writes into the folder
    print(f"{args.task}, {args.envs} environments, {args.turns} turns of {args.steps} steps")
    print(f"{'':20}{'us':>8}{'cpu':>8}{'share':>8}{'of cpu':>8}")
    table = {k: (np.median(v, 0)[0], np.min(v, 0)[1]) for k, v in spent.items()}
    raw = table["envpool.step"]  # with the threads that all the parts have
    for name, (wall, cpu) in table.items():
        print(f"{name:20}{wall:8.0f}{cpu:8.0f}{raw[0] / wall:8.2f}{raw[1] / cpu:8.2f}")


if __name__ == "__main__":
    main()
