"""What an evaluation shows: a film of its first episode, and a batch for open-loop videos."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

MOST_FRAMES = 500  # of the film
FEWEST_ROWS = 4  # below that there is nothing to dream of


class Recorder:
    """Collects the first rows of every environment while `evaluate` plays.

    Args: length: T, rows of the batch; one more is recorded for the latents before it.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.rows: list[dict[str, np.ndarray]] = []
        self.latents: dict[str, torch.Tensor] = {}
        self.film: list[np.ndarray] = []
        self.filming = True

    def __call__(
        self, rows: dict[str, np.ndarray], action: np.ndarray, latents: dict[str, torch.Tensor]
    ) -> None:
        """Note a row of every environment, the actions taken after it, and its latents."""
        if self.filming:
            self._film(rows)
        if len(self.rows) > self.length:
            return
        if not self.rows:
            self.latents = {name: value.clone() for name, value in latents.items()}
        last = rows["is_last"].reshape(-1, *[1] * (action.ndim - 1))
        self.rows.append({**rows, "action": np.where(last, np.zeros_like(action), action)})

    def _film(self, rows: dict[str, np.ndarray]) -> None:
        image = next((v[0] for v in rows.values() if v.dtype == np.uint8 and v.ndim == 4), None)
        if image is not None:
            channels = slice(-3, None) if image.shape[-1] >= 3 else [-1, -1, -1]
            self.film.append(image[..., channels].copy())
        done = bool(rows["is_last"][0]) or len(self.film) >= MOST_FRAMES
        self.filming = image is not None and not done

    def batch(self) -> dict[str, torch.Tensor] | None:
        """What `Replay.sample` gives, of all environments from their first rows on.

        None where fewer than FEWEST_ROWS were played.
        """
        if len(self.rows) <= FEWEST_ROWS:
            return None
        stacked = {name: np.stack([r[name] for r in self.rows], 1) for name in self.rows[0]}
        action = stacked.pop("action")
        batch = {name: torch.from_numpy(value[:, 1:].copy()) for name, value in stacked.items()}
        batch["prev_action"] = torch.from_numpy(action[:, :-1].copy())
        return batch | self.latents

    def pictures(self) -> np.ndarray | None:
        """The film: (T, H, W, 3) uint8, or None without an image observation."""
        return np.stack(self.film) if len(self.film) > 1 else None


def videos(agent: Any, batch: dict[str, torch.Tensor] | None) -> dict[str, np.ndarray]:
    """Open-loop videos of a batch by image key."""
    report = getattr(agent, "report", None)
    if batch is None or report is None:
        return {}
    return {name.removeprefix("openloop/"): frames for name, frames in report(batch).items()}
