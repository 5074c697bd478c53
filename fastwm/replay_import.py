"""Episodes that other programs stored, as rows of the replay; and the way back.

Two kinds of files, told apart by the parts of their names:
    <time>-<id>-<length>.npz            one episode; `action` is the one that led to the row
                                        (dreamerv3-torch, and what `write_episode` writes)
    <time>-<id>-<next>-<length>.npz     a piece of an environment's stream; `action` is the one
                                        taken after the row (danijar/dreamerv3)
Rows here are those of the replay: the action taken after the observation, zero in a last row.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastwm.replay_rows import LATENTS
from fastwm.spaces import Space

if TYPE_CHECKING:
    from fastwm.replay import Replay

Rows = dict[str, np.ndarray]  # (L, *shape) by key

_NAME = re.compile(r"^[^-]+-([^-]+)(?:-([^-]+))?-(\d+)\.npz$")
_PLAIN = ("action", "reward", "discount", "is_first", "is_last", "is_terminal", "logprob", "cont",
          "reset", "consec", "stepid", "id")  # fmt: skip


class DataError(ValueError):
    """A folder without episodes, or episodes of another environment."""


class Folder:
    """The episode files of a folder, chains of pieces in order.

    Attributes: files (in the order of `pieces`), rows (all of them together, by their names).
    Raises: DataError where there is none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        named = {p: m for p in sorted(self.folder.glob("*.npz")) if (m := _NAME.match(p.name))}
        if not named:
            raise DataError(
                f"episodes: expected a folder with files <time>-<id>-<length>.npz, got "
                f"{str(self.folder)!r} with {len(list(self.folder.glob('*')))} other entries"
            )
        self.rows = sum(int(match[3]) for match in named.values())
        self.chains = _chains(named)
        self.files = [path for chain in self.chains for path in chain]

    def pieces(self, obs_space: dict[str, Space], act_space: Space) -> Iterator[Rows]:
        """Every file as rows of these spaces. A chain's first row counts as the first of an
        episode, because what came before it is not there."""
        for chain in self.chains:
            for number, path in enumerate(chain):
                rows = read(path, obs_space, act_space)
                if number == 0:
                    rows["is_first"][:1] = True
                yield rows

    def spaces(self) -> tuple[dict[str, Space], Space]:
        """What the first file holds, for data without an environment."""
        raw, path = _load(self.files[0]), self.files[0]
        length = len(raw["reward"])
        obs_space = {}
        for name, value in raw.items():
            if name in _PLAIN or "/" in name or name.startswith("log_") or len(value) != length:
                continue
            if value.dtype == np.uint8 and value.ndim == 4:
                obs_space[name] = Space("image", value.shape[1:])
            elif value.dtype.kind in "fiub":
                obs_space[name] = Space("vector", value.shape[1:] or (1,))
        if not obs_space:
            raise DataError(f"episodes: expected an observation in {path}, got {sorted(raw)}")
        action = raw["action"]
        if action.dtype.kind in "iu" and action.ndim == 1:
            classes = 1 + max(int(_load(p)["action"].max()) for p in self.files)
            return obs_space, Space("discrete", (), (classes,))
        if _one_hot(action):
            return obs_space, Space("discrete", (), (action.shape[1],))
        return obs_space, Space("continuous", (action.shape[1],))


def _chains(named: dict[Path, re.Match]) -> list[list[Path]]:
    """Single episodes, and streams of pieces that name their successors."""
    follower = {m[1]: p for p, m in named.items() if m[2] is not None}
    followed = {m[2] for m in named.values()} - {None}
    chains = []
    for path, match in named.items():
        if match[2] is None:
            chains.append([path])
        elif match[1] not in followed:
            chain, after = [path], match[2]
            while after in follower:
                chain.append(follower[after])
                after = named[chain[-1]][2]
            chains.append(chain)
    return chains


def read(path: Path, obs_space: dict[str, Space], act_space: Space) -> Rows:
    """One file as rows of the replay.

    Raises: DataError naming what is missing or of another shape, or the file if it is damaged.
    """
    raw = _load(path)
    length = len(raw["reward"])
    missing = sorted(set(obs_space) - set(raw))
    if missing:
        raise DataError(
            f"episodes: expected observations {sorted(obs_space)} in {path}, got {sorted(raw)}; "
            f"missing {missing}: leave them out with --env.options.ignore, or give another task"
        )
    rows = {name: _observation(path, name, raw[name], obs_space[name]) for name in obs_space}
    rows["reward"] = raw["reward"].astype(np.float32).reshape(length)
    rows["is_first"] = _flag(raw, "is_first", np.arange(length) == 0)
    terminal = raw["discount"] == 0 if "discount" in raw else np.zeros(length, bool)
    rows["is_terminal"] = _flag(raw, "is_terminal", terminal)
    stream = _NAME.match(path.name)[2] is not None
    ends = np.zeros(length, bool) if stream else np.arange(length) == length - 1
    rows["is_last"] = _flag(raw, "is_last", ends) | rows["is_terminal"]
    action = _action(path, raw["action"], act_space)
    if not stream:  # the action of row t led to it: the one taken after it stands in row t + 1
        action = np.concatenate([action[1:], np.zeros_like(action[:1])])
    action[rows["is_last"]] = 0
    return {**rows, "action": action}


