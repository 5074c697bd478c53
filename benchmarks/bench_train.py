"""One whole DreamerV3 update by size, its parts, and what surrounds it in a run.

    pytest benchmarks/bench_train.py                                       # size1m, in two ways
    python benchmarks/bench_train.py update --sizes size1m size12m --json update.json
    python benchmarks/bench_train.py parts size1m --kind image             # where the time goes
    python benchmarks/bench_train.py acting
    python benchmarks/bench_train.py start                                 # until the first update

`update` takes turns between the ways to run it, one update each, so that a drift hits all of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import machine_line
from torch.utils.flop_counter import FlopCounterMode

from fastwm import assemble, envs, ops
from fastwm import config as configs
from fastwm.agents.dreamer import DreamerAgent
from fastwm.loops.transfer import Transfer
from fastwm.replay import Replay
from fastwm.spaces import Space

VECTOR = {"vector": Space("vector", (24,))}
IMAGE = {"image": Space("image", (64, 64, 3))}
KINDS = {"vector": VECTOR, "image": IMAGE}
ACTION = Space("discrete", (), (6,))
WAYS = {  # kernels or plain PyTorch, and the settings of the update
    "plain": ("reference", {"compile": "off"}),
    "plain-compiled": ("reference", {"compile": "full"}),
    "fastwm": ("fused", {}),
    "fastwm-off": ("fused", {"compile": "off"}),
    "fastwm-ops": ("fused", {"compile": "ops"}),
    "fastwm-full": ("fused", {"compile": "full"}),
}

assemble.keep_freed_memory()  # as every run does


def make_agent(
    preset: str,
    obs_space: dict[str, Space],
    device: str = "cpu",
    act_space: Space = ACTION,
    **settings: str,
) -> DreamerAgent:
    config, _ = configs.resolve("dreamerv3", [preset], settings)
    return DreamerAgent(obs_space, act_space, config, device=device)


def make_transfer(agent: DreamerAgent, rows: int = 4096, storage: str = "ram") -> Transfer:
    """A replay filled with random rows, and the way to the agent's device and back."""
    config, num_envs = agent.config, 8
    where = {"storage": storage, "device": agent.device, "gather": ops.gather_windows}
    replay = Replay(agent.replay_spec(), num_envs, rows, config.batch_length, seed=0, **where)
    source = np.random.default_rng(0)
    rssm = agent.model.world.rssm
    for _ in range(rows // num_envs):
        row = {
            "reward": source.random(num_envs, np.float32),
            "action": draw_actions(agent.act_space, num_envs, source),
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
    return Transfer(replay, agent.device, config.batch_size)


def draw_actions(space: Space, num_envs: int, source: np.random.Generator) -> np.ndarray:
    if space.kind == "discrete":
        return source.integers(0, min(space.classes), (num_envs, *space.shape)).astype(np.int32)
    return source.uniform(-1, 1, (num_envs, *space.shape)).astype(np.float32)


def whole_update(agent: DreamerAgent, transfer: Transfer) -> None:
    """Replay in, replay out, as a run does it; as many updates as the agent runs at once."""
    ids, batches = [], []
    for _ in range(agent.updates_at_once):
        sampled = transfer.sample()
        ids.append(sampled["ids"].clone())
        batches.append(transfer.to_device(sampled))
    results = agent.update_many(batches)
    transfer.wait()
    for i, (metrics, latents) in enumerate(results):
        transfer.write_back(ids[i], latents, metrics["opt/finite"], first=i == 0)
    if agent.device.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("kind", ["vector", "image"])
def bench_update(benchmark, backend, kind):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    agent = make_agent("size1m", VECTOR if kind == "vector" else IMAGE, device)
    transfer = make_transfer(agent)
    config = agent.config
    benchmark.group = f"update size1m {kind} B{config.batch_size} T{config.batch_length} {device}"
    benchmark.extra_info["parameters"] = agent.parameter_counts()["total"]
    with ops.use_backend(backend):
        benchmark.pedantic(whole_update, (agent, transfer), rounds=10, warmup_rounds=3)


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


KINDS_OF_WORK = {  # what a profiler's name is called in the table; the first that fits
    "library products": r"aten::(addmm_?|mm|bmm|addbmm|baddbmm)$|mkldnn::_linear",
    "library convolutions": r"aten::(mkldnn_|cudnn_)?convolution",
    "sequence and rollout": r"fastwm::(rssm_|gru_)",
    "encoder's stages": r"fastwm::pool_conv",
    "decoder's layers": r"fastwm::upsample_",
    "two-hot heads, one-hots": r"fastwm::(twohot_\w*linear|sparse_linear)",
    "losses, norms, samples": r"fastwm::(?!laprop|adam|ema)",
    "optimizer": r"fastwm::(laprop|adam|ema)",
    "copies and zeros": r"aten::(copy_|cat|fill_|zero_|clone|pixel_)",
}


def shares_of_work(agent: DreamerAgent, transfer: Transfer, rounds: int) -> dict[str, float]:
    """Share of the processor's time by kind of work, of whole updates under torch.profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(rounds):
            whole_update(agent, transfer)
    times = dict.fromkeys([*KINDS_OF_WORK, "all else"], 0.0)
    for event in profile.key_averages():
        fits = (kind for kind, name in KINDS_OF_WORK.items() if re.match(name, event.key))
        times[next(fits, "all else")] += event.self_cpu_time_total
    total = sum(times.values())
    return {kind: time / total for kind, time in times.items()}


def product_rate(rounds: int = 9) -> float:
    """FLOP per second of the library's float32 product of two 2048 x 2048 matrices."""
    a, clock = torch.randn(2048, 2048), Stopwatch()
    for _ in range(rounds):
        clock("mm", torch.mm, a, a)
    return 2 * 2048**3 / (1e-3 * clock.row("mm")[0])


def products_and_convolutions(agent: DreamerAgent, transfer: Transfer) -> int:
    """Floating-point operations of one update: those of plain PyTorch, products per step."""
    with ops.use_backend("reference"), FlopCounterMode(display=False) as counter:
        whole_update(agent, transfer)
    return counter.get_total_flops()


def report_parts(preset: str, kind: str, rounds: int) -> None:
    agent = make_agent(preset, KINDS[kind])
    transfer, config = make_transfer(agent), agent.config
    replay = transfer.replay
    clocks = {name: Stopwatch() for name in ("reference", "fused")}
    for i in range(rounds + 2):
        for name, clock in clocks.items():  # interleaved, so that a drift hits both
            with ops.use_backend(name):
                used = clock if i >= 2 else Stopwatch()
                used("whole update", whole_update, agent, transfer)
                split_update(agent, replay, used)
    print(
        f"\n{preset}, {kind}, {agent.parameter_counts()['total']:,} parameters, "
        f"B{config.batch_size} T{config.batch_length} I{config.imag_horizon}, "
        f"{torch.get_num_threads()} threads; ms, median (IQR) of {rounds}"
    )
    print(f"{'':42}{'plain PyTorch':>18}{'fused':>18}{'times':>8}")
    for name in clocks["fused"].samples:
        (slow, slow_iqr), (fast, fast_iqr) = (clock.row(name) for clock in clocks.values())
        cells = f"{slow:10.1f} ({slow_iqr:5.1f}){fast:10.1f} ({fast_iqr:5.1f})"
        print(f"{name:42}{cells}{slow / fast:8.2f}")
    whole = clocks["fused"].row("whole update")[0]
    replay_ms = sum(clocks["fused"].row(f"replay {part}")[0] for part in ("sample", "write-back"))
    print(
        f"replay: {replay_ms / whole:.1%} of the fused update, {replay.bytes_per_row} bytes a row"
    )
    flops, rate = products_and_convolutions(agent, transfer), product_rate()
    print(
        f"products and convolutions of plain PyTorch: {flops / 1e9:.0f} GFLOP, "
        f"{1e3 * flops / rate:.0f} ms at the library's {rate / 1e9:.0f} GFLOP/s"
    )
    for work, share in shares_of_work(agent, transfer, 3).items():
        print(f"{work:42}{share:10.1%}{share * whole:10.1f} ms")


def report_acting(
    device: str, task: str = "cartpole", num_envs: int = 8, seconds: float = 3.0
) -> None:
    """Steps per second of the environment alone, with our adapter, and with the policy."""
    config, _ = configs.resolve("dreamerv3", ["cartpole"])
    vec_env = envs.make(task, num_envs, seed=0)
    agent = DreamerAgent(vec_env.obs_space, vec_env.act_space, config, device=device)
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
    for _ in range(6):  # on a GPU the fourth decision is recorded
        act(0)
    policy = rate(act)
    print(f"\n{task}, {num_envs} environments, {device}, env_steps/s: ", end="")
    print(f"raw envpool {raw:,.0f}, ", end="")
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


class Contender:
    """One way to run the update: an agent, its replay, and its times."""

    def __init__(self, way: str, size: str, kind: str, args: argparse.Namespace) -> None:
        self.way, (self.backend, settings) = way, WAYS[way]
        settings = settings | {"precision": args.precision}
        self.agent = make_agent(size, KINDS[kind], args.device, **settings)
        self.transfer = make_transfer(self.agent, 2048, args.storage)
        self.milliseconds: list[float] = []

    def update(self) -> None:
        start = time.perf_counter()
        with ops.use_backend(self.backend):
            whole_update(self.agent, self.transfer)
        self.milliseconds.append(1e3 * (time.perf_counter() - start))

    def row(self, warmup: int) -> dict[str, float | str]:
        low, middle, high = statistics.quantiles(self.milliseconds[warmup:], n=4)
        return {
            "way": self.way,
            "compile": ", ".join(self.agent.compiled.names) or "off",
            "precision": self.agent.precision,
            "parameters": self.agent.parameter_counts()["total"],
            "ms": round(middle, 3),
            "iqr": round(high - low, 3),
            "first_s": round(self.milliseconds[0] / 1e3, 2),
        }


def report_updates(args: argparse.Namespace) -> None:
    warmup = 6 if args.device == "cuda" else 3  # a graph is recorded at the fourth update
    found = []
    for size, kind in itertools.product(args.sizes, args.kinds):
        torch._dynamo.reset()  # what it keeps for one model would count against the next
        contenders = [Contender(way, size, kind, args) for way in args.ways]
        for _ in range(warmup + max(2, args.rounds)):
            for contender in contenders:
                contender.update()
        rows = [contender.row(warmup) for contender in contenders]
        config = contenders[0].agent.config
        print(
            f"\n{size}, {kind}, {rows[0]['parameters']:,} parameters, B{config.batch_size} ", end=""
        )
        print(f"T{config.batch_length} I{config.imag_horizon}, {rows[0]['precision']}, ", end="")
        print(f"{args.device}; ms, median (IQR) of {args.rounds}; first update, s")
        for row in rows:
            times = rows[0]["ms"] / row["ms"]
            print(f"{row['way']:16}{row['ms']:10.2f} ({row['iqr']:7.2f}){times:8.2f}x", end="")
            print(f"{row['first_s']:10.1f}", flush=True)
            where = {"device": args.device, "storage": args.storage}
            found.append({"size": size, "kind": kind} | where | row)
        if args.json:  # each time: whoever stops it has some
            report = {"machine": machine_line(), "rows": found}
            args.json.write_text(json.dumps(report, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "benchmarks/bench_train.py", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    update = commands.add_parser("update", help="whole updates, replay in and out")
    update.add_argument("--sizes", nargs="+", default=["size1m", "size12m", "size25m", "size50m"])
    update.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    slow = "plain-compiled unrolls all 64 steps: compiling them can take half an hour a model"
    update.add_argument("--ways", nargs="+", choices=WAYS, default=["plain", "fastwm"], help=slow)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    update.add_argument("--device", choices=("cpu", "cuda"), default=device)
    precisions = ("auto", "fp32", "bf16", "fp16")
    update.add_argument("--precision", choices=precisions, default="auto")
    update.add_argument("--storage", choices=("ram", "cuda"), default="ram", help="of the replay")
    update.add_argument("--rounds", type=int, default=10)
    update.add_argument("--json", type=Path, help="write the rows there too")
    parts = commands.add_parser("parts", help="one update split up")
    parts.add_argument("size", nargs="?", default="size1m")
    parts.add_argument("--kind", choices=KINDS, default="vector")
    parts.add_argument("--rounds", type=int, default=10)
    acting = commands.add_parser("acting", help="decisions per second beside the raw environment")
    acting.add_argument("--device", choices=("cpu", "cuda"), default=device)
    commands.add_parser("start", help="from the start of the process to the first update")
    args = parser.parse_args(argv)
    if args.command == "update":
        report_updates(args)
    elif args.command == "parts":
        report_parts(args.size, args.kind, args.rounds)
    elif args.command == "acting":
        report_acting(args.device)
    else:
        report_start()


if __name__ == "__main__":
    main()
