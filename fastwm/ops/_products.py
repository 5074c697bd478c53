"""Who multiplies matrices on a CPU outside of our own loops, and whether bfloat16 pays there.

PyTorch sends float32 products to its BLAS. On some CPUs that takes a slow path (half or less of
what the CPU can do), while oneDNN, which is part of the same PyTorch, does not. So both are timed,
once per process at the first use, some 70 ms: one product of each orientation that a layer needs.
oneDNN is taken for an orientation only if it was faster by a quarter in all rounds but one.
bfloat16 counts as paying under the same condition against the better of both, and only where the
CPU has instructions for it (elsewhere it takes many times longer).

The two round differently: float32 sums in another order, 1e-6 relative. A run is equal bit by bit
to another one only with the same choice. The wide margin keeps a busy machine from changing it, and
a run that goes on takes the choice from its checkpoint. `FASTWM_PRODUCTS=blas|onednn` pins it,
without timing anything; where PyTorch is told to use deterministic algorithms it is the BLAS, since
no clock may decide there. `ops.backend_info()` says what was chosen. What is multiplied again and
again with the same weights, the steps of a sequence or of a rollout, is packed by our own kernels
and asks nobody here.
"""

from __future__ import annotations

import functools
import os
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS, NEEDED = 9, 8  # of which so many must show the gain
MARGIN = 1.25
ROWS, INPUTS, OUTPUTS = 384, 512, 256  # of the timed layer
# A layer x W^T, its input gradient g W, its weight gradient g^T x: how (a, b) of a b lie in memory.
LAYOUTS = {"nt": "forward", "nn": "input gradient", "tn": "weight gradient"}
Timer = Callable[[], float]


class Choice(NamedTuple):
    """What was decided and why."""

    onednn: frozenset[str]  # the layouts it multiplies; BLAS has the others
    low: bool  # whether products in bfloat16 are faster than in float32
    reason: str
    rates: dict[str, float]  # GFLOP/s by "library layout", as far as anything was timed


