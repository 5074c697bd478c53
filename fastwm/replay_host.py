"""The rings of a replay in memory, or in mapped files: numpy slices, or the compiled copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastwm import replay_io
from fastwm.replay_rows import Key

Batch = dict[str, torch.Tensor]


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a CPU tensor as numpy, bfloat16 as uint16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


class HostRings:
    """One numpy array (N, L, *shape) per key. Copies run natively where `native` is given.

    Args: keys: name -> Key; gets its ring. count: (N,) rows ever written, advanced by `add`.
        length: L. directory: of the files to map, or None for memory. native: the compiled view.
    """

    device = torch.device("cpu")
    chunk = 1 << 62  # bytes that may be read or written at once; here nothing is copied

    def __init__(
        self,
        keys: dict[str, Key],
        count: np.ndarray,
        length: int,
        directory: Path | None,
        native: Any,
    ) -> None:
        self.keys, self.count, self.length, self.native = keys, count, length, native
        self.everyone = np.arange(len(count), dtype=np.int64)
        self.outputs = [key.out for key in keys.values()]
        for key in keys.values():
            shape = (len(count), length, *key.shape)
            if directory is None:
                key.ring = np.zeros(shape, key.numpy)  # the system hands out zero pages lazily
            else:
                key.ring = replay_io.map_ring(directory, key.name, shape, key.numpy)
            if native is not None:
                native.add_key(
                    key.ring.ctypes.data, key.record, key.first, key.rows,
                    key.name, key.numpy, key.shape, key.plain,
                )  # fmt: skip

    def check(self, key: Key, value: Any, lead: tuple[int, ...], letters: str) -> np.ndarray:
        return key.check(value, lead, letters)

    def batch(self, layout: list[tuple]) -> Batch:
        """What `gather` fills."""
        return {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in layout}

    def add(self, rows: list[np.ndarray], lanes: np.ndarray | None) -> None:
        """One row of every key for all envs, or for `lanes`; advances the count."""
        if self.native is not None:
            self.native.add(rows, self.everyone if lanes is None else lanes)
            return
        where = slice(None) if lanes is None else lanes
        slots = self.count[where] % self.length
        index = self.everyone[where]
        for key, array in zip(self.keys.values(), rows, strict=True):
            key.ring[index, slots] = array
        self.count[where] += 1

    def add_whole(self, rows: Any) -> bool:
        """`add` for all envs of rows that are in their stored form already, checked on the way.

        False where they are not, or where nothing is compiled: nothing was written then.
        """
        return self.native is not None and self.native.add_whole(rows, self.everyone)

    def fill(self, key: Key, env: int, start: int, rows: np.ndarray) -> None:
        """Rows (M, *shape) of one env into the slots from `start` on."""
        key.ring[env, start : start + len(rows)] = rows

    def gather(self, batch: Batch) -> None:
        """Copy the windows `ids` into the batch, then mark rows before an is_first as is_last."""
        if self.native is not None:
            self.native.gather(
                [batch[name].data_ptr() for name in self.outputs], batch["ids"].data_ptr(),
                batch["ids"].shape[0], batch["is_first"].data_ptr(), batch["is_last"].data_ptr(),
            )  # fmt: skip
            return
        ids = batch["ids"].tolist()
        for key in self.keys.values():
            lead = (len(ids), key.rows, *key.shape)
            target = _bits(batch[key.out]).reshape(lead)
            for b, (env, row) in enumerate(ids):
                slot = (row - 1 + key.first) % self.length
                head = min(key.rows, self.length - slot)
                target[b, :head] = key.ring[env, slot : slot + head]
                target[b, head:] = key.ring[env, : key.rows - head]
        batch["is_last"][:, :-1] |= batch["is_first"][:, 1:]

    def write_back(
        self, ids: np.ndarray, latents: dict[str, np.ndarray], keep: torch.Tensor | None
    ) -> int:
        """Latents (B, T, *shape) over rows 1..T of the windows; returns how many were too old."""
        if keep is not None and not bool(keep):
            return 0
        dropped = 0
        if self.native is not None:
            names = list(self.keys)
            for name, array in latents.items():  # the same rows of every latent
                dropped = self.native.write_back(names.index(name), array, ids)
            return dropped
        rows = next(iter(latents.values())).shape[1]
        for b, (env, row) in enumerate(ids.tolist()):
            skip = min(max(int(self.count[env]) - self.length - row, 0), rows)
            dropped += skip
            slots = np.arange(row + skip, row + rows) % self.length
            for name, array in latents.items():
                self.keys[name].ring[env, slots] = array[b, skip:]
        return dropped

    def read(self, key: Key, env: int, slot: int, rows: int) -> memoryview:
        """The bytes of some rows."""
        return memoryview(key.ring[env, slot : slot + rows]).cast("B")

    buffer = read  # what a file is read into: the ring itself

    def write(self, key: Key, env: int, slot: int, rows: int, buffer: memoryview) -> None:
        """A filled `buffer` into the ring: it is there."""
