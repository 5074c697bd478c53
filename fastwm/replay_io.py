"""Where a replay lives: free memory, memory-mapped rings, and saving to segment files.

A saved replay is a folder of raw files and a manifest that the caller keeps. A file holds, key by
key and env by env, a range of rows; the manifest says which range, its size and its CRC. Rows
never change once written, so each save appends only the new ones; latents change, so each save
dumps them.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastwm.replay_rows import LATENTS, Key

if TYPE_CHECKING:
    from fastwm.replay import Replay

FORMAT = 1
SEGMENT_BYTES = 256 << 20  # so that eviction can free disk in pieces
_OURS = re.compile(r"^(rows|latents)-\d+-[0-9a-f]{12}\.bin(\.tmp)?$")


# -- memory ---------------------------------------------------------------------------------------


def device_of(device: str | torch.device) -> torch.device:
    """Where the rings of storage "cuda" lie."""
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "replay.storage: expected a CUDA device for 'cuda', found none; "
            "use --replay.storage ram"
        )
    return device


def place_of(storage: str, directory: Path | None, device: torch.device) -> tuple[str, int | None]:
    """Where a new ring lies, in words, and the bytes free there; None if the system hides them."""
    if storage == "mmap":
        return "disk", free_disk(directory)
    if device.type == "cuda":
        return "GPU memory", torch.cuda.mem_get_info(device)[0]
    return "RAM", free_ram()


def free_ram() -> int | None:
    """Available memory of the machine, or what the container's limit leaves, if that is less."""
    found = [n for n in (_meminfo_available(), _cgroup_available()) if n is not None]
    if found:
        return min(found)
    try:  # macOS and others tell only what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _meminfo_available() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.M)
    return int(found.group(1)) * 1024 if found else None


def _cgroup_available(root: str = "/sys/fs/cgroup") -> int | None:
    """Limit minus use; file cache counts as free, since the kernel drops it under pressure."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = int(Path(root, limit).read_text())  # "max" is no number: no limit
            now = int(Path(root, used).read_text())
            stat = Path(root, limit).with_name("memory.stat").read_text()
        except (OSError, ValueError):
            continue
        found = re.search(rf"^{cache} (\d+)$", stat, re.M)
        return max(0, most - now + (int(found.group(1)) if found else 0))
    return None


def free_disk(directory: Path) -> int:
    """Free bytes of the file system, plus those of ring files that would be replaced."""
    place = directory.absolute()
    old = sum(f.stat().st_blocks * 512 for f in place.glob("*.ring")) if place.is_dir() else 0
    while not place.is_dir():
        place = place.parent
    return shutil.disk_usage(place).free + old


def map_ring(directory: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A fresh file of zeros as an array. It is sparse until rows arrive."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / (re.sub(r"[^A-Za-z0-9_.-]", "_", name) + ".ring")
    file.unlink(missing_ok=True)  # an older replay may still have it mapped
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.memmap(file, dtype, "w+", shape=shape)


# -- rows to and from files -----------------------------------------------------------------------


def _runs(
    replay: Replay, names: list[str], start: list[int], stop: list[int]
) -> Iterator[tuple[Key, int, int, int]]:
    """(key, env, slot, rows) of what holds the rows start..stop of every env, in file order."""
    for name in names:
        key = replay.keys[name]
        most = max(1, replay.rings.chunk // max(1, key.record))
        for env, (a, b) in enumerate(zip(start, stop, strict=True)):
            while a < b and key.record:
                slot = a % replay.length
                rows = min(b - a, replay.length - slot, most)
                yield key, env, slot, rows
                a += rows


def write_rows(
    replay: Replay, directory: Path, kind: str, names: list[str], start: list[int], stop: list[int]
) -> dict[str, Any]:
    """One file, complete or absent whatever happens meanwhile; returns its manifest entry."""
    file = directory / f"{kind}-{max(stop):012d}-{secrets.token_hex(6)}.bin"
    aside = file.with_name(file.name + ".tmp")
    size = crc = 0
    try:
        with open(aside, "wb") as out:
            for piece in _runs(replay, names, start, stop):
                run = replay.rings.read(*piece)
                out.write(run)
                size, crc = size + len(run), zlib.crc32(run, crc)
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return {"file": file.name, "bytes": size, "crc32": crc, "keys": names,
            "start": start, "stop": stop}  # fmt: skip


def read_rows(replay: Replay, directory: Path, entry: dict[str, Any]) -> None:
    """Read a file straight into the rings; raises naming it if anything is wrong with it."""
    file = directory / entry["file"]
    crc = 0
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise RuntimeError(_broken(file, f"{entry['bytes']} bytes", f"{size}"))
        with open(file, "rb") as source:
            for piece in _runs(replay, entry["keys"], entry["start"], entry["stop"]):
                run = replay.rings.buffer(*piece)
                if source.readinto(run) != len(run):
                    raise RuntimeError(_broken(file, f"{size} bytes", "an early end"))
                crc = zlib.crc32(run, crc)
                replay.rings.write(*piece, run)
    except OSError as error:
        raise RuntimeError(_broken(file, "a readable file", str(error))) from error
    if crc != entry["crc32"]:
        raise RuntimeError(_broken(file, f"CRC {entry['crc32']:08x}", f"{crc:08x}"))


def _broken(file: Path, expected: str, got: str) -> str:
    return (
        f"replay: expected {file} with {expected}, got {got}; the file is damaged: resume from "
        "another checkpoint, or without the replay"
    )


def _sync(directory: Path) -> None:
    """Make renames durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- the whole replay -----------------------------------------------------------------------------


