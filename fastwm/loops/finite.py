"""Counts the updates that an agent skipped because a loss or gradient was not finite."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch


class NonFiniteError(RuntimeError):
    """Several updates in a row were not finite; `context` is what came with the last of them."""

    def __init__(self, message: str, context: Any) -> None:
        super().__init__(message)
        self.context = context


class FiniteWatch:
    """Raises after `limit` skipped updates in a row, without making the host wait for the device.

    On a GPU each flag travels to pinned memory behind the update, and is looked at as soon as it
    has arrived, which is a few updates later. On a CPU it is read at once.
    """

    def __init__(self, limit: int = 3) -> None:
        self.limit = limit
        self.skipped = 0  # in the whole run
        self.in_a_row = 0
        self.pending: deque[tuple[torch.Tensor, Any, Any]] = deque()

    def __call__(self, finite: torch.Tensor, context: Any) -> None:
        """Note one update: `finite` 0-d bool, `context` what an error should carry."""
        if finite.is_cuda:
            flag = torch.empty((), dtype=torch.bool, pin_memory=True)
            flag.copy_(finite, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self.pending.append((flag, arrived, context))
        else:
            self.pending.append((finite, None, context))
        while self.pending and (self.pending[0][1] is None or self.pending[0][1].query()):
            self._look()

    def flush(self) -> None:
        """Wait for the flags under way, so that the counts are those of every update so far."""
        while self.pending:
            if self.pending[0][1] is not None:
                self.pending[0][1].synchronize()
            self._look()

    def _look(self) -> None:
        flag, _, context = self.pending.popleft()
        if bool(flag):
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise NonFiniteError(f"{self.limit} updates in a row were not finite", context)

    def state_dict(self) -> dict:
        self.flush()
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
