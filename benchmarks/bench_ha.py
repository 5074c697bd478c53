"""World Models: the controller stage beside its environments, and M's training step.

`pytest benchmarks/bench_ha.py` times M's step and its likelihood, fused and in plain PyTorch.
`python benchmarks/bench_ha.py [seconds]` prints, interleaved in one process: steps per second of
the whole population (environments, V, M and C), of the environments alone, and of one process per
candidate with copies of its own, as the 2018 code works; and the likelihood's share of M's step.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import machine_line

from fastwm import assemble, ops
from fastwm.envs.lanes import make_lanes
from fastwm.loops.ha_world import RealWorld, play
from fastwm.worldmodels.ha import MDNRNN, ConvVAE, mdn_loss
from fastwm.worldmodels.ha_controller import ActionCode, Controller

CANDIDATES, SAMPLES, STEPS = 32, 2, 60
B, T, Z = 32, 64, 32

assemble.keep_freed_memory()  # as every run does


def networks() -> tuple[ConvVAE, MDNRNN, Controller, ActionCode]:
    torch.manual_seed(0)
    vae = ConvVAE(Z).to(memory_format=torch.channels_last).eval()
    return vae, MDNRNN(Z, 3).eval(), Controller(Z, 256, 3), ActionCode.of("car")


def population(halves: int) -> float:
    """Steps per second of a generation with every network in the loop."""
    nets, seeds = networks(), list(range(SAMPLES))
    params = torch.randn(CANDIDATES, nets[2].size) * 0.1
    worlds = [
        RealWorld(
            make_lanes("carracing", seeds * (CANDIDATES // halves), size=(96, 96)),
            *nets, rows=84, samples=SAMPLES,
        )
        for _ in range(halves)
    ]  # fmt: skip
    play(worlds, nets[2], params, limit=2)
    began = time.perf_counter()
    _, lengths = play(worlds, nets[2], params, limit=STEPS)
    rate = int(lengths.sum()) / (time.perf_counter() - began)
    for world in worlds:
        world.close()
    return rate


def environments_alone() -> float:
    lanes = make_lanes("carracing", list(range(SAMPLES)) * CANDIDATES, size=(96, 96))
    action, ids = np.zeros((lanes.num_envs, 3), np.float32), np.arange(lanes.num_envs)
    lanes.reset()
    began = time.perf_counter()
    for _ in range(STEPS):
        lanes.send(action, ids)
        lanes.receive()
    rate = STEPS * lanes.num_envs / (time.perf_counter() - began)
    lanes.close()
    return rate


def one_candidate(task: str, number: int, steps: int) -> int:
    """What a worker does: networks of its own, one environment, batches of one."""
    torch.set_num_threads(1)
    nets = networks()
    options = {"num_threads": 1} if task == "carracing" else {}
    world = RealWorld(make_lanes(task, [number], size=(96, 96), **options), *nets, rows=84)
    _, lengths = play([world], nets[2], torch.zeros(1, nets[2].size), limit=steps)
    world.close()
    return int(lengths.sum())


def processes(task: str, workers: int) -> float:
    """One process per candidate, as many at a time as there are processors."""
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(one_candidate, [(task, i, 2) for i in range(workers)])  # starting up
        began = time.perf_counter()
        done = pool.starmap(one_candidate, [(task, i, STEPS) for i in range(2 * workers)])
        return sum(done) / (time.perf_counter() - began)


class Step:
    """M's training step, and the forward and backward of its likelihood alone."""

    def __init__(self, layout: str = "factored") -> None:
        torch.manual_seed(0)
        self.rnn, self.layout = MDNRNN(Z, 3, mixture=layout), layout
        self.optimizer = torch.optim.Adam(self.rnn.parameters(), 1e-3)
        self.x = self.rnn.features(torch.randn(B, T, Z), torch.rand(B, T, 3))
        self.target, self.weight = torch.randn(B, T, Z), torch.ones(B, T)
        mixture = self.rnn.scan(self.x)[0]
        self.parts = [part.detach().requires_grad_() for part in mixture[:3]]

    def whole(self) -> None:
        mixture, _, _ = self.rnn.scan(self.x)
        loss, _ = mdn_loss(mixture, self.layout, self.target, self.weight)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_value_(self.rnn.parameters(), 1.0)
        self.optimizer.step()

    def likelihood(self) -> None:
        nll = ops.gmm_nll(self.target, *self.parts, self.layout)
        torch.autograd.grad(nll.mean(), self.parts)


def interleaved(functions: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each, taking turns."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def with_backend(name: str, function: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        with ops.use_backend(name):
            function()

    return call


@pytest.mark.parametrize("layout", ["factored", "joint"])
@pytest.mark.parametrize("part", ["whole", "likelihood"])
@pytest.mark.parametrize("backend", ["reference", "fused"])
def bench_rnn(benchmark, layout, part, backend):
    if backend == "fused" and not ops.available("cpu"):
        pytest.skip(f"no compiled kernels: {ops.backend_info()['cpu']}")
    benchmark.group = f"{part} step of M, {layout}, B={B} T={T}"
    benchmark.pedantic(
        with_backend(backend, getattr(Step(layout), part)), rounds=20, warmup_rounds=2
    )


def main(seconds: float) -> None:
    print(machine_line())
    kinds = {
        "population, two halves in turns": lambda: population(2),
        "population, one batch": lambda: population(1),
        "environments alone": environments_alone,
        "a process per candidate": lambda: processes("carracing", torch.get_num_threads()),
        "the same with gymnasium": lambda: processes(
            "gymnasium:CarRacing-v3", torch.get_num_threads()
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for name, function in list(kinds.items()):
            try:
                rates[name].append(function())
            except ImportError as error:
                print(f"{name}: {error}")
                kinds.pop(name)
    for name, found in rates.items():
        if found:
            print(f"{name:34} {statistics.median(found):8.0f} env steps/s")
    step = Step()
    names = [n for n in ("reference", "fused") if n == "reference" or ops.available("cpu")]
    parts = {
        f"{name} {part}": with_backend(name, getattr(step, part))
        for name in names
        for part in ("whole", "likelihood")
    }
    found = interleaved(parts, seconds / 4)
    for name in names:
        whole, share = found[f"{name} whole"], found[f"{name} likelihood"]
        print(
            f"M, {name:10} step {whole:7.2f} ms, likelihood {share:6.2f} ms = {share / whole:.1%}"
        )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0)
