"""Scores and lengths of the episodes that many environments play side by side."""

from __future__ import annotations

import os

import numpy as np

try:
    if os.environ.get("FASTWM_DISABLE_EXT", "0") not in ("", "0"):
        raise ImportError("switched off by FASTWM_DISABLE_EXT")
    from fastwm import _replay
except ImportError:
    _replay = None

Ended = tuple[list[float], list[int]]


def tally(rows: dict[str, np.ndarray], score: np.ndarray, length: np.ndarray) -> Ended | None:
    """Adds one row of every environment to the episodes under way.

    Args:    rows: as an environment returns them. score: (N,) float64, sums of rewards. length:
             (N,) int64, decisions; both go on in place, from zero at is_first.
    Returns: (scores, lengths) of the episodes that these rows end, or None.
    """
    if _replay is not None:
        flags = rows["is_first"], rows["is_last"]
        return _replay.tally(rows["reward"], *flags, score, length)
    return tally_numpy(rows, score, length)


def tally_numpy(rows: dict[str, np.ndarray], score: np.ndarray, length: np.ndarray) -> Ended | None:
    """The same without the compiled module."""
    first, last = rows["is_first"], rows["is_last"]
    length += 1
    if np.count_nonzero(first):
        score[first], length[first] = 0.0, 0
    score += rows["reward"]
    if not np.count_nonzero(last):
        return None
    return score[last].tolist(), length[last].tolist()
