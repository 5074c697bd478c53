"""Replay of environment rows in one contiguous ring per key.

Rows lie [env][time], so a window of T + 1 rows is one or two runs of memory and a batch costs B
copies per key, whatever the capacity. Every env has a 64-bit row counter that only grows; the row n
lies in slot n % length, and it is alive while n >= counter - length. All bookkeeping is two int64
arrays of N elements: nothing is stored per window or per row.

The rings lie in host memory or mapped files (replay_host.py) or on a GPU (replay_device.py). The
compiled module `fastwm._replay` plans, and copies on the host, with the GIL released; without it
the same methods run on numpy slices and return the same bits (`Replay.backend` says which).
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastwm import replay_io, replay_rows
from fastwm.replay_device import DeviceRings, Gather
from fastwm.replay_host import HostRings
from fastwm.replay_rows import LATENTS, Spec

try:
    if os.environ.get("FASTWM_DISABLE_EXT", "0") not in ("", "0"):
        raise ImportError("switched off by FASTWM_DISABLE_EXT")
    from fastwm import _replay
except ImportError:
    _replay = None

Batch = dict[str, torch.Tensor]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix64(x: int) -> int:
    """Finalizer of splitmix64: a bijection of 64-bit words."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


class Replay:
    """Ring of rows of N environments, sampled in windows of T + 1 consecutive rows.

    A row holds an observation, the reward and flags that arrived with it, and the action taken
    after it. A window may cross the end of an episode (the model resets at is_first), never the
    place where the ring is being written.

    Args:
        spec: key -> (shape, dtype name) of one row. Needs action, reward ((), "float32"), is_first,
            is_last, is_terminal ((), "bool"); may hold the latents deter ((D,), "bfloat16") and
            stoch ((S,), "uint8", or "int32" above 256 classes).
        num_envs: N, streams that are written side by side.
        capacity: rows of all envs together; each env keeps the last `capacity // num_envs`.
        batch_length: T, rows per sampled sequence; a window has one context row more.
        online: hand out every env's fresh, non-overlapping windows once, before uniform draws.
        seed: of the sampling; the generator is counter-based and part of `save`.
        storage: "ram"; "mmap" for files in `directory` that the system may page out; "cuda" for
            tensors on `device`, where batches then lie too. Files are the live ring, not a
            checkpoint: `save` works the same for all three, and one loads what another saved.
        device: of the rings for "cuda"; "cpu" keeps the same tensors in host memory.
        gather: for "cuda", `fastwm.ops.gather_windows`: one launch a batch instead of one a key.
        force: allocate even what does not fit.

    Attributes: num_envs, batch_length, length (rows per env), nbytes, bytes_per_row, backend,
        device (of batches).

    Raises: ValueError for settings that cannot work, among them a ring of more than 0.8 of the
        free memory; TypeError for an unknown dtype.
    """

    def __init__(
        self,
        spec: Spec,
        num_envs: int,
        capacity: int,
        batch_length: int,
        *,
        online: bool = True,
        seed: int = 0,
        storage: str = "ram",
        directory: str | os.PathLike | None = None,
        device: str | torch.device = "cuda",
        gather: Gather | None = None,
        force: bool = False,
    ) -> None:
        if num_envs < 1 or batch_length < 1:
            raise ValueError(
                f"replay: expected num_envs >= 1 and batch_length >= 1, got {num_envs} and "
                f"{batch_length}"
            )
        self.num_envs, self.batch_length = int(num_envs), int(batch_length)
        self.length = int(capacity) // self.num_envs
        self.window = self.batch_length + 1
        if self.length < self.window:
            raise ValueError(
                f"replay.capacity: expected at least num_envs * (batch_length + 1) = "
                f"{self.num_envs * self.window} rows, got {int(capacity)}; raise --replay.capacity"
            )
        if storage not in ("ram", "mmap", "cuda") or (storage == "mmap" and directory is None):
            raise ValueError(
                "replay.storage: expected 'ram', 'cuda', or 'mmap' together with a directory, "
                f"got {storage!r} with directory {directory!r}"
            )
        self.online, self.storage = bool(online), storage
        self.directory = None if directory is None else Path(directory)
        self.device = replay_io.device_of(device) if storage == "cuda" else torch.device("cpu")
        self.keys = replay_rows.read_spec(spec, self.batch_length)
        self.place, self.free = replay_io.place_of(storage, self.directory, self.device)
        if not force:
            replay_rows.check_fits(self.keys, self.num_envs * self.length, self.place, self.free)
        self._lock = threading.RLock()
        self._count = np.zeros(self.num_envs, np.int64)  # rows ever written, per env
        # first row of the next online window; phases are spread so that windows of different envs
        # become ready at different times, else every (T+1)-th batch would be all online
        self._next = np.arange(self.num_envs, dtype=np.int64) * self.window // self.num_envs
        self._set_seed(seed, 0)
        self._cut: list[list[int]] = []  # [env, row] whose is_last was set by reset_stream
        self._expect_first = np.zeros(self.num_envs, bool)
        self._totals = {"samples": 0, "online": 0, "online_dropped": 0, "latents_dropped": 0}
        self._saved: tuple[Path | None, list[dict]] = (None, [])
        self._layouts: dict[int, list] = {}
        self._allocate(gather)

    def _allocate(self, gather: Gather | None) -> None:
        """Create the rings, and the compiled view of the bookkeeping."""
        self._native = None
        if _replay is not None:
            self._native = _replay.Ring(
                self.num_envs, self.length, self.batch_length,
                self._count.ctypes.data, self._next.ctypes.data,
            )  # fmt: skip
        if self.storage == "cuda":
            self.rings = DeviceRings(self.keys, self._count, self.length, self.device, gather)
        else:
            folder = self.directory if self.storage == "mmap" else None
            self.rings = HostRings(self.keys, self._count, self.length, folder, self._native)

    def _set_seed(self, seed: int, draws: int) -> None:
        """Place the generator: draw i is a hash of seed and i, nothing else is its state."""
        self.seed, self._draws = int(seed), int(draws)
        self._rng_key = _mix64((self.seed ^ _GOLDEN) & _MASK)

    # -- size -------------------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """ "native" when the compiled module is at work, else "numpy"."""
        return "numpy" if self._native is None else "native"

    @property
    def bytes_per_row(self) -> int:
        """Bytes that one row of one env occupies; there is nothing on top of it."""
        return sum(key.record for key in self.keys.values())

    @property
    def nbytes(self) -> int:
        """Bytes at capacity. RAM is touched only as rows arrive."""
        return self.bytes_per_row * self.num_envs * self.length

    def announce(self) -> str:
        """One line: bytes at capacity by kind, against what was free before allocation."""
        return replay_rows.announce(self.keys, self.num_envs * self.length, self.place, self.free)

    def __len__(self) -> int:
        """Rows alive, all envs together."""
        return int(np.minimum(self._count, self.length).sum())

    @property
    def windows(self) -> int:
        """Windows of T + 1 rows that a uniform draw chooses from."""
        if self._native is not None:
            return self._native.windows()
        return int(np.maximum(np.minimum(self._count, self.length) - self.batch_length, 0).sum())

    def can_sample(self, batch_size: int) -> bool:
        """Whether there are batch_size different windows, or as many as can ever be."""
        most = self.num_envs * (self.length - self.batch_length)
        return self.windows >= min(batch_size, most)

    def stats(self) -> dict[str, float]:
        """Numbers to log: rows and windows alive, windows sampled, share of online ones, losses."""
        total = self._totals
        return {
            "rows": len(self),
            "windows": self.windows,
            "samples": total["samples"],
            "online_share": total["online"] / max(1, total["samples"]),
            "online_dropped": total["online_dropped"],
            "latents_dropped": total["latents_dropped"],
            "bytes_per_row": self.bytes_per_row,
            "nbytes": self.nbytes,
        }

    # -- writing ----------------------------------------------------------------------------------

    def add(self, rows: dict[str, Any], envs: np.ndarray | None = None) -> None:
        """Append one row to every env, or to each of `envs`.

        Args:
            rows: exactly the keys of the spec, numpy or torch, each (N, *shape) in its stored type;
                action is the one taken after the row, zeros where is_last. float32 latents are
                rounded to bfloat16, int64 becomes int32. What lies on a device of "cuda" already
                is copied there.
            envs: (M,) different env numbers when only those have a new row; rows then lead with M.

        Raises: ValueError for keys or shapes, TypeError for a dtype; nothing is written then.
        """
        if envs is None:
            with self._lock:  # what a step of a run brings
                if not np.count_nonzero(self._expect_first) and self.rings.add_whole(rows):
                    return
        lanes = None if envs is None else self._check_envs(envs)
        if rows.keys() != self.keys.keys():
            missing = sorted(self.keys.keys() - rows.keys())
            unknown = sorted(rows.keys() - self.keys.keys())
            raise ValueError(
                f"replay: expected rows with the keys {sorted(self.keys)}, got {sorted(rows)}; "
                f"missing {missing}, unknown {unknown}"
            )
        lead = (self.num_envs,) if lanes is None else (len(lanes),)
        check = self.rings.check
        arrays = [check(key, rows[name], lead, "N") for name, key in self.keys.items()]
        with self._lock:
            if np.count_nonzero(self._expect_first):
                self._check_fresh(arrays[list(self.keys).index("is_first")], lanes)
            self.rings.add(arrays, lanes)

    def _check_envs(self, envs: Any) -> np.ndarray:
        lanes = np.ascontiguousarray(envs, dtype=np.int64)
        inside = lanes.ndim == 1 and ((lanes >= 0) & (lanes < self.num_envs)).all()
        if not inside or len(np.unique(lanes)) != len(lanes):
            raise ValueError(
                f"replay: expected envs (M,) different numbers in [0, {self.num_envs}), got {envs}"
            )
        return lanes

    def _check_fresh(self, is_first: Any, lanes: np.ndarray | None) -> None:
        """After reset_stream every env must begin an episode."""
        is_first = torch.as_tensor(is_first).cpu().numpy()
        where = slice(None) if lanes is None else lanes
        if (self._expect_first[where] & ~is_first).any():
            raise ValueError(
                "replay: expected is_first in the first row of every env after reset_stream, got "
                f"{is_first.tolist()}; reset the environments before adding"
            )
        self._expect_first[where] = False

    def reset_stream(self) -> None:
        """Close every stream: what is added next comes from freshly reset environments.

        The last stored row of each env becomes is_last (never is_terminal: the episode was cut, it
        did not end), and the next row must be is_first, so no window pretends that the old episode
        goes on.
        """
        with self._lock:
            for env, count in enumerate(self._count.tolist()):
                if count and not self.keys["is_last"].ring[env, (count - 1) % self.length]:
                    self._cut.append([env, count - 1])
            self._apply_cuts()
            self._expect_first = self._count > 0

    def _apply_cuts(self) -> None:
        """Set is_last on cut rows, forget those that were overwritten."""
        self._cut = [[env, row] for env, row in self._cut if row >= self._count[env] - self.length]
        for env, row in self._cut:
            self.keys["is_last"].ring[env, row % self.length] = True

    def update_latents(
        self, ids: Any, deter: Any, stoch: Any, keep: torch.Tensor | None = None
    ) -> None:
        """Store fresh posteriors for the rows 1..T of sampled windows.

        Args:
            ids: (B, 2) int64, as `sample` returned them: env, counter of row 1.
            deter: (B, T, D) bfloat16, or float32 that is rounded. None if the spec has none.
            stoch: (B, T, S) class indices in the stored type. None if the spec has none.
            keep: () bool; where it is false nothing is stored. "cuda" does not wait for it.

        Rows that were overwritten since the window was sampled are left alone and counted in
        `stats()["latents_dropped"]`. Where windows overlap the later one in the batch stays.

        Raises: ValueError for shapes or for rows that never existed, TypeError for a dtype.
        """
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        if ids.ndim != 2 or ids.shape[1] != 2:
            raise ValueError(f"replay: expected ids of shape (B, 2), got {ids.shape}")
        lead = (len(ids), self.batch_length)
        fresh = {"deter": deter, "stoch": stoch}
        if not any(name in self.keys for name in LATENTS):
            raise ValueError("replay: expected a spec with deter or stoch, got one without latents")
        for name, value in fresh.items():
            if (value is None) != (name not in self.keys):
                raise ValueError(
                    f"replay: expected {name} exactly if the spec has it ({name in self.keys}), "
                    f"got {'None' if value is None else 'an array'}"
                )
        check, keys = self.rings.check, [self.keys[n] for n in LATENTS if n in self.keys]
        arrays = {key.name: check(key, fresh[key.name], lead, "B, T") for key in keys}
        with self._lock:
            env, row = ids[:, 0], ids[:, 1]
            known = (env >= 0) & (env < self.num_envs) & (row >= 1)
            if not known.all() or (row + self.batch_length > self._count[env]).any():
                raise ValueError(
                    f"replay: expected ids (env, row) of {self.batch_length} rows written before, "
                    f"got {ids.tolist()} with {self._count.tolist()} rows written per env"
                )
            self._totals["latents_dropped"] += self.rings.write_back(ids, arrays, keep)

    # -- sampling ---------------------------------------------------------------------------------

    def _layout(self, batch_size: int) -> list[tuple]:
        """Name, shape and type of every tensor of a batch."""
        if batch_size not in self._layouts:
            keys = [(k.out, k.batch_shape(batch_size), k.torch) for k in self.keys.values()]
            self._layouts[batch_size] = [*keys, ("ids", (batch_size, 2), torch.int64)]
        return self._layouts[batch_size]

    def empty_batch(self, batch_size: int, pin_memory: bool = False) -> Batch:
        """Uninitialised tensors for `sample(out=...)`, page-locked on request."""
        *layout, ids = self._layout(batch_size)
        pin = {"pin_memory": True} if pin_memory else {}
        batch = {n: torch.empty(s, dtype=t, device=self.device, **pin) for n, s, t in layout}
        return batch | {"ids": torch.empty(ids[1], dtype=ids[2], **pin)}

    def sample(self, batch_size: int, out: Batch | None = None, *, online: bool = True) -> Batch:
        """Draw windows of T + 1 rows: waiting online ones first, oldest first, then uniform.

        Args:
            batch_size: B.
            out: tensors of `empty_batch` to fill; None allocates fresh ones.
            online: False leaves the online queue alone, for reports and evaluation.

        Returns: dict of tensors on `self.device`, but ids on the CPU. Rows 1..T of the window:
            every observation, reward, is_first, is_last, is_terminal (B, T, ...); prev_action
            (B, T, ...), stored with rows 0..T-1; the latents of row 0, deter (B, D) bfloat16 and
            stoch (B, S); ids (B, 2) int64 = env and counter of row 1, for `update_latents`. A row
            before an is_first counts as is_last even if its episode was abandoned.

        Raises: ValueError while `can_sample(batch_size)` is False, or for a wrong `out`.
        """
        if batch_size < 1 or not self.can_sample(batch_size):
            raise ValueError(
                f"replay: expected at least {batch_size} windows of {self.window} rows, got "
                f"{self.windows} from {len(self)} rows; add more rows first (can_sample)"
            )
        if out is None:
            batch = self.rings.batch(self._layout(batch_size))
        else:
            batch = self._check_out(out, batch_size)
        with self._lock:
            taken = self._plan(batch["ids"], self.online and online)
            self.rings.gather(batch)
            self._totals["samples"] += batch_size
            self._totals["online"] += taken
        return batch

    def _check_out(self, out: Batch, batch_size: int) -> Batch:
        on_cpu = self.device.type == "cpu"
        for name, shape, dtype in self._layout(batch_size):
            got = out.get(name)  # cheap ways to ask: this is a sixth of a batch of vectors
            fits = got is not None and got.dtype is dtype and got.shape == shape
            where = on_cpu or name == "ids"
            if not (fits and got.is_contiguous() and (got.is_cpu if where else got.is_cuda)):
                kind = "cpu" if where else self.device.type
                seen = "nothing" if got is None else f"{tuple(got.shape)} {got.dtype} {got.device}"
                raise ValueError(
                    f"replay: expected out[{name!r}] contiguous on the {kind.upper()} of shape "
                    f"{shape} as {dtype}, got {seen}; make it with empty_batch({batch_size})"
                )
        return out

    def _plan(self, ids: torch.Tensor, online: bool) -> int:
        """Choose windows, write (env, row 1) into ids (B, 2); returns how many were online."""
        if self._native is not None:
            taken, dropped, self._draws = self._native.plan(
                ids.data_ptr(), ids.shape[0], online, self._rng_key, self._draws
            )
            self._totals["online_dropped"] += dropped
            return taken
        ids = ids.numpy()
        oldest = np.maximum(self._count - self.length, 0)
        taken = self._plan_online(ids, oldest) if online else 0
        # choosing an env by its number of windows, then a start in it, is uniform over windows
        ends = np.cumsum(np.maximum(self._count - oldest - self.batch_length, 0))
        total = int(ends[-1])
        for b in range(taken, len(ids)):
            self._draws += 1
            word = _mix64((self._rng_key + self._draws * _GOLDEN) & _MASK)
            pick = word * total >> 64
            env = int(np.searchsorted(ends, pick, side="right"))
            before = int(ends[env - 1]) if env else 0
            ids[b] = env, oldest[env] + pick - before + 1
        return taken

    def _plan_online(self, ids: np.ndarray, oldest: np.ndarray) -> int:
        """Take waiting windows, the longest waiting first; forget those partly overwritten."""
        lost = np.maximum(-((self._next - oldest) // self.window), 0)
        self._next += lost * self.window
        self._totals["online_dropped"] += int(lost.sum())
        for b in range(len(ids)):
            ready = self._count - self._next
            env = int(np.argmax(ready))
            if ready[env] < self.window:
                return b
            ids[b] = env, self._next[env] + 1
            self._next[env] += self.window
        return len(ids)

    # -- persistence ------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike) -> dict:
        """Write what is new since the last save into `directory`; returns the manifest.

        Rows go to append-only segment files, latents (which change in place) into one dump. Every
        file is written aside, synced and renamed. The manifest is plain data for the caller to
        store; until then the previous one stays valid, so call `prune` only after that.
        """
        with self._lock:
            return replay_io.save(self, Path(directory))

    def load(self, directory: str | os.PathLike, manifest: dict) -> None:
        """Restore rows, latents, cursors, online queue, generator and totals, bit for bit.

        Raises: ValueError if the manifest is of another spec, num_envs, capacity or batch_length;
            RuntimeError naming the file that is missing, truncated or corrupted (the replay is then
            empty, the files are untouched).
        """
        with self._lock:
            replay_io.load(self, Path(directory), manifest)

    @staticmethod
    def prune(directory: str | os.PathLike, *manifests: dict) -> None:
        """Delete this module's files in `directory` that none of the manifests names."""
        replay_io.prune(Path(directory), *manifests)
