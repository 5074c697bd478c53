"""What the kernel benchmarks share: the machine line, the variants, one way to time an op."""

from __future__ import annotations

import functools
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastwm import ops

# eager reference, the same through torch.compile, our kernels. Compiling takes half a minute a
# shape: FASTWM_BENCH_COMPILE=0 leaves it out.
VARIANTS = ["reference", "compiled", "fused"]
DEVICE = os.environ.get("FASTWM_BENCH_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")


def machine_line() -> str:
    """CPU or GPU, cores, threads, torch and the kernels' instruction set, in one line."""
    info, cpu = ops.backend_info(), platform.processor() or platform.machine()
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        names = [x for x in listing.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else cpu
    threads, cores = torch.get_num_threads(), os.cpu_count()
    level = info.get("cpu_capability", info["cpu"])
    return f"{device}, {cores} cores, {threads} threads, torch {torch.__version__}, kernels {level}"


def pytest_report_header() -> str:
    return f"machine: {machine_line()}"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["fastwm"] = machine_line()


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    if request.param == "compiled" and os.environ.get("FASTWM_BENCH_COMPILE") == "0":
        pytest.skip("FASTWM_BENCH_COMPILE=0")
    if request.param == "fused" and not ops.available(DEVICE, "lambda_return"):
        pytest.skip(f"no compiled kernels: {ops.backend_info()[DEVICE]}")
    return request.param


@pytest.fixture(params=["forward", "forward+backward"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def _is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)


def _pick(variant: str, fused: Callable, reference: Callable) -> Callable:
    if variant == "fused":
        return fused
    if variant == "reference":
        return reference
    torch._dynamo.reset()
    return torch.compile(reference, fullgraph=True)


@pytest.fixture
def time_op(benchmark, variant: str, mode: str) -> Callable:
    """time_op(group, fused, reference, args, leaves, sizes): benchmark one variant of an op.

    The backward pass gets fixed random gradients for all differentiable results. `sizes` are the
    bytes that the forward pass and the backward pass must move at least, `flops` the operations of
    the forward pass where arithmetic decides (the backward pass has twice as many).
    """

    def run(
        group: str,
        fused: Callable,
        reference: Callable,
        args: Sequence,
        leaves: Sequence[Tensor],
        sizes: tuple[int, int],
        flops: int = 0,
    ) -> None:
        function, train = _pick(variant, fused, reference), mode == "forward+backward"
        benchmark.group = f"{group} {mode}"
        placed = {id(x): x.to(DEVICE) for x in [*tree_leaves(args), *leaves] if _is_tensor(x)}
        args = tree_map(lambda x: placed[id(x)] if _is_tensor(x) else x, list(args))
        leaves = [placed[id(leaf)] for leaf in leaves]
        for leaf in leaves:
            leaf.requires_grad_(train)

        def forward() -> list[Tensor]:
            return [x for x in tree_leaves(function(*args)) if _is_tensor(x)]

        grads = [torch.randn_like(x) for x in forward() if x.requires_grad]

        def call() -> None:
            results = forward()
            if train:
                outputs = [x for x in results if x.requires_grad]
                torch.autograd.grad(outputs, leaves, grads)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        call()  # compiles, and warms the allocator
        benchmark(call)
        moved = sum(sizes) if train else sizes[0]
        report(benchmark, moved, flops * (3 if train else 1))

    return run


RECORDS: list[dict] = []  # what `report` was told, for the table and the file


def _fastest(call: Callable[[], object], device: str, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


@functools.cache
def memcpy_seconds(moved: int, device: str) -> float:
    """How long a copy takes that reads and writes `moved` bytes together."""
    source = torch.zeros(max(1, moved // 8), device=device)
    target = torch.empty_like(source)
    repeats = max(1, 2**20 // max(1, moved))
    return _fastest(lambda: [target.copy_(source) for _ in range(repeats)], device) / repeats


@functools.cache
def gemm_rate(device: str) -> float:
    """Operations per second of a large float32 product."""
    a, b = torch.rand(2, 768, 768, device=device)
    return 2 * 768**3 / _fastest(lambda: a @ b, device)


def report(
    benchmark, moved: int, flops: int = 0, name: str | None = None, device: str = DEVICE
) -> None:
    """Adds bytes, GB/s at the median and the share of the floor to the results.

    The floor is a memcpy of as many bytes, or a product of as many operations where that takes
    longer, measured in the same process on `device`. name: of the variant, if no parameter is.
    """
    info = benchmark.extra_info
    info["machine"], info["bytes"] = machine_line(), moved
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = benchmark.stats.stats.median
    floor = max(memcpy_seconds(moved, device), flops / gemm_rate(device) if flops else 0.0)
    info["GB/s"], info["floor"] = round(moved / median / 1e9, 2), round(floor / median, 3)
    if flops:
        info["GFLOP/s"] = round(flops / median / 1e9, 1)
    params = benchmark.params
    record(benchmark, name or params.get("variant") or params.get("backend") or "fused")


def record(benchmark, name: str) -> None:
    """Keeps the median and what is in extra_info for the table and the file."""
    stats, info = benchmark.stats.stats, benchmark.extra_info
    RECORDS.append(
        {"group": benchmark.group, "variant": name, "median_ms": 1e3 * stats.median,
         "iqr_ms": 1e3 * stats.iqr}
        | {key: value for key, value in info.items() if key != "machine"}
    )  # fmt: skip


@pytest.hookimpl(trylast=True)  # under the tables of pytest-benchmark
def pytest_terminal_summary(terminalreporter) -> None:
    """One line a group: times of all variants, how many times faster ours is, share of the floor.

    With FASTWM_BENCH_SAVE=FILE the same numbers go to a JSON file.
    """
    if not RECORDS:
        return
    groups: dict[str, dict[str, dict]] = {}
    for record in RECORDS:
        groups.setdefault(record["group"], {})[record["variant"]] = record
    write = terminalreporter.write_line
    write(f"\n{'median ms (IQR)':<52}{'fused':>16}  times faster than; GB/s; share of the floor")
    for group, found in groups.items():
        ours = found.get("fused")
        if ours is None:
            continue
        others = [f"{name} {record['median_ms'] / ours['median_ms']:.1f}x"
                  for name, record in found.items() if name != "fused"]  # fmt: skip
        shown = f"{ours['median_ms']:.3f} ({ours['iqr_ms']:.3f})"
        write(f"{group:<52}{shown:>16}  {', '.join(others)}; {ours['GB/s']}; {ours['floor']:.0%}")
    if path := os.environ.get("FASTWM_BENCH_SAVE"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine_line(), "results": RECORDS}
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
        write(f"written to {path}")
