"""Builds the CUDA sources as a CPU library, so that tests run every kernel without a GPU.

Launches become calls of tests/emulation/emulation.h, and the operators of csrc/ops_cuda*.cpp are
registered for CPU tensors as `torch.ops.fastwm_emulated`. g++ compiles what nvcc compiles, to the
letter but for the launches; inline assembly and tensor cores are the kernels' own business.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from fastwm.ops import _backend

ROOT = Path(__file__).parents[1]
HEADERS = Path(__file__).parent / "emulation"
FLAGS = [
    "-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]  # fmt: skip
SHARED = re.compile(r"(?<!extern )(__shared__ [^;]*?(\w+)(?:\[[^;]*\])?;)")
# The raw ops whose schema means the same on CPU and CUDA: not the rssm's loops.
RAW = """
lambda_return lambda_return_backward rms_silu rms_silu_backward twohot_loss twohot_loss_backward
twohot_mean twohot_mean_backward gmm_nll gmm_nll_backward latent_sample latent_one_hot
latent_backward kl_balance kl_balance_backward laprop_agc_ adam_ ema_
gather_windows gru_layernorm gru_layernorm_backward pool_silu pool_silu_backward
""".split()
LAUNCH = re.compile(r"([\w:]+(?:<[\w:, ]+>)?)\s*<<<(.*?)>>>\s*\((.*?)\);", re.DOTALL)


def translate(text: str) -> str:
    """One source with launches as calls, shared arrays announced, operators under another name."""
    text = SHARED.sub(r"\1 ::emulation::declare_shared(&\2, sizeof(\2));", text)
    text = LAUNCH.sub(r"::emulation::launch(\2, [=] { \1(\3); });", text)
    text = re.sub(r"(STABLE_TORCH_LIBRARY\w*)\(fastwm, CUDA, m\)", r"\1(fastwm_emulated, CPU, m)",
                  text)  # fmt: skip
    return re.sub(r"(STABLE_TORCH_LIBRARY\w*)\(fastwm, ", r"\1(fastwm_emulated, ", text)


def _copy(folder: Path) -> list[Path]:
    """The translated sources in `folder`; returns what is to be compiled."""
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
            target = folder / path.relative_to(ROOT / "csrc")
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(target, translate(path.read_text()))
    for path in HEADERS.iterdir():
        _write(folder / path.name, path.read_text())
    _write(folder / "fwm_schemas.h", '#define FWM_SCHEMAS ""\n')
    return [folder / "ops.cpp", *sorted(folder.glob("ops_cuda*.cpp")),
            *sorted(folder.glob("cuda/*.cu")), folder / "guard.cpp"]  # fmt: skip


def _write(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-4000:]}")


def compile_library(sources: Sequence[Path], library: Path, includes: Sequence[Path]) -> None:
    """Translated kernels without torch as a library, for tests of the emulation itself."""
    folders = [f"-I{path}" for path in includes]
    _run(["c++", *FLAGS, "-shared", *folders, *map(str, sources), "-o", str(library)])


@cache
def build() -> Path:
    """The library; compiles only what has changed."""
    folder = ROOT / "build/emulation"
    folder.mkdir(parents=True, exist_ok=True)
    sources = _copy(folder)
    headers = hashlib.sha256(torch.__version__.encode() + " ".join(FLAGS).encode())
    for path in sorted(folder.rglob("*.*h")):
        headers.update(path.read_bytes())
    includes = [f"-I{path}" for path in (folder, *include_paths())]
    objects = []
    for source in sources:
        own = headers.copy()
        own.update(source.read_bytes())
        objects.append(folder / f"{source.stem}-{own.hexdigest()[:16]}.o")
        if not objects[-1].is_file():
            for old in folder.glob(f"{source.stem}-*.o"):
                old.unlink()
            _run(["c++", *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(objects[-1])])
    name = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    library = folder / f"emulated-{name}.so"
    if not library.is_file():
        for old in folder.glob("emulated-*.so"):
            old.unlink()
        folders = [f"-L{path}" for path in library_paths()]
        _run(["c++", "-shared", *map(str, objects), *folders, "-ltorch", "-ltorch_cpu", "-lc10",
              "-o", str(library)])  # fmt: skip
    return library


@cache
def switches() -> ctypes.CDLL:
    """emulation_guard(on), _order(order) and _launches(); see emulation/guard.cpp."""
    return ctypes.CDLL(str(build()))


def load():
    """The operators as `torch.ops.fastwm_emulated`."""
    torch.ops.load_library(str(build()))
    return torch.ops.fastwm_emulated


@contextmanager
def instead_of_cpu(order: int = 1) -> Iterator[None]:
    """Within the block the `RAW` ops of CPU tensors run the CUDA code, on guarded memory.

    `order` of threads and blocks: -1 forward, -2 reverse, else the seed of a random one.
    """
    emulated, switch = load(), switches()
    library = torch.library.Library("fastwm", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced, which is the purpose
        for name in RAW:
            library.impl(name, getattr(emulated, name).default, "CPU", allow_override=True)
    _backend.LOW_INPUT.add("cpu")
    switch.emulation_order(order)
    switch.emulation_guard(1)
    try:
        yield
    finally:
        damaged = switch.emulation_guard(0)
        _backend.LOW_INPUT.discard("cpu")
        library._destroy()
    assert not damaged, "a kernel wrote outside of a tensor"
