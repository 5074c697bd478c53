"""Batches to the agent's device and latents back to the replay, without stopping a GPU for them."""

from __future__ import annotations

from typing import Any

import torch

Batch = dict[str, torch.Tensor]


class Transfer:
    """Moves replay batches to a device, and posteriors back.

    On a CPU both happen at once, and so they do where the replay lies on the agent's GPU itself.
    From the host to a GPU batches go through two pinned buffers in turn, and the latents of an
    update are written into the replay when the next update is under way: the host is then one
    launch ahead of the device and never further.

    Args: replay: fastwm.replay.Replay. device: of the agent. batch_size: B.
    """

    def __init__(self, replay: Any, device: torch.device, batch_size: int) -> None:
        self.replay, self.device, self.batch_size = replay, device, batch_size
        self.pinned: list[tuple[Batch, torch.cuda.Event]] = []
        self.waiting: list[tuple[torch.Tensor, Batch, torch.Tensor, torch.cuda.Event]] = []
        if device.type == "cuda" and replay.device.type == "cpu":
            self.pinned = [
                (replay.empty_batch(batch_size, pin_memory=True), torch.cuda.Event())
                for _ in range(2)
            ]

    def sample(self) -> Batch:
        """The next batch where the replay lies; valid until the next but one."""
        if not self.pinned:
            return self.replay.sample(self.batch_size)
        self.pinned.reverse()
        batch, copied = self.pinned[0]
        copied.synchronize()
        return self.replay.sample(self.batch_size, out=batch)

    def to_device(self, batch: Batch) -> Batch:
        moved = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        if self.pinned:
            self.pinned[0][1].record()
        return moved

    def wait(self) -> None:
        """Until the latents of the launch before are on the host."""
        if self.waiting:
            self.waiting[-1][3].synchronize()

    def write_back(
        self, ids: torch.Tensor, latents: Batch, finite: torch.Tensor, first: bool = True
    ) -> None:
        """Store an update's latents, unless the update was not finite.

        Args: ids: (B, 2) of the batch. latents: deter (B, T, D), stoch (B, T, S), or nothing for
        an agent that stores none. finite: 0-d bool. first: of the updates of one launch.
        """
        if first:
            self.flush()
        if not self.pinned:
            if latents:
                self.replay.update_latents(ids, latents["deter"], latents["stoch"], keep=finite)
            return
        host = {key: _to_pinned(value) for key, value in latents.items()}
        flag, arrived = _to_pinned(finite), torch.cuda.Event()
        arrived.record()
        self.waiting.append((ids.clone(), host, flag, arrived))

    def flush(self) -> None:
        """Store what is under way."""
        self.wait()
        waiting, self.waiting = self.waiting, []
        for ids, latents, finite, _ in waiting:
            self._store(ids, latents, finite)

    def _store(self, ids: torch.Tensor, latents: Batch, finite: torch.Tensor) -> None:
        if latents and bool(finite):
            self.replay.update_latents(ids, latents["deter"], latents["stoch"])


def _to_pinned(value: torch.Tensor) -> torch.Tensor:
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value, non_blocking=True)
