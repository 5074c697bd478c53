"""Task names: what each one is made of, and the nearest names for one that is not known."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from fastwm.envs.base import EnvOptionError, UnknownTaskError, VecEnv
from fastwm.envs.builders import envpool_task, factory_task, gymnasium_task
from fastwm.envs.convert import ObsOptions
from fastwm.envs.suites import FAMILY, TASKS

Build = Callable[..., VecEnv]  # build(num_envs, seed, **options)
FAMILIES = (
    "atari_<game>",
    "crafter_reward",
    "dmc_<domain>_<task>",
    "mario_<world>-<stage>",
    "memorymaze_<size>",
    "metaworld_<task>",
    "minecraft_diamond",
    "minigrid_<level>",
    "procgen_<game>",
    "vizdoom_<scenario>",
)
PREFIXES = ("envpool:<id>", "gymnasium:<id>", "package.module:factory")
OBS_OPTIONS = ("size", "gray", "image_layout", "ignore")


def task_names() -> list[str]:
    """Every name that can be written down without a package's own list, then the patterns."""
    return [*sorted(TASKS), *FAMILIES, *PREFIXES]


def check_options(task: str, options: dict) -> dict:
    """Drops options that are None: None means the task's own choice."""
    if not isinstance(task, str) or not task:
        raise UnknownTaskError(f"envs.make: expected the name of a task, got {task!r}")
    return {name: value for name, value in options.items() if value is not None}


def resolve(task: str) -> Build:
    """The function that builds a task; UnknownTaskError with suggestions where there is none."""
    if task in TASKS:
        return _named(task, TASKS[task])
    prefix, _, rest = task.partition(":")
    if rest:
        if prefix == "envpool":
            return _named(task, envpool_task, env_id=rest)
        if prefix == "gymnasium":
            return _named(task, gymnasium_task, env_id=rest)
        return _named(task, factory_task, path=task)
    family, _, name = task.partition("_")
    family = family.lower()  # MemoryMaze_9x9
    if name and family in FAMILY:
        return _named(task, FAMILY[family], name=name)
    raise unknown(task, [*TASKS, *(f"{known}_{name}" for known in FAMILY)])


def unknown(task: str, names: list[str]) -> UnknownTaskError:
    near = difflib.get_close_matches(task, names, n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return UnknownTaskError(
        f"envs.make: expected one of {', '.join(task_names())}, got {task!r}{hint}"
    )


def _named(task: str, function: Callable, **fixed: Any) -> Build:
    def build(num_envs: int, seed: int, **options: Any) -> VecEnv:
        obs = ObsOptions(**{k: options.pop(k) for k in OBS_OPTIONS if k in options})
        if "length" in inspect.signature(function).parameters and "time_limit" in options:
            options["length"] = options.pop("time_limit")
        _check_known(task, function, options)
        return function(task, num_envs, seed, obs=obs, **fixed, **options)

    return build


def _check_known(task: str, function: Callable, options: dict) -> None:
    """Names an option that a task does not have, unless it passes options on."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in options:
        if name not in parameters:
            own = [p for p in list(parameters)[3:] if p not in ("obs", "name", "env_id", "path")]
            known = [*OBS_OPTIONS, *own]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise EnvOptionError(f"{task}: expected one of the options {known}, got {name!r}{hint}")
