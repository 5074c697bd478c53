"""`python -m fastwm.check_env`: random actions, every row held against the contract."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from fastwm.envs.base import FLAGS, EnvStateError, Rows, VecEnv

RESTORE_STEPS = 50  # decisions after which exact restore is tried


@dataclass
class Report:
    """errors: breaches of the contract.   warnings: legal, but often why nothing is learned."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def error(self, message: str) -> None:
        if message not in self.errors:
            self.errors.append(message)

    def __str__(self) -> str:
        verdict = "FAILED" if self.errors else "ok"
        return "\n".join(
            [
                *self.lines,
                *(f"warning: {message}" for message in self.warnings),
                *(f"error: {message}" for message in self.errors),
                f"{verdict}: {len(self.errors)} errors, {len(self.warnings)} warnings",
            ]
        )


class _Stats:
    """Range, spread and finiteness of one array over all rows."""

    def __init__(self) -> None:
        self.low, self.high, self.total, self.count = np.inf, -np.inf, 0.0, 0
        self.finite, self.constant, self.first = True, True, None

    def add(self, x: np.ndarray) -> None:
        if x.size == 0:
            return
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            self.finite = False
            x = x[np.isfinite(x)]
            if x.size == 0:
                return
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        self.total, self.count = self.total + float(x.sum(dtype=np.float64)), self.count + x.size
        self.first = x[:1].copy() if self.first is None else self.first
        self.constant = self.constant and bool((x == self.first).all()) if self.finite else False

    def __str__(self) -> str:
        mean = self.total / max(1, self.count)
        return f"from {self.low:.4g} to {self.high:.4g}, mean {mean:.4g}"


def check(env: VecEnv, steps: int, seed: int = 0) -> Report:
    """Takes `steps` random decisions in every environment and reports what the rows were like."""
    report, rng = Report(), np.random.default_rng(seed)
    stats = {name: _Stats() for name in [*env.obs_space, "reward"]}
    counts = dict.fromkeys(["episodes", "terminated", "truncated"], 0)
    returns, running = [], np.zeros(env.num_envs)
    rows, last, held = env.reset(), None, []
    spent = 0.0
    for step in range(steps + 1):
        _check_rows(report, env, rows, last)
        if report.errors:
            break
        _count(env, rows, stats, counts, returns, running)
        if step < 4:
            held.append((rows, {name: value.copy() for name, value in rows.items()}))
        if step == min(RESTORE_STEPS, steps):
            rows = _check_restore(report, env, rows, step)
        if step == steps:
            break
        last = rows["is_last"].copy()
        action = random_action(env, rng)
        start = time.perf_counter()
        rows = env.step(action)
        spent += time.perf_counter() - start
    for old, copy in held:
        for name, value in copy.items():
            if not np.array_equal(old[name], value, equal_nan=value.dtype.kind == "f"):
                report.error(f"{name}: expected rows that stay as they are, got them overwritten")
    _describe(report, env, stats, counts, returns, step * env.num_envs / max(spent, 1e-9))
    _judge(report, env, stats, counts)
    return report


def random_action(env: VecEnv, rng: np.random.Generator) -> np.ndarray:  # (N, *act_space.shape)
    """Uniform over choices, or over [-1, 1]."""
    space = env.act_space
    shape = (env.num_envs, *space.shape)
    if space.kind == "discrete":
        return rng.integers(0, np.reshape(space.classes, space.shape), shape).astype(np.int32)
    return rng.uniform(-1, 1, shape).astype(np.float32)


def _check_rows(report: Report, env: VecEnv, rows: Rows, last: np.ndarray | None) -> None:
    wanted = {name: (space.shape, space.dtype) for name, space in env.obs_space.items()}
    wanted |= {"reward": ((), "float32")} | {name: ((), "bool") for name in FLAGS}
    if set(rows) != set(wanted):
        report.error(f"rows: expected the keys {sorted(wanted)}, got {sorted(rows)}")
        return
    for name, (shape, dtype) in wanted.items():
        value, shape = rows[name], (env.num_envs, *shape)
        if value.shape != shape or value.dtype != dtype:
            report.error(
                f"{name}: expected {dtype} of shape {shape}, got {value.dtype} of {value.shape}"
            )
            return
    first, is_last = rows["is_first"], rows["is_last"]
    expected = np.ones(env.num_envs, bool) if last is None else last
    if not np.array_equal(first, expected):
        report.error(f"is_first: expected {expected} after the last row's is_last, got {first}")
    if (first & is_last).any():
        report.error("is_last: expected an episode of at least one decision, got is_first too")
    if (rows["is_terminal"] & ~is_last).any():
        report.error("is_terminal: expected only where is_last, got it elsewhere")
    if rows["reward"][first].any():
        report.error(f"reward: expected 0 where is_first, got {rows['reward'][first]}")