def by_onednn(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times b (K, N) without gradient."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def multiplies_low() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    cpu = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(cpu.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def operands(layout: str) -> tuple[Tensor, Tensor]:
    """a (M, K) and b (K, N) of the timed product; ones: the numbers do not matter."""
    sizes = {"nt": (ROWS, INPUTS, OUTPUTS), "nn": (ROWS, OUTPUTS, INPUTS),
             "tn": (OUTPUTS, ROWS, INPUTS)}  # fmt: skip
    rows, inner, columns = sizes[layout]
    # Whatever the defaults of PyTorch are set to: what is decided about is float32 on the CPU.
    ones = functools.partial(torch.ones, dtype=torch.float32, device="cpu")
    a = ones(inner, rows).t() if layout[0] == "t" else ones(rows, inner)
    b = ones(columns, inner).t() if layout[1] == "t" else ones(inner, columns)
    return a, b


def timed(calls: dict[str, Callable], timer: Timer) -> dict[str, list[float]]:
    """Seconds of every call in every round, one after the other in each, after one for free."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(ROUNDS + 1):
        for name, call in calls.items():
            start = timer()
            call()
            passed = timer() - start
            if round_:
                seconds[name].append(passed)
    return seconds


def pays(candidate: list[float], against: list[float]) -> bool:
    """Whether the candidate is faster by the margin in all rounds but one."""
    wins = sum(c * MARGIN < a for c, a in zip(candidate, against, strict=True))
    return wins >= NEEDED


@torch.no_grad()
def probe(timer: Timer = time.perf_counter, onednn: bool = True, low: bool = False) -> Choice:
    """Time both libraries, and bfloat16 where `low`, in every layout."""
    taken, low_wins, rates = set(), [], {}
    for layout in LAYOUTS:
        a, b = operands(layout)
        calls: dict[str, Callable] = {"blas": functools.partial(torch.matmul, a, b)}
        if onednn:
            calls["onednn"] = functools.partial(by_onednn, a, b)
        if low:
            calls["bf16"] = functools.partial(torch.matmul, a.bfloat16(), b.bfloat16())
        seconds = timed(calls, timer)
        if onednn and pays(seconds["onednn"], seconds["blas"]):
            taken.add(layout)
        best = seconds["onednn" if layout in taken else "blas"]
        low_wins.append(low and pays(seconds["bf16"], best))
        for name, rounds in seconds.items():
            rates[f"{name} {layout}"] = 2e-9 * ROWS * INPUTS * OUTPUTS / max(min(rounds), 1e-9)
    return Choice(frozenset(taken), all(low_wins), "timed", rates)


def decide(setting: str, run: Callable[..., Choice] = probe) -> Choice:
    """The choice for a value of FASTWM_PRODUCTS; `run` times what is not decided by it."""
    onednn, low = has_onednn(), multiplies_low()
    if setting not in ("auto", "blas", "onednn"):
        warnings.warn(
            f"fastwm: FASTWM_PRODUCTS: expected auto, blas or onednn, got {setting!r}; using auto",
            RuntimeWarning,
            stacklevel=2,
        )
        setting = "auto"
    if setting == "auto":
        return run(onednn=onednn, low=low)
    taken = frozenset(LAYOUTS) if setting == "onednn" and onednn else frozenset()
    return Choice(taken, low, f"{setting}, not timed", {})


_made: list[Choice] = []  # the choice of this process, once there is one


def choice() -> Choice:
    """The choice of this process; made now if it was not made before."""
    if not _made:
        with torch.autocast("cpu", enabled=False):
            _made.append(decide(_setting()))
    return _made[0]


def _setting() -> str:
    setting = os.environ.get("FASTWM_PRODUCTS") or "auto"
    pinned = setting == "auto" and torch.are_deterministic_algorithms_enabled()
    return "blas" if pinned else setting


def state() -> dict | None:
    """The choice as plain data, for a checkpoint; None as long as nobody asked for one."""
    return {"onednn": sorted(_made[0].onednn), "low": _made[0].low} if _made else None


def go_on(stored: dict | None) -> None:
    """Multiply as the run that is continued did, unless it is pinned otherwise."""
    if stored and _setting() == "auto" and has_onednn():
        low = stored["low"] and multiplies_low()
        _made[:] = [Choice(frozenset(stored["onednn"]), low, "as the run began", {})]


@torch.compiler.assume_constant_result
def library(layout: str) -> str:
    """ "onednn" or "blas": for a (M, K), b (K, N) that lie so in memory."""
    return "onednn" if layout in choice().onednn else "blas"


@torch.compiler.assume_constant_result
def low_pays() -> bool:
    """Whether products in bfloat16 are faster than in float32 on this CPU."""
    return choice().low


def _layout(a: Tensor, b: Tensor) -> str:
    return ("n" if a.stride(-1) == 1 else "t") + ("n" if b.stride(-1) == 1 else "t")


def times(a: Tensor, b: Tensor) -> Tensor:
    """a (…, K) times b (K, N) or batches of both, without gradient, by who is faster."""
    fits = b.dim() == 2 and a.device.type == "cpu" and a.dtype == b.dtype == torch.float32
    if not fits or not a.numel() or not b.numel() or torch.is_autocast_enabled("cpu"):
        return a @ b
    rows = a if a.dim() == 2 else a.flatten(0, -2)
    if library(_layout(rows, b)) == "blas":
        return a @ b
    return by_onednn(rows, b).unflatten(0, a.shape[:-1])


def describe() -> str:
    """Which library multiplies, in a few words; makes the choice if there is none."""
    made = choice()
    if len(made.onednn) in (0, len(LAYOUTS)):
        return "onednn" if made.onednn else "blas"
    return "onednn for the " + ", ".join(LAYOUTS[key] for key in LAYOUTS if key in made.onednn)


def rates() -> str:
    """What the timing found, for a person."""
    made = choice()
    found = ", ".join(f"{name} {rate:.0f}" for name, rate in made.rates.items())
    return f"GFLOP/s {found}" if found else made.reason
