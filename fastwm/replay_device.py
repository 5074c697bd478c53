"""The rings of a replay as tensors on a device: a batch is gathered where it is learned from.

Which windows to take is decided on the host from two numbers per env; what goes up are 16 bytes per
window and, per step, one parcel with the rows of all keys. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastwm.replay_rows import Key

Batch = dict[str, Tensor]
Gather = Callable[[Sequence[Tensor], Tensor, Sequence[int], Sequence[int]], list[Tensor]]

ALIGN = 16  # bytes; where a key begins in a parcel


def gather_each(
    rings: Sequence[Tensor], ids: Tensor, offsets: Sequence[int], rows: Sequence[int]
) -> list[Tensor]:
    """Windows by one `index_select` per ring; `fastwm.ops.gather_windows` takes one launch."""
    result, length = [], rings[0].shape[1]
    for ring, offset, count in zip(rings, offsets, rows, strict=True):
        slots = (ids[:, 1:] + offset + torch.arange(count, device=ids.device)) % length
        index = (ids[:, :1] * length + slots).flatten()
        result.append(ring.flatten(0, 1).index_select(0, index).unflatten(0, slots.shape))
    return result


class DeviceRings:
    """One tensor (N, L, *shape) per key, as it is stored.

    Args: keys: name -> Key; gets its ring. count: (N,) on the host, rows ever written, advanced by
        `add`. length: L. device: of the rings. gather: like `gather_each`.
    """

    chunk = 64 << 20  # bytes that pass through host memory at once on the way to a file

    def __init__(
        self,
        keys: dict[str, Key],
        count: np.ndarray,
        length: int,
        device: torch.device,
        gather: Gather | None,
    ) -> None:
        self.keys, self.count, self.length, self.device = keys, count, length, device
        self.pinned = device.type == "cuda"
        self.windows = gather or gather_each
        self.everyone = np.arange(len(count), dtype=np.int64)
        for key in keys.values():
            shape = (len(count), length, *key.shape)
            key.ring = torch.zeros(shape, dtype=key.torch, device=device)
        self.rings = [key.ring for key in keys.values()]
        self.offsets = [key.first - 1 for key in keys.values()]  # ids name row 1 of a window
        self.rows = [key.rows for key in keys.values()]

    def check(self, key: Key, value: Any, lead: tuple[int, ...], letters: str) -> Tensor:
        """A tensor in the stored type, where it was: what is on the device stays there."""
        return key.check_tensor(value, lead, letters)

    def batch(self, layout: list[tuple]) -> Batch:
        """What `gather` fills: the ids, on the host."""
        name, shape, dtype = layout[-1]
        return {name: torch.empty(shape, dtype=dtype, pin_memory=self.pinned)}

    def _up(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.pinned:
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def add(self, rows: list[Tensor], lanes: np.ndarray | None) -> None:
        """One row of every key for all envs, or for `lanes`; advances the count."""
        envs = self.everyone if lanes is None else lanes
        slots = torch.from_numpy(envs * self.length + self.count[envs] % self.length)
        slots, *moved = self._parcel([slots, *rows])
        for ring, row in zip(self.rings, moved, strict=True):
            ring.flatten(0, 1).index_copy_(0, slots, row)
        self.count[envs] += 1

    def add_whole(self, rows: Any) -> bool:
        """Whether the rows were stored without a look at each: not here."""
        return False

    def _parcel(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors on the device; those from the host travel in one copy."""
        host = [t for t in tensors if t.device.type == "cpu"]
        ends = np.cumsum([-(-t.nbytes // ALIGN) * ALIGN for t in host])
        parcel = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=self.pinned)
        parts = []
        for tensor, end in zip(host, ends.tolist(), strict=True):
            start = end - -(-tensor.nbytes // ALIGN) * ALIGN
            parts.append((start, start + tensor.nbytes, tensor))
            parcel[start : start + tensor.nbytes].view(tensor.dtype).copy_(tensor.flatten())
        parcel = parcel.to(self.device, non_blocking=True)
        there = iter([parcel[a:b].view(t.dtype).view(t.shape) for a, b, t in parts])
        return [
            next(there) if t.device.type == "cpu" else t.to(self.device, non_blocking=True)
            for t in tensors
        ]

    def fill(self, key: Key, env: int, start: int, rows: np.ndarray) -> None:
        """Rows (M, *shape) of one env, as numpy stores them, into the slots from `start` on."""
        source = torch.from_numpy(np.ascontiguousarray(rows)).reshape(-1).view(torch.uint8)
        target = key.ring[env, start : start + len(rows)]
        target.copy_(source.view(key.torch).view(target.shape))

    def gather(self, batch: Batch) -> None:
        """The windows `ids` on the device, then rows before an is_first marked as is_last."""
        ids = batch["ids"].to(self.device, non_blocking=True)
        found = self.windows(self.rings, ids, self.offsets, self.rows)
        for key, value in zip(self.keys.values(), found, strict=True):
            value = value[:, 0] if key.context else value
            if key.out in batch:
                batch[key.out].copy_(value)
            else:
                batch[key.out] = value
        batch["is_last"][:, :-1] |= batch["is_first"][:, 1:]

    def write_back(self, ids: np.ndarray, latents: Batch, keep: Tensor | None) -> int:
        """Latents (B, T, *shape) over rows 1..T of the windows; returns how many were too old.

        keep: 0-d bool on the device; where it is false the rings stay as they are.
        """
        env, rows = ids[:, :1], next(iter(latents.values())).shape[1]
        row = ids[:, 1:] + np.arange(rows)
        alive = (row >= self.count[env] - self.length).ravel()
        source = np.flatnonzero(alive)[::-1]
        # two windows may hold the same row: the later one stays, whatever runs first
        target, last = np.unique(
            (env * self.length + row % self.length).ravel()[source], return_index=True
        )
        target, source = self._up(np.stack([target, source[last]])).unbind()
        for name, value in latents.items():
            ring = self.keys[name].ring.flatten(0, 1)
            fresh = value.to(self.device, non_blocking=True).flatten(0, 1).index_select(0, source)
            if keep is not None:
                old = ring.index_select(0, target)
                fresh = torch.where(keep.to(self.device, non_blocking=True), fresh, old)
            ring.index_copy_(0, target, fresh)
        return int((~alive).sum())

    def read(self, key: Key, env: int, slot: int, rows: int) -> memoryview:
        """The bytes of some rows, copied to the host."""
        return memoryview(_bytes(key.ring[env, slot : slot + rows].cpu()))

    def buffer(self, key: Key, env: int, slot: int, rows: int) -> memoryview:
        """Host memory to read a file into, for `write`."""
        return memoryview(_bytes(torch.empty((rows, *key.shape), dtype=key.torch)))

    def write(self, key: Key, env: int, slot: int, rows: int, buffer: memoryview) -> None:
        """A filled `buffer` into the ring."""
        self.fill(key, env, slot, np.frombuffer(buffer, key.numpy).reshape(rows, *key.shape))


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()
