"""What the kernel benchmarks share: the machine line, the variants, one way to time an op."""

from __future__ import annotations

import os
import platform
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
    bytes that the forward pass and the backward pass must move at least.
    """

    def run(
        group: str,
        fused: Callable,
        reference: Callable,
        args: Sequence,
        leaves: Sequence[Tensor],
        sizes: tuple[int, int],
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
        report(benchmark, moved)

    return run


def report(benchmark, moved: int) -> None:
    """Adds bytes and GB/s at the median to the results."""
    benchmark.extra_info["machine"] = machine_line()
    benchmark.extra_info["bytes"] = moved
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.median / 1e9, 2)
