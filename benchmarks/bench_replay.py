"""Replay: sampling and insertion against memcpy and numpy slices of the same runs, in one process.

Absolute bandwidth says more about a machine's neighbours than about the code, so every entry
carries ratios in extra_info, from medians of interleaved calls:
    share_of_memcpy     time of one ctypes.memmove per run / time of the call (1 = the bound)
    numpy_over_this     time of the numpy backend / time of the call
Targets on a quiet machine, one thread: images sample >= 0.85 and add >= 0.6 of memcpy; vectors
sample in <= 25 us and >= 3 times faster than numpy.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from statistics import median

import numpy as np
import pytest
import torch
from conftest import DEVICE, record

from fastwm import ops
from fastwm import replay as replay_module
from fastwm.loops.transfer import Transfer
from fastwm.replay import Replay

ENVS, BATCH, LENGTH = 16, 16, 64
KINDS = {
    "images": (100_000, {"image": ((64, 64, 3), "uint8")}),
    "vectors": (1_000_000, {"vector": ((24,), "float32")}),
    "images+latents12m": (
        50_000,
        {
            "image": ((64, 64, 3), "uint8"),
            "deter": ((2048,), "bfloat16"),
            "stoch": ((32,), "uint8"),
        },
    ),
}
COMMON = {
    "action": ((6,), "float32"), "reward": ((), "float32"), "is_first": ((), "bool"),
    "is_last": ((), "bool"), "is_terminal": ((), "bool"),
}  # fmt: skip


def row_of(spec):
    """One row of every env; float32 where bfloat16 is stored would add a conversion."""
    return {
        name: torch.ones((ENVS, *shape), dtype=torch.bfloat16)
        if dtype == "bfloat16"
        else np.ones((ENVS, *shape), dtype)
        for name, (shape, dtype) in spec.items()
    }


@pytest.fixture(scope="module", params=KINDS)
def filled(request):
    """Both backends, their rings full and every page touched, and a row to add."""
    if replay_module._replay is None:
        pytest.skip("fastwm._replay is not built")
    capacity, observations = KINDS[request.param]
    spec = observations | COMMON
    native = Replay(spec, ENVS, capacity, LENGTH, online=False)
    row = row_of(spec)
    for _ in range(native.length + 100):
        native.add(row)
    kept, replay_module._replay = replay_module._replay, None
    try:
        plain = Replay(spec, ENVS, capacity, LENGTH, online=False)
    finally:
        replay_module._replay = kept
    for name, key in plain.keys.items():
        key.ring = native.keys[name].ring  # same memory, so that both see the same cache misses
    plain._count[:] = native._count
    return request.param, native, plain, row


def interleaved(calls, rounds):
    """Median seconds of each call, taken in turn so that all see the same weather."""
    times = [[] for _ in calls]
    for _ in range(rounds):
        for call, seen in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            seen.append(time.perf_counter() - start)
    return [median(seen) for seen in times]


def sampled_runs(replay, out):
    """Endless batches of (destination, source, bytes): what sampling has to move at least."""
    plans = []
    for _ in range(64):
        runs = []
        for b, (env, row) in enumerate(replay.sample(BATCH)["ids"].tolist()):
            for key in replay.keys.values():
                slot = (row - 1 + key.first) % replay.length
                rows = min(key.rows, replay.length - slot)  # the part after the seam is left out
                source = key.ring.ctypes.data + (env * replay.length + slot) * key.record
                target = out[key.out].data_ptr() + b * key.rows * key.record
                runs.append((target, source, rows * key.record))
        plans.append(runs)
    return itertools.cycle(plans)


def run(benchmark, name, call):
    """Time it, and keep it for the file of `--save`."""
    benchmark(call)
    if benchmark.stats is not None:  # not --benchmark-disable
        record(benchmark, name)


def compare(benchmark, moved, calls, rounds):
    """Fill extra_info; calls = [this, memcpy, numpy]."""
    this, memcpy, numpy = interleaved(calls, rounds)
    benchmark.extra_info.update(
        bytes=moved, gb_per_s=round(moved / this / 1e9, 2),
        share_of_memcpy=round(memcpy / this, 3), numpy_over_this=round(numpy / this, 2),
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["native", "native-out", "numpy"])
def test_sample(benchmark, filled, backend):
    kind, native, plain, _ = filled
    replay = plain if backend == "numpy" else native
    benchmark.group = f"replay sample {kind} B{BATCH} T{LENGTH}"
    out = native.empty_batch(BATCH)
    target = native.empty_batch(BATCH)  # alive as long as its addresses are in use
    runs = sampled_runs(native, target)
    moved = sum(value.nbytes for name, value in out.items() if name != "ids")

    def call():
        replay.sample(BATCH, out=out if backend == "native-out" else None)

    def memcpy():
        move = ctypes.memmove
        for run in next(runs):
            move(*run)

    call()
    compare(benchmark, moved, [call, memcpy, lambda: plain.sample(BATCH)], 200)
    run(benchmark, backend, call)


@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_add(benchmark, filled, backend):
    kind, native, plain, row = filled
    replay = plain if backend == "numpy" else native
    benchmark.group = f"replay add {kind} N{ENVS}"
    arrays = [key.check(row[name], (ENVS,), "N") for name, key in native.keys.items()]
    pairs = [
        (key.ring.ctypes.data, array.ctypes.data, key.record)
        for key, array in zip(native.keys.values(), arrays, strict=True)
    ]
    clock, step = itertools.count(), native.length

    def memcpy():
        slot, move = next(clock) % step, ctypes.memmove
        for ring, rows, size in pairs:
            for env in range(ENVS):
                move(ring + (env * step + slot) * size, rows + env * size, size)

    compare(
        benchmark, ENVS * native.bytes_per_row,
        [lambda: replay.add(row), memcpy, lambda: plain.add(row)], 500,
    )  # fmt: skip
    run(benchmark, backend, lambda: replay.add(row))


@pytest.mark.parametrize("storage", ["ram", "cuda"])
@pytest.mark.parametrize("kind", KINDS)
def test_learner_batch(benchmark, kind, storage):
    """Sampled, where the learner is, and its latents stored; until the device has done it all."""
    spec = KINDS[kind][1] | COMMON
    where = {"storage": storage, "device": DEVICE, "gather": ops.gather_windows}
    replay = Replay(spec, ENVS, 20_000, LENGTH, online=False, **where)
    row = row_of(spec)
    for _ in range(replay.length):
        replay.add(row)
    benchmark.group = f"replay learner's batch {kind} B{BATCH} T{LENGTH} on {DEVICE}"
    transfer, latents = Transfer(replay, torch.device(DEVICE), BATCH), {}
    if "deter" in spec:
        latents = {
            "deter": torch.ones((BATCH, LENGTH, 2048), dtype=torch.bfloat16, device=DEVICE),
            "stoch": torch.ones((BATCH, LENGTH, 32), dtype=torch.uint8, device=DEVICE),
        }
    finite = torch.tensor(True, device=DEVICE)

    def call():
        sampled = transfer.sample()
        transfer.to_device(sampled)
        transfer.write_back(sampled["ids"], latents, finite)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    call()
    benchmark.extra_info["bytes"] = sum(x.nbytes for x in transfer.sample().values())
    run(benchmark, storage, call)


def test_write_back(benchmark, filled):
    kind, native, _, _ = filled
    if "deter" not in native.keys:
        pytest.skip("no latents in this kind")
    benchmark.group = f"replay update_latents {kind} B{BATCH} T{LENGTH}"
    ids = native.sample(BATCH)["ids"]
    deter = torch.ones((BATCH, LENGTH, 2048), dtype=torch.bfloat16)
    stoch = torch.ones((BATCH, LENGTH, 32), dtype=torch.uint8)
    benchmark.extra_info["bytes"] = deter.nbytes + stoch.nbytes
    run(benchmark, "native", lambda: native.update_latents(ids, deter, stoch))
