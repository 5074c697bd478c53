"""Environments: `make(task, num_envs)` gives a VecEnv (base.py has the contract).

Tasks are names of this registry (`task_names()`), or one of
    envpool:<id>    gymnasium:<id>    package.module:factory
"""

from __future__ import annotations

from fastwm.envs.base import (
    EnvError,
    EnvOptionError,
    EnvSpaceError,
    EnvStateError,
    MissingPackageError,
    UnknownTaskError,
    VecEnv,
)
from fastwm.envs.registry import check_options, resolve, task_names
from fastwm.envs.wrappers import Journal

__all__ = [
    "EnvError",
    "EnvOptionError",
    "EnvSpaceError",
    "EnvStateError",
    "Journal",
    "MissingPackageError",
    "UnknownTaskError",
    "VecEnv",
    "make",
    "task_names",
]


def make(
    task: str, num_envs: int, seed: int = 0, *, journal_limit: int = 200_000, **options
) -> Journal:
    """N environments of a task behind one `step`.

    Args:
        task: a name from `task_names()`, "envpool:<id>", "gymnasium:<id>", or
            "package.module:factory", where factory(**options) returns a gymnasium.Env, or, if it
            takes `num_envs`, a VecEnv or gymnasium.vector.VectorEnv.
        num_envs: N.
        seed: every environment gets its own seed derived from this one.
        journal_limit: most steps that state_dict() can restore (see Journal).
        options: the same for every task (None means the task's own choice):
            size (H, W) of images · gray · image_layout "auto"|"hwc"|"chw" · ignore (names of
            observations to leave out) · action_repeat · time_limit (frames) · bounds (low, high)
            of continuous actions · for gymnasium environments also parallel (one process each) and
            max_crashes;
            whatever else there is goes to the constructor of the environment.
    Returns: a Journal around the adapter.
    Raises: UnknownTaskError, EnvOptionError, EnvSpaceError, MissingPackageError.
    """
    options = check_options(task, options)
    build = resolve(task)
    return Journal(lambda: build(num_envs, seed, **options), limit=journal_limit)
