"""One whole DreamerV3 update, its parts, and what surrounds it in a run.

`pytest benchmarks/bench_train.py` times the update, fused against plain PyTorch, interleaved.
`python benchmarks/bench_train.py [PRESET]` prints where the time goes, the time from process start
to the first update, bytes per replay row, and acting beside the raw environment.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastwm import assemble, envs, ops
from fastwm import config as configs
from fastwm.agents.dreamer import DreamerAgent
from fastwm.replay import Replay
from fastwm.spaces import Space

VECTOR = {"vector": Space("vector", (24,))}
IMAGE = {"image": Space("image", (64, 64, 3))}
ACTION = Space("discrete", (), (6,))


assemble.keep_freed_memory()  # as every run does


def make_agent(preset: str, obs_space: dict[str, Space], device: str = "cpu") -> DreamerAgent:
    config, _ = configs.resolve("dreamerv3", [preset])
    return DreamerAgent(obs_space, ACTION, config, device=device)


def make_replay(agent: DreamerAgent, rows: int = 4096, num_envs: int = 8) -> Replay:
    """A replay filled with random rows."""
    config = agent.config
    replay = Replay(agent.replay_spec(), num_envs, rows, config.batch_length, seed=0)
    source = np.random.default_rng(0)
    rssm = agent.model.world.rssm
    for _ in range(rows // num_envs):
        row = {
            "reward": source.random(num_envs, np.float32),
            "action": source.integers(0, 6, num_envs).astype(np.int32),
            "deter": torch.rand(num_envs, rssm.deter).to(torch.bfloat16),
            "stoch": source.integers(0, rssm.classes, (num_envs, rssm.stoch)).astype(np.uint8),
        }
        for key in ("is_first", "is_last", "is_terminal"):
            row[key] = source.random(num_envs) < 0.02
        for key, space in agent.obs_space.items():
            if space.kind == "image":
                row[key] = source.integers(0, 256, (num_envs, *space.shape)).astype(np.uint8)
            else:
                row[key] = source.normal(size=(num_envs, *space.shape)).astype(np.float32)
        replay.add(row)
    return replay


def whole_update(agent: DreamerAgent, replay: Replay) -> None:
    """Replay in, replay out."""
    batch = replay.sample(agent.config.batch_size)
    _, latents = agent.update(batch)
    replay.update_latents(batch["ids"], latents["deter"].cpu(), latents["stoch"].cpu())
    if agent.device.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("kind", ["vector", "image"])
def bench_update(benchmark, backend, kind):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    agent = make_agent("size1m", VECTOR if kind == "vector" else IMAGE, device)
    replay = make_replay(agent)
    config = agent.config
    benchmark.group = f"update size1m {kind} B{config.batch_size} T{config.batch_length} {device}"
    benchmark.extra_info["parameters"] = agent.parameter_counts()["total"]
    with ops.use_backend(backend):
        benchmark.pedantic(whole_update, (agent, replay), rounds=10, warmup_rounds=3)


class Stopwatch:
    """Milliseconds by name, one list of samples each."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {}

    def __call__(self, name: str, function, *args):
        start = time.perf_counter()
        result = function(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.samples.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
        return result

    def row(self, name: str) -> tuple[float, float]:
        """Median and interquartile range."""
        low, middle, high = statistics.quantiles(self.samples[name], n=4)
        return middle, high - low


def split_update(agent: DreamerAgent, replay: Replay, clock: Stopwatch) -> None:
    """The same work as `whole_update`, one clock per part."""
    batch = agent.to_device(clock("replay sample", replay.sample, agent.config.batch_size))
    noise = agent.draw_noise(*batch["is_first"].shape)
    world = agent.model.world
    _, post = clock("encoder + posterior sequence", world.observe, batch, noise.posterior)
    terms, _ = clock("world-model heads and losses", world.losses, batch, post)
    length = post.deter.shape[1]
    with torch.no_grad():
        clock("imagination rollout (part of the next)", agent.imagine, post, length, noise)
    more, _, _ = clock(
        "actor-critic with rollout", agent.behavior_losses, batch, post, length, noise, True
    )
    total = sum(term.mean() for term in (terms | more).values())
    agent.optimizer.zero_grad()
    clock("backward", total.backward)
    clock("optimizer", agent.optimizer.step, total.detach())
    latents = {"deter": post.deter.detach().bfloat16(), "stoch": post.stoch.argmax(-1).byte()}
    clock("replay write-back", replay.update_latents, batch["ids"], *latents.values())


def report_update(preset: str, rounds: int) -> None:
    agent = make_agent(preset, VECTOR)
    replay, config = make_replay(agent), agent.config
    clocks = {name: Stopwatch() for name in ("reference", "fused")}
    for i in range(rounds + 2):
        for name, clock in clocks.items():  # interleaved, so that a drift hits both
            with ops.use_backend(name):
                used = clock if i >= 2 else Stopwatch()
                used("whole update", whole_update, agent, replay)
                split_update(agent, replay, used)
    print(
        f"\n{preset}, vector observations, {agent.parameter_counts()['total']:,} parameters, "
        f"B{config.batch_size} T{config.batch_length} I{config.imag_horizon}, "
        f"{torch.get_num_threads()} threads; ms, median (IQR) of {rounds}"
    )
    print(f"{'':42}{'plain PyTorch':>18}{'fused':>18}{'times':>8}")
    for name in clocks["fused"].samples:
        (slow, slow_iqr), (fast, fast_iqr) = (clock.row(name) for clock in clocks.values())
        cells = f"{slow:10.1f} ({slow_iqr:5.1f}){fast:10.1f} ({fast_iqr:5.1f})"
        print(f"{name:42}{cells}{slow / fast:8.2f}")
    print(f"bytes per replay row: {replay.bytes_per_row}")


def report_acting(task: str = "cartpole", num_envs: int = 8, seconds: float = 3.0) -> None:
    """Steps per second of the environment alone, with our adapter, and with the policy."""
    config, _ = configs.resolve("dreamerv3", ["cartpole"])
    vec_env = envs.make(task, num_envs, seed=0)
    agent = DreamerAgent(vec_env.obs_space, vec_env.act_space, config)
    rows, state = vec_env.reset(), agent.initial_state(num_envs)
    source = np.random.default_rng(0)
    actions = [source.integers(0, 2, num_envs).astype(np.int32) for _ in range(64)]

    def rate(step) -> float:
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            step(count)
            count += 1
        return count * num_envs / (time.perf_counter() - start)

    def act(_: int) -> None:
        nonlocal rows, state
        action, state, _ = agent.act(rows, state)
        rows = vec_env.step(action)

    adapter = rate(lambda i: vec_env.step(actions[i % 64]))
    import envpool

    raw_env = envpool.make_gymnasium("CartPole-v1", num_envs=num_envs)
    raw_env.reset()
    raw = rate(lambda i: raw_env.step(actions[i % 64]))
    policy = rate(act)
    print(f"\n{task}, {num_envs} environments, env_steps/s: raw envpool {raw:,.0f}, ", end="")
    print(f"adapter {adapter:,.0f} ({adapter / raw:.0%}), with policy {policy:,.0f} ", end="")
    print(f"({policy / raw:.1%}; {1e3 * num_envs / policy:.2f} ms per decision of all)")


def report_start() -> None:
    """Seconds from process start to the first update, on CartPole."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fastwm.train", "dreamerv3", "cartpole"]
        # One update past the start gate, and nothing else.
        command += ["--steps", "776", "--eval.every", "0", "--logdir", str(Path(folder) / "run")]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        print(f"process start to the first update and exit: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    report_update(sys.argv[1] if len(sys.argv) > 1 else "size1m", rounds=10)
    report_acting()
    report_start()
