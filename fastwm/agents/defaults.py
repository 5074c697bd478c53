"""What "auto" stands for on a device, and why; `python -m fastwm.doctor` prints it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastwm.ops import _products


class Default(NamedTuple):
    value: str
    reason: str


def precision(device: torch.device) -> Default:
    if device.type != "cuda":
        return Default("fp32", f"the CPU kernels compute in float32; {_low_on_cpu()}")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Default("bf16", "this GPU multiplies bfloat16, which needs no loss scale")
    return Default("fp16", "this GPU does not multiply bfloat16; the loss is scaled")


def _low_on_cpu() -> str:
    if not _products.multiplies_low():
        return "this CPU has no instructions for bfloat16, which takes many times longer"
    if not _products.low_pays():
        return "products in bfloat16 were not faster here"
    return "products in bfloat16 were faster here, so --precision bf16 may pay"


def caution(precision: str, device: torch.device) -> str:
    """What to tell a person who asked for this precision on this device; mostly nothing."""
    if device.type != "cpu" or precision == "fp32":
        return ""
    if precision == "bf16" and _products.multiplies_low():
        return ""
    return " (slower than fp32: this CPU has no instructions for it)"


def compiled(device: torch.device) -> Default:
    if device.type != "cuda":
        return Default(
            "off", "beside the kernels it gained nothing, and it takes minutes at the start"
        )
    return Default("off", "what it adds to the kernels and the graph was never measured on a GPU")


def cudagraphs(device: torch.device) -> Default:
    if device.type != "cuda":
        return Default("off", "graphs are of CUDA")
    return Default(
        "on", "an update is hundreds of short kernels, a decision a hundred: one launch for all"
    )


def storage(device: torch.device) -> Default:
    """Of the replay's rows; what is taken unless a setting says otherwise."""
    if device.type != "cuda":
        return Default("ram", "rows are where the learner is; mmap is for more than fits")
    return Default("ram", "it holds most; cuda samples where the learner is, if the rows fit there")


def threads(device: torch.device) -> Default:
    """Of PyTorch on the CPU; 0 leaves them as PyTorch has them. They wait by spinning."""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load < cores / 2:
        return Default("0", "one a core; they spin while they wait, which is fastest on idle cores")
    return Default(
        "0",
        "one a core; they spin while they wait, which starves other programs and is slow beside "
        f"them: these {cores} cores are busy (load {load:.1f}), so take --threads 1",
    )


DEFAULTS = {"precision": precision, "compile": compiled, "cudagraphs": cudagraphs}


def chosen(key: str, value: str, device: torch.device) -> str:
    """The setting `key` on this device: its value, or what "auto" stands for."""
    return DEFAULTS[key](device).value if value == "auto" else value


def lines() -> Iterator[str]:
    """What to tell a person about the device that a run would take."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    yield f"defaults on {name}:"
    for key, default in [*DEFAULTS.items(), ("replay.storage", storage), ("threads", threads)]:
        value, reason = default(device)
        yield f"--{key:<19}{value}: {reason}"
