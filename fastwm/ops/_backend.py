"""Loads the compiled kernels once, says what is active, and lets tests and benchmarks switch.

Nothing here may break `import fastwm.ops`: a library that is missing or does not load leaves the
plain PyTorch references in charge, with one warning that names the cause.
"""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastwm.ops import _products

_PACKAGE = Path(__file__).resolve().parents[1]
_kernels: dict[str, frozenset[str]] = {}  # device type -> raw ops that have a kernel there
_names: frozenset[str] = frozenset()  # all raw ops
_state = {"cpu": "not built", "cuda": "not built"}  # device type -> what became of its library
_fused = True  # set by use_backend

raw = torch.ops.fastwm  # the operators of csrc/ops.cpp; no autograd, no broadcasting


def _is_truncated(path: Path) -> bool:
    """Whether an ELF file ends before its section table: loading it would kill the process."""
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":
        return False  # the dynamic loader reports these by itself
    table, size, count = struct.unpack_from("<Q10xHH", head, 0x28)
    return path.stat().st_size < table + size * count


def _is_stale() -> bool:
    """In a checkout: whether csrc/ops.cpp has changed since the library was built."""
    schemas = _PACKAGE.parent / "csrc/ops.cpp"
    if not schemas.is_file():
        return False
    return hashlib.sha256(schemas.read_bytes()).hexdigest() not in raw.build_info()


def _load(name: str, device: str) -> None:
    global _names
    found = sorted(_PACKAGE.glob(f"{name}.abi3.so")) or sorted(_PACKAGE.glob(f"{name}.pyd"))
    if not found:
        return
    try:
        if _is_truncated(found[0]):
            raise OSError("the file is truncated")
        torch.ops.load_library(str(found[0]))
        if device == "cpu" and _is_stale():
            raise OSError("it was built from another version of csrc/ops.cpp")
    except (OSError, RuntimeError) as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]  # torch wraps it
        _state[device] = f"failed to load: {cause}"
        warnings.warn(
            f"fastwm: {found[0].name} does not load, using the PyTorch reference on {device} "
            f"(slower): {cause}. To repair: python -m fastwm.doctor",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastwm::")]
    _names = frozenset(n.removeprefix("fastwm::") for n in names)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = (device.upper(), "CompositeExplicitAutograd")
    _kernels[device] = frozenset(
        n.removeprefix("fastwm::") for n in names if any(has_kernel(n, key) for key in keys)
    )
    _state[device] = "active"


def _load_all() -> None:
    if os.environ.get("FASTWM_DISABLE_EXT", "0") not in ("", "0"):
        _state.update(cpu="disabled by FASTWM_DISABLE_EXT", cuda="disabled by FASTWM_DISABLE_EXT")
        return
    level = os.environ.get("FASTWM_CPU_CAPABILITY", "default")
    if level not in ("default", "avx2", "avx512"):
        warnings.warn(
            f"fastwm: FASTWM_CPU_CAPABILITY: expected default, avx2 or avx512, got {level!r}; "
            "using the best that the CPU has",
            RuntimeWarning,
            stacklevel=2,
        )
    _load("_C", "cpu")
    if "cpu" not in _kernels:
        _state["cuda"] = "needs _C"
    elif torch.version.cuda is None:
        _state["cuda"] = "this PyTorch has no CUDA"
    else:
        _load("_C_cuda", "cuda")


_load_all()


# A GPU leaves these to the library.
CPU_ONLY = {"mlp", "mlp_pack", "pool_conv", "pool_conv_backward", "twohot_mean_linear"}
CPU_ONLY |= {"image_loss", "image_loss_backward", "upsample_conv2d", "upsample_conv2d_backward"}
CPU_ONLY |= {"upsample_conv2d_silu", "upsample_conv2d_silu_backward"}
CPU_ONLY |= {"twohot_linear", "twohot_linear_backward", "sparse_linear", "sparse_linear_pack"}
CPU_ONLY |= {"sparse_linear_backward"}


def available(where: torch.Tensor | torch.device | str, op: str | None = None) -> bool:
    """Whether a fused kernel runs for raw op `op` on this device; without `op`: for all ops."""
    if isinstance(where, torch.Tensor):
        where = where.device
    kind = where.split(":")[0] if isinstance(where, str) else where.type
    if not _fused or kind not in _kernels:
        return False
    return _names - CPU_ONLY <= _kernels[kind] if op is None else op in _kernels[kind]


LOW_INPUT = {"cuda"}  # where the kernels of twohot and norm read bfloat16 themselves


def operand(x: torch.Tensor) -> torch.Tensor:
    """x as the raw ops of twohot and norm take it: float32, or bfloat16 where kernels read it."""
    low = x.dtype == torch.bfloat16 and x.device.type in LOW_INPUT
    return x if low else x.float()


def fused_wanted() -> bool:
    """False within `use_backend("reference")`: for fast paths that need no compiled kernel."""
    return _fused


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every op runs as `"reference"` (plain PyTorch) or `"fused"` (the default).

    Raises: ValueError for another name. `"fused"` still means the reference where no kernel is
    built; ask `available`.
    """
    global _fused
    if name not in ("reference", "fused"):
        raise ValueError(f"use_backend: expected 'reference' or 'fused', got {name!r}")
    before, _fused = _fused, name == "fused"
    try:
        yield
    finally:
        _fused = before


def backend_info() -> dict[str, str]:
    """What is active, as text: torch, CPU and CUDA state, instruction set, how it was built.

    `products`: who multiplies float32 matrices on the CPU; timed if nothing has asked for it yet.
    """
    info = {"torch": torch.__version__, "cpu": _state["cpu"], "cuda": _state["cuda"]}
    if "cpu" in _kernels:
        info["cpu_capability"] = raw.cpu_capability()
        info["build"] = raw.build_info().split(", schemas")[0]
    info["products"] = _products.describe()
    info["backend"] = "fused" if _fused and _kernels else "reference"
    return info


def register_fake(name: str) -> Callable:
    """Decorator: the shape function of raw op `name`, if the library that defines it is loaded."""
    if "cpu" not in _kernels:
        return lambda function: function
    return torch.library.register_fake(f"fastwm::{name}")


def wants_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would record an op on these: only then is the Function worth its cost."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
