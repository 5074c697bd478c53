"""Updates, decisions, the RSSM and the optimizer on a GPU: milliseconds and peak memory, as JSON.

    python benchmarks/gpu_update.py results.json
    python benchmarks/gpu_update.py results.json --device cpu --rounds 1 --sizes size1m  # a trial

A part that fails is recorded with its error, the rest still runs, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bench_acting
import bench_optim
import bench_rssm
import bench_train
import torch
from conftest import machine_line
from torch.utils._pytree import tree_map

from fastwm import ops

KINDS = bench_train.KINDS
# What an update runs as: the kernels, the graph around all of it, and how many it holds.
WAYS = {
    "reference": ("reference", {"cudagraphs": "off"}),
    "fused": ("fused", {"cudagraphs": "off"}),
    "fused, graph": ("fused", {}),
    "fused, graph of 4 updates": ("fused", {"updates_per_launch": 4}),
}
ENVS = 16  # of a decision


class Timer:
    def __init__(self, device: str, rounds: int, results: Path) -> None:
        self.device, self.rounds, self.results = device, rounds, results
        self.rows: list[dict] = []

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def measure(self, call: Callable[[], object], warmup: int) -> dict:
        """Median and quartiles of wall time, and the peak of memory beyond what was there."""
        for _ in range(warmup):
            call()
        self.wait()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(max(2, self.rounds)):
            start = time.perf_counter()
            call()
            self.wait()
            times.append(1e3 * (time.perf_counter() - start))
        low, middle, high = statistics.quantiles(times, n=4)
        row = {"ms": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}
        if self.device == "cuda":
            row["peak_MB"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
        return row

    def add(self, name: str, make: Callable[[], Callable[[], object]], warmup: int = 6) -> None:
        """Times make()(); an error becomes a row of its own."""
        row = {"name": name}
        try:
            row |= self.measure(make(), warmup)
        except Exception as error:  # whatever it is, the other parts are to be measured
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        self.rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        report = {
            "machine": machine_line(),
            "rows": self.rows,
        }  # each time: whoever stops it has some
        self.results.write_text(json.dumps(report, indent=1) + "\n")


def update_call(size: str, kind: str, way: str, device: str) -> Callable[[], None]:
    backend, settings = WAYS[way]
    agent = bench_train.make_agent(size, KINDS[kind], device, **settings)
    transfer = bench_train.make_transfer(agent)

    def call() -> None:
        with ops.use_backend(backend):
            bench_train.whole_update(agent, transfer)

    return call


def act_call(size: str, kind: str, way: str, device: str) -> Callable[[], None]:
    """A decision for all environments, from rows on the host to actions and latents there."""
    backend, settings = WAYS[way]
    decide = bench_acting.make_decide(size, kind, "discrete", ENVS, device, **settings)

    def call() -> None:
        with ops.use_backend(backend):
            decide()

    return call


def on(device: str, tree):
    return tree_map(lambda x: x.detach().to(device) if isinstance(x, torch.Tensor) else x, tree)


def graphed(call: Callable[[], object], device: str) -> Callable[[], object]:
    if device != "cuda":
        return call
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def observe_call(size: str, device: str, low: bool) -> Callable[[], object]:
    """Forward and backward of the sequence, as a graph."""
    weights = on(device, bench_rssm.make_weights(*bench_rssm.SIZES[size]))
    inputs = on(device, bench_rssm.make_inputs(size, 16, 64))
    inputs["tokens"].requires_grad_()
    for leaf in bench_rssm.leaves_of(weights):
        leaf.requires_grad_()
    call = bench_rssm.observe_call(ops.rssm_observe, weights, inputs, True)

    def mixed() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=low, cache_enabled=False):
            call()

    return graphed(mixed, device)


def imagine_call(size: str, device: str, low: bool) -> Callable[[], object]:
    weights = on(device, bench_rssm.make_weights(*bench_rssm.SIZES[size]))
    inputs = on(device, bench_rssm.make_inputs(size, 1024, 1))
    noise, actions = torch.rand(15, 1024, 32).to(device), torch.rand(1024, 6).to(device)

    def call() -> None:
        with (
            torch.no_grad(),
            torch.autocast(device, torch.bfloat16, enabled=low, cache_enabled=False),
        ):
            ops.rssm_imagine(
                weights, inputs["deter"], inputs["stoch"], lambda d, s: actions, 15, noise
            )

    return graphed(call, device)


def optimizer_call(device: str) -> Callable[[], object]:
    lists = [[torch.rand(shape).to(device) for shape in bench_optim.SHAPES] for _ in range(4)]
    step, lr = torch.tensor(4).to(device), torch.tensor(1e-4).to(device)
    return graphed(lambda: ops.laprop_agc_(*lists, step, lr), device)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("gpu_update.py", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sizes", nargs="+", default=["size1m", "size12m"])
    args = parser.parse_args(argv)
    timer = Timer(args.device, args.rounds, args.results)
    warmup = 6 if args.device == "cuda" else 1  # a graph is recorded at the fourth update
    for size, low in itertools.product(args.sizes, (False, True)):
        label = f"{size} {'bf16' if low else 'fp32'}"
        timer.add(f"rssm_observe forward+backward {label} B16 T64",
                  lambda s=size, w=low: observe_call(s, args.device, w), warmup)  # fmt: skip
        timer.add(f"rssm_imagine {label} N1024 I15",
                  lambda s=size, w=low: imagine_call(s, args.device, w), warmup)  # fmt: skip
    timer.add("laprop_agc_ 12M parameters, 95 tensors",
              lambda: optimizer_call(args.device), warmup)  # fmt: skip
    for size, kind, way in itertools.product(args.sizes, KINDS, WAYS):
        if args.device == "cuda":
            torch.cuda.empty_cache()
        make = partial(update_call, size, kind, way, args.device)
        timer.add(f"update {size} {kind} {way}", make, warmup)
        if "updates" not in way:
            make = partial(act_call, size, kind, way, args.device)
            timer.add(f"act {size} {kind} {way}, {ENVS} environments", make, warmup)
    return 1 if any("error" in row for row in timer.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