def save(replay: Replay, directory: Path) -> dict[str, Any]:
    """Write new rows and all latents; returns the manifest, plain data for JSON or torch.save."""
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    count = replay._count.tolist()
    oldest = [max(0, n - replay.length) for n in count]
    fixed = [name for name in replay.keys if name not in LATENTS]
    latents = [name for name in replay.keys if name in LATENTS]
    segments = _kept(replay, directory, oldest)
    start = segments[-1]["stop"] if segments else oldest
    start = [max(a, b) for a, b in zip(start, oldest, strict=True)]
    record = sum(replay.keys[name].record for name in fixed)
    rows = max(1, SEGMENT_BYTES // (record * replay.num_envs))
    while start != count:
        stop = [min(a + rows, b) for a, b in zip(start, count, strict=True)]
        segments.append(write_rows(replay, directory, "rows", fixed, start, stop))
        start = stop
    dump = write_rows(replay, directory, "latents", latents, oldest, count) if latents else None
    _sync(directory)
    replay._saved = (directory, segments)
    replay._apply_cuts()
    return {
        "format": FORMAT, **_identity(replay), "segments": list(segments), "latents": dump,
        "count": count, "next": replay._next.tolist(), "seed": replay.seed,
        "draws": replay._draws, "cut": [list(pair) for pair in replay._cut],
        "expect_first": replay._expect_first.tolist(), "totals": dict(replay._totals),
    }  # fmt: skip


def _kept(replay: Replay, directory: Path, oldest: list[int]) -> list[dict[str, Any]]:
    """Segments of the last save that still count: same folder, there, not wholly overwritten."""
    place, segments = replay._saved
    if place != directory or not all((directory / s["file"]).exists() for s in segments):
        return []
    return [s for s in segments if any(b > a for b, a in zip(s["stop"], oldest, strict=True))]


def _identity(replay: Replay) -> dict[str, Any]:
    return {
        "spec": {name: [list(key.shape), key.dtype] for name, key in replay.keys.items()},
        "num_envs": replay.num_envs,
        "length": replay.length,
        "batch_length": replay.batch_length,
    }


def load(replay: Replay, directory: Path, manifest: dict[str, Any]) -> None:
    """Restore a replay of the same shape from its files."""
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"replay: expected a manifest of format {FORMAT}, got {manifest.get('format')!r}; "
            "it was written by another version"
        )
    for name, mine in _identity(replay).items():
        if manifest[name] != mine:
            raise ValueError(
                f"replay: expected a saved replay with {name} = {mine}, got {manifest[name]}; "
                "resume with the configuration it was saved with, or without the replay"
            )
    directory = directory.absolute()
    replay._count[:] = 0  # empty until everything is read
    for entry in [*manifest["segments"], *([manifest["latents"]] if manifest["latents"] else [])]:
        read_rows(replay, directory, entry)
    replay._count[:] = manifest["count"]
    replay._next[:] = manifest["next"]
    replay._set_seed(manifest["seed"], manifest["draws"])
    replay._cut = [list(pair) for pair in manifest["cut"]]
    replay._expect_first = np.array(manifest["expect_first"], bool)
    replay._totals = dict(manifest["totals"])
    replay._saved = (directory, list(manifest["segments"]))
    replay._apply_cuts()


def prune(directory: Path, *manifests: dict[str, Any]) -> None:
    """Delete files of ours that no manifest names: evicted segments, old dumps, torn writes."""
    named = set()
    for manifest in manifests:
        named |= {entry["file"] for entry in manifest["segments"]}
        named |= {manifest["latents"]["file"]} if manifest["latents"] else set()
    for file in directory.glob("*.bin*"):
        if _OURS.match(file.name) and file.name not in named:
            file.unlink(missing_ok=True)
