"""Starting from a part of another run's weights."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fastwm import checkpoint


def load_weights(model: torch.nn.Module, source: str | Path, regex: str = "") -> list[str]:
    """Copy the weights whose names the regex finds and whose shapes fit into a model.

    Args:    source: a run folder (its best.pt, else latest.pt) or a checkpoint file.
             regex: searched in each name, as in "^world\\."; empty: every one.
    Returns: lines that say what was taken, and what was not and why.
    Raises:  CheckpointError where nothing was taken.
    """
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise checkpoint.CheckpointError(
            f"from_checkpoint_regex: expected a regular expression, got {regex!r}: {error}"
        ) from None
    stored, path, troubles = checkpoint.load_any(source, "best")
    theirs = stored.get("agent", {}).get("model", {})
    ours = model.state_dict()
    wanted = {name for name in ours if pattern.search(name)}
    absent = sorted(wanted - set(theirs))
    other = sorted(name for name in wanted & set(theirs) if theirs[name].shape != ours[name].shape)
    taken = sorted(wanted - set(absent) - set(other))
    if not taken:
        raise checkpoint.CheckpointError(
            f"from_checkpoint: expected weights in {path} with names like {sorted(ours)[:2]} that "
            f"{regex!r} finds and shapes that fit, got none of {len(theirs)}"
        )
    model.load_state_dict({name: theirs[name] for name in taken}, strict=False)
    lines = [*troubles, f"weights  {len(taken)} of {len(ours)} tensors from {path}"]
    if regex:
        lines.append(f"         {len(ours) - len(wanted)} kept new: {regex!r} does not find them")
    for names, why in ((absent, "not in the checkpoint"), (other, "of another shape there")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"         {len(names)} kept new, {why}: {', '.join(names[:3])}{more}")
    return lines