def _load(path: Path) -> Rows:
    try:
        with np.load(path) as file:
            raw = {name: file[name] for name in file}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"episodes: expected a readable npz file, got {path}: {error}; move it away"
        ) from None
    lengths = {name: len(raw[name]) for name in ("reward", "action") if name in raw}
    if len(lengths) < 2 or len(set(lengths.values())) > 1 or not raw["reward"].size:
        raise DataError(
            f"episodes: expected equally many rewards and actions in {path}, got {lengths or 'no'} "
            "rows"
        )
    return raw


def _flag(raw: Rows, name: str, default: np.ndarray) -> np.ndarray:
    return raw[name].astype(bool).reshape(-1).copy() if name in raw else default.copy()


def _observation(path: Path, name: str, value: np.ndarray, space: Space) -> np.ndarray:
    shape = (len(value), *space.shape)
    if value.shape == shape[:-1] and space.shape[-1:] == (1,):
        value = value[..., None]
    if value.shape != shape or (space.kind == "image" and value.dtype != np.uint8):
        raise DataError(
            f"episodes: expected {name} of shape (L, *{space.shape}) as {space.dtype} in {path}, "
            f"got {value.shape} as {value.dtype}"
        )
    return value.astype(space.dtype)


def _one_hot(action: np.ndarray) -> bool:
    """Rows of one 1 and zeros otherwise; the first row may be all zeros."""
    rest = action[1:] if len(action) > 1 else action
    values = np.isin(action, (0, 1)).all()
    return action.ndim == 2 and bool(values and (rest.sum(1) == 1).all())


def _action(path: Path, action: np.ndarray, space: Space) -> np.ndarray:
    """As the replay stores it: class numbers, or numbers in [-1, 1]."""
    shape = (len(action), *space.shape)
    if space.kind == "discrete" and action.dtype.kind in "iu" and action.shape == shape:
        return action.astype(np.int32)
    if space.kind == "discrete" and action.shape == (len(action), *space.classes):
        return action.argmax(1).astype(np.int32)
    if space.kind == "continuous" and action.shape == shape:
        return action.astype(np.float32)
    wanted = f"{space.classes} classes" if space.kind == "discrete" else f"shape {space.shape}"
    raise DataError(
        f"episodes: expected {space.kind} actions of {wanted} in {path}, got {action.shape} as "
        f"{action.dtype}; give the task that the episodes are from"
    )


def fill(replay: Replay, rows: Rows, env: int = 0) -> None:
    """Append many rows to one stream of a replay, with empty latents.

    Raises: ValueError for shapes, TypeError for a dtype, DataError where they do not fit.
    """
    count = len(rows["reward"])
    start = int(replay._count[env])
    if start + count > replay.length:
        raise DataError(
            f"episodes: expected at most {replay.length - start} more rows, got {count}"
        )
    with replay._lock:
        for name, key in replay.keys.items():
            if name not in LATENTS:
                array = key.check(np.asarray(rows[name])[None], (1, count), "1, L")
                replay.rings.fill(key, env, start, array[0])
        replay._count[env] += count


def episodes(replay: Replay) -> Iterator[Rows]:
    """Whole episodes of a replay, without its latents; the unfinished last ones are left out."""
    names = [name for name in replay.keys if name not in LATENTS]
    for env, count in enumerate(replay._count.tolist()):
        slots = np.arange(max(0, count - replay.length), count) % replay.length
        first = replay.keys["is_first"].ring[env, slots]
        last = replay.keys["is_last"].ring[env, slots]
        start = None
        for row in range(len(slots)):
            start = row if first[row] else start
            if last[row] and start is not None:
                part = slots[start : row + 1]
                yield {name: replay.keys[name].ring[env, part] for name in names}
                start = None


def write_episode(folder: Path, number: int, rows: Rows, act_space: Space) -> Path:
    """One episode as <number>-<id>-<length>.npz, with the action that led to each row."""
    rows = dict(rows)
    action = rows["action"]
    if act_space.kind == "discrete" and act_space.shape == ():
        action = np.eye(act_space.classes[0], dtype=np.float32)[action]
    rows["action"] = np.concatenate([np.zeros_like(action[:1]), action[:-1]])
    rows["discount"] = 1.0 - rows["is_terminal"].astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:08d}-fastwm-{len(action)}.npz"
    np.savez_compressed(path, **rows)
    return path


def summary(folder: Folder, replay: Any) -> str:
    """One line for the start of a run."""
    return f"data     {len(replay):,} rows in {len(folder.files)} files of {folder.folder}"
