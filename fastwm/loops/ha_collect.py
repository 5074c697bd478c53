"""Stage collect: episodes of a random policy, many environments at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastwm.agents.ha import HaPolicy
from fastwm.episodes import EpisodeStore
from fastwm.loops.evaluate import seed_of
from fastwm.loops.ha_run import HaRun, StageError
from fastwm.worldmodels.ha import SIDE, look
from fastwm.worldmodels.ha_controller import ActionCode

SEEDS = 10  # branch of the run's seed


# pictures (n, H, W, 3) of the lanes that still run, and their numbers (n,) -> actions (n, A)
Act = Callable[[np.ndarray, np.ndarray], np.ndarray]
LoadPolicy = Callable[[], HaPolicy]


class RandomActions:
    """Random actions of N lanes in the form that M reads, whatever the pictures show.

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

    def __call__(self, image: np.ndarray, live: np.ndarray) -> np.ndarray:
        return self.step()[live]

    def step(self) -> np.ndarray:  # (N, A)
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


class PolicyActions:
    """What V, M and C do, z drawn anew at every step, in the form that M reads."""

    def __init__(self, policy: HaPolicy, count: int, seed: int) -> None:
        self.policy, self.state = policy, policy.initial_state(count)
        device = policy.params.device
        self.first = torch.ones(count, dtype=torch.bool, device=device)
        self.generator = torch.Generator(device).manual_seed(seed)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, live: np.ndarray) -> np.ndarray:
        lanes = torch.from_numpy(live).to(self.first.device)
        state = {name: value[lanes] for name, value in self.state.items()}
        obs = {self.policy.key: torch.from_numpy(image).to(lanes.device)}
        _, state = self.policy.step(obs, state, self.first[lanes], "sample", self.generator)
        for name, value in state.items():
            self.state[name][lanes] = value
        self.first[:] = False
        return state["action"].cpu().numpy()


def collect(run: HaRun, code: ActionCode, key: str, load_policy: LoadPolicy) -> None:
    """Fill the store, part by part: chance first, in later rounds the controller of the one before.

    load_policy: loads V, M and the best C. A run that was stopped goes on with the next batch.
    """
    options = run.config.collect
    store = EpisodeStore.create(run.data_folder, (SIDE, SIDE, 3), code.model)
    ends = np.cumsum([*options.episodes, *[options.again] * run.round])
    if len(store) >= ends[-1]:
        run.logger.say(f"collect  {len(store)} episodes are there")
        return
    policy = load_policy() if run.round else None
    while len(store) < ends[-1] and not run.stopped:
        part = int(np.searchsorted(ends, len(store), side="right"))
        count = min(int(ends[part]) - len(store), options.envs)
        seed = seed_of(run.config.seed, SEEDS, len(store))
        if part < len(options.episodes):
            name = options.policy[part if len(options.policy) > 1 else 0]
            act: Act = RandomActions(name, code, count, seed)
        else:
            name, act = "controller", PolicyActions(policy, count, seed)
        found = play(run, code, key, act, count, seed)
        kept = [episode for episode in found if len(episode["image"]) > options.min_length]
        if not kept:
            raise StageError(
                f"collect: expected an episode of at least collect.min_length = "
                f"{options.min_length} decisions, got none among {count}; lower it"
            )
        for episode in kept:
            store.append(**episode)
        reached = float(np.mean([episode["reward"].sum() for episode in kept]))
        values = {"episodes": len(store), "rows": store.rows, "return": reached}
        run.log({f"collect/{name}": value for name, value in values.items()})
        run.logger.say(
            f"collect  {len(store)} of {ends[-1]} episodes, {store.rows} rows; {name}: return "
            f"{reached:.4g}"
        )


def play(
    run: HaRun, code: ActionCode, key: str, act: Act, count: int, seed: int
) -> list[dict[str, Any]]:
    """`count` episodes of at most collect.length decisions, as `EpisodeStore.append` takes them."""
    config, length = run.config, run.config.collect.length
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
            action[live, t] = act(rows[key][~done], live)
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
