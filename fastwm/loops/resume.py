"""What a run stores, and how it goes on from there.

Order of writing: replay segments, then latest.pt which names them, then the segments that nothing
names any more are deleted. Wherever the process dies, latest.pt and all it refers to are there.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from fastwm import checkpoint
from fastwm import config as settings
from fastwm.envs import EnvStateError
from fastwm.loops.finite import NonFiniteError
from fastwm.ops import _products


def save(run: Any) -> None:
    """Write latest.pt, and policy.pt as long as there is no best one."""
    manifest = None
    if run.transfer is not None:
        run.transfer.flush()
    if run.replay is not None and run.config.replay.save:
        manifest = run.replay.save(run.folder / "replay")
    checkpoint.save(
        run.folder / "checkpoint" / "latest.pt",
        {
            **describe(run),
            "agent": run.agent.state_dict(),
            "counters": counters(run),
            "rows": run.rows,
            "state": pytree.tree_leaves(run.state),
            "envs": None if run.envs is None else _envs_state(run.envs),
            "batch": run.batch,
            "replay": manifest,
            "logger": run.logger.state_dict(),
            "products": _products.state(),
        },
    )
    if manifest is not None:
        run.replay.prune(run.folder / "replay", manifest)
    if run.best == -np.inf:
        _save_policy(run)


def save_best(run: Any) -> None:
    """Write best.pt and policy.pt."""
    checkpoint.save(
        run.folder / "checkpoint" / "best.pt",
        {**describe(run), "agent": run.agent.state_dict(), "return": run.best},
    )
    _save_policy(run)


def dump(run: Any, error: NonFiniteError) -> None:
    """Write what bad updates were about into nan_dump.pt, and say so in one line."""
    batch, path = error.context["batch"], run.folder / "nan_dump.pt"
    first = run.agent.first_nonfinite(batch)
    found = {"first_nonfinite": first, "seed": run.config.seed, "agent": run.agent.state_dict()}
    checkpoint.save(path, describe(run) | found | error.context)
    run.logger.say(
        f"train: {error} at update {run.updates}; first bad tensor: {first}; wrote {path}"
    )


def describe(run: Any) -> dict[str, Any]:
    """What a checkpoint needs to be loaded without its run folder."""
    return {
        "config": settings.to_toml(run.config),
        "env_steps": run.env_steps,
        "updates": run.updates,
        "obs_space": {key: space.to_dict() for key, space in run.agent.obs_space.items()},
        "act_space": run.agent.act_space.to_dict(),
    }


def counters(run: Any) -> dict[str, Any]:
    return {
        "env_steps": run.env_steps,
        "updates": run.updates,
        "episodes": run.episodes,
        "evaluated_at": run.evaluated_at,
        "best": run.best,
        "solved": run.solved,
        "score": run.score,
        "length": run.length,
        "finite": run.finite.state_dict(),
        "ratio": run.ratio.state_dict(),
        "clocks": {name: every.state_dict() for name, every in run.clocks.items()},
    }


def restore(run: Any, stored: dict[str, Any]) -> None:
    """Put a run into the state that `save` stored; log and replay are at their places already."""
    restore_learner(run, stored)
    fresh = run.agent.initial_state(run.config.envs)
    leaves, shape = pytree.tree_flatten(fresh)
    try:
        if stored["envs"] is None:
            raise EnvStateError("the environments could not be saved")
        run.envs.load_state_dict(stored["envs"])
        run.rows = stored["rows"]
        moved = [_like(old, new) for old, new in zip(stored["state"], leaves, strict=True)]
        run.state = pytree.tree_unflatten(moved, shape)
    except EnvStateError as error:
        warnings.warn(
            f"resume: fresh episodes, because {error}; everything else goes on exactly",
            stacklevel=2,
        )
        if run.replay is not None:
            run.replay.reset_stream()
        run.rows, run.state = run.envs.reset(), fresh


def restore_learner(run: Any, stored: dict[str, Any]) -> None:
    """What does not depend on environments: agent, counters, and the batch for pictures."""
    run.agent.load_state_dict(stored["agent"])
    _products.go_on(stored.get("products"))  # absent in checkpoints of an older version
    _restore_counters(run, stored["counters"])
    run.batch = stored["batch"]


def load_replay(config: Any, replay: Any, folder: Path, stored: dict[str, Any] | None) -> None:
    """Fill a replay with what the checkpoint refers to; with replay.save false it stays empty.

    Raises: CheckpointError when its files are damaged; they stay as they are.
    """
    if replay is None or stored is None or stored["replay"] is None or not config.replay.save:
        return
    try:
        replay.load(folder / "replay", stored["replay"])
    except (RuntimeError, ValueError) as error:
        raise checkpoint.CheckpointError(
            f"{error}; go on with an empty replay by --replay.save false"
        ) from None


def _restore_counters(run: Any, state: dict[str, Any]) -> None:
    for name in ("env_steps", "updates", "episodes", "evaluated_at", "best", "score", "length"):
        setattr(run, name, state[name])
    stop_at = run.config.eval.stop_at
    run.solved = bool(state["solved"]) and stop_at is not None and run.best >= stop_at
    run.finite.load_state_dict(state["finite"])
    run.ratio.load_state_dict(state["ratio"])
    for name, every in run.clocks.items():
        if name in state["clocks"]:  # checkpoints of an older version lack some
            every.load_state_dict(state["clocks"][name])


def _like(old: Any, new: Any) -> Any:
    return old.to(new.device) if isinstance(new, torch.Tensor) else old


def _envs_state(envs: Any) -> dict | None:
    try:
        return envs.state_dict()
    except EnvStateError as error:
        warnings.warn(f"checkpoint: {error}; a resume will start fresh episodes", stacklevel=3)
        return None


def _save_policy(run: Any) -> None:
    path = Path(run.folder) / "checkpoint" / "policy.pt"
    if hasattr(run.agent, "save_policy"):  # the random baseline has none
        checkpoint.write_with(path, run.agent.save_policy)
