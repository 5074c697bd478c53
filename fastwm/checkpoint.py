"""Run folders: atomic files, a lock, and the check that a run goes on with its own settings.

<run>/config.toml               the resolved configuration, a valid preset
<run>/metrics.jsonl             one row per log interval
<run>/checkpoint/latest.pt      everything: config, agent, clocks, counters, environments
<run>/checkpoint/best.pt        config and agent at the best evaluation
<run>/checkpoint/policy.pt      what `fastwm.load_policy` reads
<run>/replay/                   the rows that latest.pt refers to
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not belong to this run."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name complete, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def write_with(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file of its own and put that under its name atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def save(path: str | Path, parts: dict[str, Any]) -> None:
    """Write named parts, atomically.

    Args:   path: the file. parts: name -> nested dicts, lists and tuples of tensors, numpy arrays,
            numbers, text, None.
    Raises: OSError when the disk refuses; the file of before is then untouched.
    """
    with atomic_file(Path(path)) as file:
        torch.save(_pack(parts), file)


def load(path: str | Path) -> dict[str, Any]:
    """The parts that `save` wrote, tensors on the CPU. Executes nothing that the file contains.

    Raises: CheckpointError when the file is missing, cut off or damaged; it is left as it is.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint: expected a file at {path}, found none")
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums
            bad = archive.testzip()
        if bad is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {bad}")
        return _unpack(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch reports damage as any of a dozen types
        cause = str(error).strip().split("\n")[0][:120] or type(error).__name__
        raise CheckpointError(
            f"checkpoint: {path} is cut off or damaged ({path.stat().st_size} bytes: {cause}); "
            f"move it away to start the run anew, or name another one with --checkpoint"
        ) from None


def find(run: str | Path, which: str = "best") -> list[Path]:
    """Files to try, in order, for best | latest | a path, given a run folder or a checkpoint."""
    run = Path(run)
    if which not in ("best", "latest"):
        return [Path(which)]
    if run.is_file():
        return [run]
    names = ["best.pt", "latest.pt"] if which == "best" else ["latest.pt", "best.pt"]
    found = [run / "checkpoint" / name for name in names]
    existing = [path for path in found if path.is_file()]
    if not existing:
        raise CheckpointError(
            f"checkpoint: expected a run folder with checkpoint/latest.pt, got "
            f"{run}; a run writes it at --checkpoint.every and at its end"
        )
    return existing


def load_any(run: str | Path, which: str = "best") -> tuple[dict[str, Any], Path, list[str]]:
    """The first readable checkpoint of `find`, its path, and what was wrong with those before."""
    troubles: list[str] = []
    for path in find(run, which):
        try:
            return load(path), path, troubles
        except CheckpointError as error:
            troubles.append(str(error))
    raise CheckpointError(troubles[0])


def compare(changes: list[tuple[str, Any, Any, bool]], run: Path) -> list[str]:
    """Lines that announce harmless changes of settings.

    Args:   changes: as `fastwm.config.differences` returns them, stored run to new one.
    Raises: CheckpointError naming each setting that a run cannot change.
    """
    refused = [f"{key} {old!r} -> {new!r}" for key, old, new, fixed in changes if fixed]
    if refused:
        raise CheckpointError(
            f"run folder {run} belongs to another configuration: {', '.join(refused)}; "
            f"give another --logdir, or the settings in {run / 'config.toml'}"
        )
    return [f"changed on resume: {key} {old!r} -> {new!r}" for key, old, new, _ in changes]


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Keep a second process out of a run folder; released by the system when a process dies.

    Makes the folder, and removes it again where nothing was written into it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows: there the folder is not guarded
        yield
        return
    path = run / ".lock"
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    except OSError as error:
        raise CheckpointError(
            f"run folder {run}: expected a folder to write to, got {error.strerror}; "
            f"give another --logdir"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"run folder {run} is in use by another process; wait for it, "
                f"or give another --logdir"
            ) from None
        try:
            yield
        finally:
            if list(run.iterdir()) == [path]:  # nothing came of it
                path.unlink()
                run.rmdir()


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


_ARRAY = "numpy array"


def _pack(tree: Any) -> Any:
    """Arrays as tensors, because torch's safe loader knows nothing else."""
    if isinstance(tree, dict):
        return {key: _pack(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return (
            type(tree)(_pack(value) for value in tree)
            if type(tree) in (list, tuple)
            else [_pack(value) for value in tree]
        )
    if isinstance(tree, np.ndarray):
        return {_ARRAY: torch.from_numpy(np.array(tree, order="C"))}
    if isinstance(tree, np.generic):
        return tree.item()
    return tree


def _unpack(tree: Any) -> Any:
    if isinstance(tree, dict):
        if len(tree) == 1 and _ARRAY in tree:
            return tree[_ARRAY].numpy()
        return {key: _unpack(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_unpack(value) for value in tree)
    return tree
