"""Pictures of what a world model predicts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GREEN, RED = (0, 200, 0), (220, 0, 0)
BORDER = 2


def open_loop_video(truth: Tensor, model: Tensor, context: int) -> np.ndarray:
    """Truth over prediction over error, sequences side by side.

    truth: (B, T, H, W, C) uint8. model: the same shape in [0, 1]. The border is green while the
    model sees the images and red after `context` frames, when it only knows the actions.
    Returns (T, 3*H + 4, B*(W + 4), 3) uint8.
    """
    true = truth.float() / 255.0
    error = (model - true + 1.0) / 2.0
    rows = [to_rgb(x) for x in (true, model, error)]
    frames = torch.cat(rows, 2)  # (B, T, 3H, W, 3)
    frames = (frames.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    batch, length, height, width, _ = frames.shape
    out = np.zeros((batch, length, height + 2 * BORDER, width + 2 * BORDER, 3), np.uint8)
    out[:, :context] = GREEN
    out[:, context:] = RED
    out[:, :, BORDER:-BORDER, BORDER:-BORDER] = frames
    return np.concatenate(list(out), 2)


def strip(frames: np.ndarray, width: int, rows: int = 4, columns: int = 12) -> np.ndarray:
    """A video of `open_loop_video` as one picture: a row of it per sequence, time to the right.

    frames: (T, H', B*(W + 4), 3) uint8. width: W of one image. Returns (H, W, 3) uint8 with at most
    `rows` sequences and `columns` moments, evenly spaced from the first to the last.
    """
    one = width + 2 * BORDER
    moments = np.unique(np.linspace(0, len(frames) - 1, columns).round().astype(int))
    count = min(rows, frames.shape[2] // one)
    lines = [
        np.concatenate([frames[t][:, b * one : (b + 1) * one] for t in moments], 1)
        for b in range(count)
    ]
    return np.concatenate(lines, 0)


def to_rgb(x: Tensor) -> Tensor:  # (..., C) -> (..., 3)
    """The last three channels (the newest frame of a stack), or gray repeated."""
    if x.shape[-1] < 3:
        return x[..., -1:].expand(*x.shape[:-1], 3)
    return x[..., -3:]
