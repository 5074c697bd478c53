"""Whole episodes on disk, as contiguous arrays over all rows, and the data sets made of them.

    <folder>/index.json                             sizes, and the length of every episode
    <folder>/image.bin action.bin reward.bin        rows of all episodes, one after the other

A row is a row of the replay: `image` with the `reward` that arrived with it, and the `action` taken
after it. An episode of L decisions has L + 1 rows; its last action is zero because nothing is done
with it. The index is written after the rows, atomically: what a crash leaves behind it is cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "fastwm-episodes-1"


class EpisodeError(ValueError):
    """A folder without episodes, or arrays that do not fit it."""


class EpisodeStore:
    """Episodes of one kind of picture and action.

    folder: one that `create` made. Arrays are memory-mapped: opening costs nothing, and what is
    read stays in the system's cache as long as there is room.
    Raises: EpisodeError when the folder holds none, or damaged ones.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "index.json"
        try:
            index = json.loads(path.read_text())
        except FileNotFoundError:
            raise EpisodeError(
                f"episodes: expected a folder with index.json, got {self.folder}; collect some "
                "with --stage collect, or convert rollout files (docs/guide_ha.md)"
            ) from None
        except ValueError as error:
            raise EpisodeError(f"episodes: expected JSON in {path}, got {error}") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise EpisodeError(f"episodes: expected format {FORMAT!r} in {path}, got another")
        self.shape, self.action_size = tuple(index["image"]), int(index["action"])
        self.terminal = np.array(index["terminal"], bool)
        self._set_lengths(index["lengths"])
        for name, (shape, dtype) in self._columns().items():
            size = self.rows * int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            found = self._path(name).stat().st_size if self._path(name).is_file() else 0
            if found < size:
                raise EpisodeError(
                    f"episodes: expected {size} bytes in {self._path(name)} for {self.rows} rows, "
                    f"got {found}; the file was cut off"
                )
        self._open()

    @classmethod
    def create(
        cls, folder: str | Path, image: Sequence[int] = (64, 64, 3), action: int = 3
    ) -> EpisodeStore:
        """A new, empty store; or the one that is there, if it holds the same kind of rows."""
        folder = Path(folder)
        if not (folder / "index.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("image", "action", "reward"):
                (folder / f"{name}.bin").touch()
            _write_index(folder, tuple(image), action, [], [])
        store = cls(folder)
        if (store.shape, store.action_size) != (tuple(image), action):
            raise EpisodeError(
                f"episodes: expected pictures {tuple(image)} and actions of width {action} in "
                f"{folder}, got {store.shape} and {store.action_size}; give another --data_dir"
            )
        return store

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def rows(self) -> int:
        """Rows of all episodes."""
        return int(self.lengths.sum())

    def append(
        self,
        image: np.ndarray,  # (T, H, W, C) uint8
        action: np.ndarray,  # (T, A), the last one is stored as zeros
        reward: np.ndarray,  # (T,)
        terminal: bool,
    ) -> None:
        """Add one whole episode. It is there after a crash either whole or not at all."""
        arrays = {"image": image, "action": action, "reward": reward}
        rows = len(image)
        for name, (shape, dtype) in self._columns().items():
            array = arrays[name]
            if array.shape != (rows, *shape) or rows < 2:
                raise EpisodeError(
                    f"episodes: expected {name} of shape (T, {', '.join(map(str, shape))}) with "
                    f"T >= 2, got {array.shape}"
                )
            if (array.dtype == np.uint8) != (dtype == np.uint8):
                raise EpisodeError(f"episodes: expected {name} as {dtype}, got {array.dtype}")
        action = np.array(action, np.float32)
        action[-1] = 0.0
        arrays["action"] = action
        for name, (shape, dtype) in self._columns().items():
            with open(self._path(name), "r+b") as file:
                row = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
                file.truncate(self.rows * row)
                file.seek(self.rows * row)
                file.write(np.ascontiguousarray(arrays[name], dtype).tobytes())
        self._set_lengths([*self.lengths.tolist(), rows])
        self.terminal = np.append(self.terminal, bool(terminal))
        _write_index(
            self.folder, self.shape, self.action_size, self.lengths.tolist(), self.terminal.tolist()
        )
        self._stale = True

    def episode(self, index: int) -> dict[str, Any]:
        """Rows of one episode, as views, and whether it ended by itself."""
        start = int(self.starts[index])
        part = slice(start, start + int(self.lengths[index]))
        return {
            "image": self.image[part],
            "action": self.action[part],
            "reward": self.reward[part],
            "terminal": bool(self.terminal[index]),
        }

    def split(
        self, num_test_files: int, which: tuple[int, int] = (0, 0)
    ) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the episodes to learn from, and of the last ones, to test on.

        which: first and one after the last that are meant at all; a last of 0: to the end. 0 test
        episodes are fine; where there are not more than that, all are learned from.
        """
        first, end = which[0], which[1] or len(self)
        if end > len(self) or first >= end:
            raise EpisodeError(
                f"episodes: expected at least {max(end, first + 1)} in {self.folder}, because "
                f"{first} to {end} are to be learned from, got {len(self)}; collect more, or give "
                "another range"
            )
        ids = np.arange(first, end)
        if num_test_files <= 0 or len(ids) <= num_test_files:
            return ids, ids[:0]
        return ids[:-num_test_files], ids[-num_test_files:]

    def row_ids(self, episodes: np.ndarray) -> np.ndarray:
        """Numbers of all rows of some episodes."""
        parts = [np.arange(self.starts[e], self.starts[e] + self.lengths[e]) for e in episodes]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    @property
    def image(self) -> np.ndarray:  # (rows, H, W, C) uint8
        return self._arrays()["image"]

    @property
    def action(self) -> np.ndarray:  # (rows, A) float32
        return self._arrays()["action"]

    @property
    def reward(self) -> np.ndarray:  # (rows,) float32
        return self._arrays()["reward"]

    def _arrays(self) -> dict[str, np.ndarray]:
        if self._stale:
            self._open()
        return self._maps

    def _open(self) -> None:
        self._stale = False
        self._maps = {
            name: np.memmap(self._path(name), dtype, "r", shape=(self.rows, *shape))
            if self.rows
            else np.zeros((0, *shape), dtype)
            for name, (shape, dtype) in self._columns().items()
        }

    def _columns(self) -> dict[str, tuple[tuple[int, ...], type]]:
        return {
            "image": (self.shape, np.uint8),
            "action": ((self.action_size,), np.float32),
            "reward": ((), np.float32),
        }

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        self.lengths = np.array(lengths, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)[
            : len(self.lengths)
        ]


def _write_index(
    folder: Path, image: tuple[int, ...], action: int, lengths: list[int], terminal: list[bool]
) -> None:
    index = {"format": FORMAT, "image": list(image), "action": int(action)}
    text = json.dumps(index | {"lengths": lengths, "terminal": terminal})
    partial = folder / f".index.{os.getpid()}.tmp"
    partial.write_text(text)
    os.replace(partial, folder / "index.json")


class Frames:
    """Single pictures of some episodes; works with torch's DataLoader, workers included."""

    def __init__(self, store: EpisodeStore, episodes: np.ndarray) -> None:
        self.store, self.ids = store, store.row_ids(episodes)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> np.ndarray:  # (H, W, C) uint8
        return np.array(self.store.image[self.ids[index]])

    def batch(self, index: np.ndarray) -> np.ndarray:  # (N,) -> (N, H, W, C)
        """Many at once. Sorted while reading, so that the disk is read forwards."""
        ids = self.ids[index]
        order = np.argsort(ids)
        out = np.empty((len(ids), *self.store.shape), np.uint8)
        out[order] = self.store.image[ids[order]]
        return out


class Windows:
    """Where sequences of T decisions may be cut out of episodes: never across their borders.

    Rows beyond an episode's end have weight 0; they are at most half of a window, or what an
    episode shorter than that leaves.
    """

    def __init__(self, store: EpisodeStore, episodes: np.ndarray, length: int) -> None:
        if length < 1:
            raise EpisodeError(f"episodes: expected sequences of at least 1 row, got {length}")
        self.store, self.length = store, int(length)
        self.episodes = np.asarray(episodes, np.int64)
        decisions = store.lengths[self.episodes] - 1
        # Up to half a window may lie beyond the end: otherwise the end of an episode would be the
        # last row of a single window, and M would hardly ever see one.
        self.counts = np.maximum(decisions - length // 2, 1)  # windows that start in each episode
        self.total = int(self.counts.sum())
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return self.total

    def rows(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of windows (B,): rows (B, T + 1), weight (B, T), first (B, T), done (B, T) float32.

        Row numbers beyond an episode's end repeat its last one. done is 1 where the decision
        ended the episode by itself.
        """
        which = np.searchsorted(self._ends, index, side="right")
        offset = index - (self._ends[which] - self.counts[which])
        episode = self.episodes[which]
        start, last = self.store.starts[episode], self.store.lengths[episode] - 1
        steps = offset[:, None] + np.arange(self.length + 1)
        rows = start[:, None] + np.minimum(steps, last[:, None])
        weight = (steps[:, :-1] < last[:, None]).astype(np.float32)
        done = (steps[:, :-1] == last[:, None] - 1) & self.store.terminal[episode][:, None]
        return rows, weight, (steps[:, :-1] == 0).astype(np.float32), done.astype(np.float32)


class Sequences:
    """Windows of pictures, actions and what they led to."""

    def __init__(self, store: EpisodeStore, episodes: np.ndarray, length: int) -> None:
        self.store, self.windows = store, Windows(store, episodes, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """image, next_image (T, H, W, C), action (T, A), and of the next row reward, done (T,)."""
        return {key: value[0] for key, value in self.batch(np.array([index])).items()}

    def batch(self, index: np.ndarray) -> dict[str, np.ndarray]:
        rows, weight, first, done = self.windows.rows(index)
        image = self.store.image[rows]
        return {
            "image": image[:, :-1],
            "next_image": image[:, 1:],
            "action": self.store.action[rows[:, :-1]],
            "reward": self.store.reward[rows[:, 1:]],
            "done": done,
            "first": first,
            "weight": weight,
        }


class Latents:
    """Windows of encoded pictures: their means and log-variances, so that z is drawn anew."""

    def __init__(
        self,
        store: EpisodeStore,
        episodes: np.ndarray,
        length: int,
        mu: np.ndarray,  # (rows, Z)
        logvar: np.ndarray,  # (rows, Z)
    ) -> None:
        if len(mu) != store.rows or mu.shape != logvar.shape:
            raise EpisodeError(
                f"episodes: expected latents of {store.rows} rows, got {mu.shape} and "
                f"{logvar.shape}; run --stage latents again"
            )
        self.store, self.windows = store, Windows(store, episodes, length)
        self.mu, self.logvar = mu, logvar

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {key: value[0] for key, value in self.batch(np.array([index])).items()}

    def batch(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """mu, logvar (B, T + 1, Z), action (B, T, A), reward, done, first, weight (B, T)."""
        rows, weight, first, done = self.windows.rows(index)
        return {
            "mu": self.mu[rows],
            "logvar": self.logvar[rows],
            "action": self.store.action[rows[:, :-1]],
            "reward": self.store.reward[rows[:, 1:]],
            "done": done,
            "first": first,
            "weight": weight,
        }
