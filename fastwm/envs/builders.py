"""How a task is built from a package: the pieces that named tasks share."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from fastwm.envs.base import (
    EnvError,
    EnvOptionError,
    MissingPackageError,
    UnknownTaskError,
    VecEnv,
)
from fastwm.envs.convert import ObsOptions


def envpool_task(task: str, num_envs: int, seed: int, *, env_id: str, **options: Any) -> VecEnv:
    from fastwm.envs.envpool import EnvpoolEnv, load_envpool

    known = load_envpool(task).list_all_envs()
    if env_id not in known:
        near = difflib.get_close_matches(env_id, known, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(f'envpool:{name}' for name in near)}?" if near else ""
        raise UnknownTaskError(
            f"envs.make: expected one of envpool's {len(known)} ids, got {task!r}{hint}"
        )
    return EnvpoolEnv(env_id, num_envs, seed, task=task, **options)


def singles(
    task: str,
    num_envs: int,
    seed: int,
    factory: Callable[[], Any],
    obs: ObsOptions,
    *,
    action_repeat: int = 1,
    bounds: Any = None,
    max_crashes: int = 5,
    parallel: bool = False,
    time_limit: int | None = None,
) -> VecEnv:
    """Single gymnasium environments: in this process, or each in a process of its own."""
    from fastwm.envs.gymnasium import GymEnv, GymVectorEnv, in_processes

    if not parallel:
        repeat = {"action_repeat": action_repeat, "time_limit": time_limit}
        more = {"bounds": bounds, "max_crashes": max_crashes}
        return GymEnv(factory, num_envs, seed, task=task, obs=obs, **repeat, **more)
    if action_repeat != 1 or time_limit is not None:
        raise EnvOptionError(
            f"{task}: expected action_repeat of 1 and no time_limit with parallel, got "
            f"{action_repeat} and {time_limit}; do that inside the environment, or leave parallel "
            "out"
        )
    env = in_processes(task, factory, num_envs)
    return GymVectorEnv(env, seed, task=task, obs=obs, bounds=bounds)


SINGLE_OPTIONS = ("action_repeat", "bounds", "max_crashes", "parallel", "time_limit")


def split_options(options: dict) -> tuple[dict, dict]:
    """(options of the adapter, options of the environment)"""
    ours = {name: options[name] for name in SINGLE_OPTIONS if name in options}
    return ours, {name: value for name, value in options.items() if name not in ours}


def gymnasium_task(
    task: str, num_envs: int, seed: int, *, env_id: str, obs: ObsOptions, **options: Any
) -> VecEnv:
    from fastwm.envs.gymnasium import gym_factory

    ours, settings = split_options(options)
    return singles(task, num_envs, seed, gym_factory(task, env_id, settings), obs, **ours)


def factory_task(
    task: str, num_envs: int, seed: int, *, path: str, obs: ObsOptions, **options: Any
) -> VecEnv:
    from fastwm.envs.gymnasium import GymVectorEnv

    ours, settings = split_options(options)
    function = _import_factory(task, path)
    takes = inspect.signature(function).parameters
    if "num_envs" not in takes:
        _check_settings(task, function, settings)
        return singles(task, num_envs, seed, lambda: function(**settings), obs, **ours)
    if "seed" in takes:
        settings = {**settings, "seed": seed}
    _check_settings(task, function, {**settings, "num_envs": num_envs})
    made = function(num_envs=num_envs, **settings)
    vector = hasattr(made, "single_action_space")
    if not vector and not isinstance(made, VecEnv):
        raise EnvError(
            f"{task}: expected a factory with num_envs to return a fastwm VecEnv or a "
            f"gymnasium.vector.VectorEnv, got {type(made).__name__}"
        )
    unused = sorted(set(ours) - ({"bounds"} if vector else set()))
    if unused:
        made.close()
        raise EnvOptionError(
            f"{task}: expected options that a factory with num_envs leaves to fastwm, got "
            f"{unused}; let {function.__name__} do that itself"
        )
    if vector:
        return GymVectorEnv(made, seed, task=task, obs=obs, bounds=ours.get("bounds"))
    made.task, made.seed = task, seed
    return made


def _check_settings(task: str, function: Callable, settings: dict) -> None:
    try:
        inspect.signature(function).bind(**settings)
    except TypeError as error:
        raise EnvOptionError(
            f"{task}: expected options of {function.__name__}{inspect.signature(function)}, got "
            f"{settings}: {error}"
        ) from error


def _import_factory(task: str, path: str) -> Callable:
    module_name, _, name = path.partition(":")
    here = os.getcwd()
    # A console script does not look into the folder it is started from, `python -m` does.
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise UnknownTaskError(
            f"{task}: expected a module {module_name!r} that can be imported, got {error}; start "
            "from the folder that holds it, or install it"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    if not callable(getattr(module, name, None)):
        near = difflib.get_close_matches(name, dir(module), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UnknownTaskError(
            f"{task}: expected a function {name!r} in {module_name}, got none{hint}"
        )
    return getattr(module, name)


def first_of(task: str, build: Callable[[], VecEnv], other: Callable[[], VecEnv]) -> VecEnv:
    """envpool where it is installed, else the other package and one warning."""
    try:
        return build()
    except MissingPackageError as error:
        made = other()
        if "envpool" not in _warned:
            _warned.add("envpool")
            warnings.warn(f"{task}: a slower package stands in; {error}", stacklevel=6)
        return made


_warned: set[str] = set()


def either(env_id: str, **defaults: Any) -> Callable:
    """The same id in envpool and in gymnasium."""

    def build(task: str, num_envs: int, seed: int, *, obs: ObsOptions, **options: Any) -> VecEnv:
        obs = replace(obs, **{k: v for k, v in defaults.items() if getattr(obs, k) is None})
        here = {"env_id": env_id, "obs": obs, **options}
        return first_of(
            task,
            lambda: envpool_task(task, num_envs, seed, **here),
            lambda: gymnasium_task(task, num_envs, seed, **here),
        )

    return build


def find(task: str, family: str, name: str, ids: Iterable[str], suffix: str) -> str:
    """The id that `name` spells, whatever its capitals, dashes and underscores."""
    known = {plain(env_id.removesuffix(suffix)): env_id for env_id in ids}
    found = known.get(plain(name))
    if found is None:
        near = difflib.get_close_matches(plain(name), known, n=3, cutoff=0.5)
        hint = ", ".join(f"{family}_{snake(known[n].removesuffix(suffix))}" for n in near)
        raise UnknownTaskError(
            f"envs.make: expected {family}_<name> of one of {len(known)} known tasks, got {task!r}"
            + (f"; did you mean {hint}?" if hint else "")
        )
    return found


def plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def snake(name: str) -> str:
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.removeprefix("MiniGrid-"))
    return name.replace("-", "_").lower()


def pool_ids(task: str, module: str) -> list[str]:
    """envpool's ids of one family."""
    from fastwm.envs.envpool import load_envpool

    load_envpool(task)
    from envpool.registration import registry

    return [env_id for env_id, spec in registry.specs.items() if spec[0] == module]