def _count(
    env: VecEnv, rows: Rows, stats: dict, counts: dict, returns: list, running: np.ndarray
) -> None:
    for name in env.obs_space:
        stats[name].add(rows[name])
    stats["reward"].add(rows["reward"][~rows["is_first"]])
    running += rows["reward"]
    counts["episodes"] += int(rows["is_last"].sum())
    counts["terminated"] += int(rows["is_terminal"].sum())
    counts["truncated"] += int((rows["is_last"] & ~rows["is_terminal"]).sum())
    returns += running[rows["is_last"]].tolist()
    running[rows["is_last"]] = 0


def _check_restore(report: Report, env: VecEnv, rows: Rows, step: int) -> Rows:
    try:
        rows = env.load_state_dict(env.state_dict())
        report.lines.append(f"restore: exact (tried after {step} decisions)")
    except EnvStateError as error:
        report.warnings.append(f"not restorable, a resumed run begins new episodes: {error}")
        rows = env.reset()
    return rows


def _describe(
    report: Report, env: VecEnv, stats: dict, counts: dict, returns: list, speed: float
) -> None:
    head = [f"task: {env.task}, {env.num_envs} environments, action_repeat {env.action_repeat}"]
    for name, space in env.obs_space.items():
        head.append(f"observation {name}: {space.kind} {space.dtype} {space.shape}, {stats[name]}")
    act = env.act_space
    classes = f", classes {act.classes}" if act.classes else " in [-1, 1]"
    head.append(f"action: {act.kind} {act.dtype} {act.shape}{classes}")
    head.append(f"reward: {stats['reward']}")
    score = f", mean return {np.mean(returns):.4g}" if returns else ""
    head.append(
        f"episodes: {counts['episodes']} finished ({counts['terminated']} terminated, "
        f"{counts['truncated']} truncated){score}"
    )
    head.append(f"speed: {speed:.0f} env_steps/s with random actions")
    if env.crashes:
        head.append(f"crashes: {env.crashes}")
    report.lines = head + report.lines


def _judge(report: Report, env: VecEnv, stats: dict, counts: dict) -> None:
    for name, space in env.obs_space.items():
        seen = stats[name]
        if not seen.finite:
            report.error(f"{name}: expected finite observations, got NaN or infinity")
        if seen.constant:
            report.warnings.append(f"{name}: the same in every environment and at every step")
        if space.kind == "image":
            _judge_image(report, name, space.shape, seen)
            continue
        if len(space.shape) == 3 and min(space.shape[:2]) >= 16:
            report.warnings.append(f"{name}: looks like a float image; return uint8 for images")
        low, high = env.obs_bounds.get(name, (-np.inf, np.inf))
        if seen.low < np.min(low) - 1e-4 or seen.high > np.max(high) + 1e-4:
            report.warnings.append(
                f"{name}: outside its declared bounds {np.min(low):.4g} to {np.max(high):.4g}"
            )
    reward = stats["reward"]
    if not reward.finite:
        report.error("reward: expected finite rewards, got NaN or infinity")
    size = max(abs(reward.low), abs(reward.high))
    if size == 0:
        report.warnings.append("reward: always 0 with random actions; exploring may be hard")
    elif size < 1e-3 or size > 1e3:
        report.warnings.append(f"reward: largest size {size:.3g}; scale it to about 1")
    if counts["episodes"] == 0:
        report.warnings.append("no episode ended; try more --steps, or give it a time limit")
    if env.crashes:
        report.warnings.append(f"{env.crashes} crashes, each cuts an episode off")


def _judge_image(report: Report, name: str, shape: tuple, seen: _Stats) -> None:
    if seen.high <= 1:
        report.warnings.append(f"{name}: values from 0 to {seen.high:.0f}; uint8 images reach 255")
    if shape[0] % 16 or shape[1] % 16:
        report.warnings.append(
            f"{name}: {shape[0]} x {shape[1]} is no multiple of 16 px, which the convolutional "
            "encoder halves four times; set the option size=(64, 64)"
        )
