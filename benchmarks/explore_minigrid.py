"""How much of a world without rewards on the way each behavior sees while it trains.

    python benchmarks/explore_minigrid.py plan2explore --seed 0 --steps 4000 --out curve.json

The world is MiniGrid's empty room of 14 x 14 cells (or `--world FourRooms`, one fixed layout): the
agent starts in one corner, a single reward waits in the opposite one, an episode ends after 100
decisions. What counts is how many of the cells, and of the pairs of cell and direction, the
training environments have been in. Needs `pip install minigrid`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import gymnasium
import numpy as np

from fastwm import assemble, config

SIDE, CLASSES = 19, 10.0  # cells of the largest side; object types of a view, about

SMALL = (  # networks as in the preset cartpole, and an ensemble to go with them
    "--envs 8 --batch_size 8 --batch_length 32 --train_ratio 32 --imag_last 8 --threads 1 "
    "--rssm.deter 128 --expl.disag_models 8 --expl.disag_layers 2 --expl.disag_units 64 "
    # A short horizon: values of the disagreement must be learned within a few hundred updates.
    "--expl.disag_log false --expl.intr_scale 10 --discount_horizon 20 "
    "--log.tensorboard false --log.every_s 0 --eval.every 0 --checkpoint.every 0"
).split()


class Corner(gymnasium.ObservationWrapper):
    """Walking only; the agent sees the kinds of objects in view, its place and its direction."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.action_space = gymnasium.spaces.Discrete(3)  # left, right, forward
        self.observation_space = gymnasium.spaces.Dict(
            view=gymnasium.spaces.Box(0.0, 2.0, (49,), np.float32),
            place=gymnasium.spaces.Box(0.0, 1.0, (2,), np.float32),
            direction=gymnasium.spaces.Discrete(4),
        )

    def observation(self, observation: dict) -> dict:
        view = observation["image"][..., 0].reshape(-1).astype(np.float32) / CLASSES
        place = np.array(self.unwrapped.agent_pos, np.float32) / SIDE
        return {"view": view, "place": place, "direction": int(observation["direction"])}


def make(world: str = "Empty-16x16") -> gymnasium.Env:
    """The task, for `--task explore_minigrid:make`."""
    from minigrid.wrappers import ReseedWrapper

    corners = {"agent_pos": (2, 2), "goal_pos": (16, 16)} if world == "FourRooms" else {}
    env = gymnasium.make(f"MiniGrid-{world}-v0", max_steps=100, **corners)
    return Corner(ReseedWrapper(env, seeds=(0,)))


def measure(argv: list[str], steps: int, every: int) -> dict:
    """Train for `steps` env_steps and count what was seen, every `every`."""
    settings, _ = config.load(argv)
    curve, seen, rewards, start = [], set(), 0.0, time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        run = assemble.online_run(settings, Path(folder))
        run.begin(None)
        while run.env_steps < steps:
            places = np.rint(run.rows["place"] * SIDE).astype(int).tolist()
            directions = run.rows["direction"].tolist()
            seen |= {(*p, d) for p, d in zip(places, directions, strict=True)}
            rewards += float(run.rows["reward"].sum())
            run.act()
            run.learn()
            run.receive()
            if run.env_steps % every == 0:
                cells = len({(x, y) for x, y, _ in seen})
                cpu = round(time.process_time() - start, 1)
                curve.append({"env_steps": run.env_steps, "cells": cells, "states": len(seen),
                              "rewards": round(rewards, 2), "cpu_s": cpu})  # fmt: skip
                print(json.dumps(curve[-1]), flush=True)
        run.logger.close()
        run.envs.close()
    return {"command": argv, "updates": run.updates, "curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("behavior", choices=["greedy", "random", "plan2explore"])
    parser.add_argument("--algorithm", default="dreamerv3", help="or dreamerv3_2023")
    parser.add_argument("--world", default="Empty-16x16", help="or FourRooms")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--every", type=int, default=400)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    argv = [args.algorithm, "cartpole", *SMALL, "--task", "explore_minigrid:make"]
    argv += ["--seed", args.seed, "--expl.behavior", args.behavior]
    argv += ["--env.options.world", args.world]
    found = measure(argv, args.steps, args.every)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
