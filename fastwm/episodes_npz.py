"""Rollout files of other World Models code, to and from the rows of an EpisodeStore.

A rollout file is a .npz with `observations` (T, H, W, C) uint8, `actions` (T, A), `rewards` (T,)
and `terminals` (T,). What stands in one line of it differs:

    "before"  the observation that the action was chosen from; reward and terminal came of it
              (torchwm, and the `record` files of the 2018 code with `obs` and `action` only)
    "after"   the observation that the action led to, with its reward and terminal (ctallec)

Either kind lacks one observation of the episode: the last, or the first. Files written here carry
it under a name of its own (`last_observation`, `first_observation`), which others ignore.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ORDERS = ("before", "after")
NAMES = {"obs": "observations", "action": "actions"}  # of the record files


class RolloutError(ValueError):
    """A folder without rollout files, or a file that is not one."""


def find_rollouts(folder: str | Path) -> list[Path]:
    """Rollout files of a folder and of those in it, by name; latents and others are passed over."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RolloutError(f"rollouts: expected a folder with .npz rollouts, got {folder}")
    found = [path for path in sorted(folder.rglob("*.npz")) if _is_rollout(path)]
    if not found:
        raise RolloutError(
            f"rollouts: expected .npz files with the arrays observations, actions, rewards and "
            f"terminals in {folder}, found none"
        )
    return found


def _is_rollout(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {Path(name).stem for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise RolloutError(f"rollouts: expected a whole .npz file, got {path}: {error}") from None
    return {NAMES.get(name, name) for name in names} >= {"observations", "actions"}


def read_rollout(path: str | Path, order: str = "before") -> dict[str, Any]:
    """One file as rows: image (T, H, W, C) with reward (T,), then action (T, A); and terminal.

    "before": the rows are those of the file. Where the last decision ended the episode, its
    observation is the file's `last_observation`, or else a copy of the one before, so that the end
    is not lost; where it did not and there is no such observation, that decision is left out.
    "after": likewise with `first_observation`; without it the first decision is left out.
    """
    _check_order(order)
    with np.load(path) as file:  # lazy: every access reads the array again
        part = {NAMES.get(name, name): file[name] for name in file.files}
    image, action, reward, terminals = _arrays(Path(path), part)
    ended = bool(terminals[-1])
    if order == "after":
        return _after(image, action, reward, ended, part.get("first_observation"))
    last = part.get("last_observation", image[-1] if ended else None)
    if last is not None:
        image = np.concatenate([image, last[None]])
        action = np.concatenate([action, np.zeros_like(action[:1])])
        reward = np.concatenate([reward, reward[:1]])  # room for one more, shifted below
    reward = np.concatenate([np.zeros(1, np.float32), reward[:-1]])
    action[-1] = 0
    return {"image": image, "action": action, "reward": reward, "terminal": ended}


def _after(
    image: np.ndarray, action: np.ndarray, reward: np.ndarray, ended: bool, first: Any
) -> dict[str, Any]:
    if first is not None:
        image = np.concatenate([first[None], image])
        action = np.concatenate([action, np.zeros_like(action[:1])])
        reward = np.concatenate([np.zeros(1, np.float32), reward])
    else:
        action = np.concatenate([action[1:], np.zeros_like(action[:1])])
        reward[0] = 0.0
    return {"image": image, "action": action, "reward": reward, "terminal": ended}


def _arrays(path: Path, part: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    image = part["observations"]
    if image.ndim != 4 or image.dtype != np.uint8 or len(image) < 2:
        raise RolloutError(
            f"rollouts: expected observations (T, H, W, C) uint8 with T >= 2 in {path}, got "
            f"{image.dtype} {image.shape}"
        )
    count = len(image)
    columns = []
    for name in ("actions", "rewards", "terminals"):
        column = np.array(part.get(name, np.zeros(count)), np.float32)
        if name == "actions":
            column = column.reshape(len(column), -1)
        if len(column) != count or (name != "actions" and column.ndim != 1):
            raise RolloutError(
                f"rollouts: expected {name} of length T = {count} in {path}, got {column.shape}"
            )
        columns.append(column)
    return image, *columns


def write_rollout(path: str | Path, episode: dict[str, Any], order: str = "before") -> None:
    """The rows of one episode as a file, compressed."""
    _check_order(order)
    image, action, reward = episode["image"], episode["action"], episode["reward"]
    terminals = np.zeros(len(image) - 1, np.float32)
    terminals[-1] = episode["terminal"]
    before = order == "before"
    extra = {"last_observation": image[-1]} if before else {"first_observation": image[0]}
    np.savez_compressed(
        path,
        observations=image[:-1] if before else image[1:],
        actions=np.asarray(action[:-1], np.float32),
        rewards=np.asarray(reward[1:], np.float32),
        terminals=terminals,
        **extra,
    )


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise RolloutError(
            f"rollouts: expected the order of a line to be one of {ORDERS}, got {order!r}"
        )


def read_rollouts(folder: str | Path, order: str = "before") -> Iterator[tuple[Path, dict]]:
    """(file, its rows) of every rollout of a folder."""
    for path in find_rollouts(folder):
        yield path, read_rollout(path, order)


def write_latents(
    path: str | Path,
    mu: np.ndarray,  # (rows, Z)
    store: Any,
) -> None:
    """All episodes as one file: latents, actions, rewards, terminals, one line per decision.

    Lines are in the order "before"; `lengths`, which others ignore, says how many each episode has.
    """
    decisions = store.lengths - 1
    last = store.starts + decisions  # the rows after which nothing is done
    keep = np.delete(np.arange(store.rows), last)
    terminals = np.zeros(len(keep), np.float32)
    terminals[np.cumsum(decisions) - 1] = store.terminal
    np.savez_compressed(
        path,
        latents=np.asarray(mu[keep], np.float32),
        actions=np.asarray(store.action[keep]),
        rewards=np.asarray(store.reward[keep + 1]),
        terminals=terminals,
        lengths=decisions,
    )
