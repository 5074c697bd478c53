"""Task names: what each one is made of, and the nearest names for one that is not known."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from fastwm.envs.base import EnvError, MissingPackageError, UnknownTaskError, VecEnv
from fastwm.envs.convert import ObsOptions

Build = Callable[..., VecEnv]  # build(num_envs, seed, **options)
FAMILIES = ("atari_<game>", "dmc_<domain>_<task>", "minigrid_<level>")
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
            return _named(task, _envpool, env_id=rest)
        if prefix == "gymnasium":
            return _named(task, _gymnasium, env_id=rest)
        return _named(task, _factory, path=task)
    family, _, name = task.partition("_")
    if name and family in _FAMILY:
        return _named(task, _FAMILY[family], name=name)
    raise unknown(task, list(TASKS))


def unknown(task: str, names: list[str]) -> UnknownTaskError:
    near = difflib.get_close_matches(task, names, n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return UnknownTaskError(
        f"envs.make: expected one of {', '.join(task_names())}, got {task!r}{hint}"
    )


def _named(task: str, function: Callable, **fixed: Any) -> Build:
    def build(num_envs: int, seed: int, **options: Any) -> VecEnv:
        obs = ObsOptions(**{k: options.pop(k) for k in OBS_OPTIONS if k in options})
        return function(task, num_envs, seed, obs=obs, **fixed, **options)

    return build


# ---------------------------------------------------------------------------------------- builders


def _envpool(task: str, num_envs: int, seed: int, *, env_id: str, **options: Any) -> VecEnv:
    from fastwm.envs.envpool import EnvpoolEnv, load_envpool

    known = load_envpool(task).list_all_envs()
    if env_id not in known:
        raise unknown(task, [f"envpool:{name}" for name in known])
    return EnvpoolEnv(env_id, num_envs, seed, task=task, **options)


def _gymnasium(
    task: str,
    num_envs: int,
    seed: int,
    *,
    env_id: str,
    obs: ObsOptions,
    action_repeat: int = 1,
    bounds: Any = None,
    max_crashes: int = 5,
    **settings: Any,
) -> VecEnv:
    from fastwm.envs.gymnasium import GymEnv, gym_factory

    return GymEnv(
        gym_factory(task, env_id, settings),
        num_envs,
        seed,
        task=task,
        obs=obs,
        action_repeat=action_repeat,
        bounds=bounds,
        max_crashes=max_crashes,
    )


def _factory(
    task: str,
    num_envs: int,
    seed: int,
    *,
    path: str,
    obs: ObsOptions,
    action_repeat: int = 1,
    bounds: Any = None,
    max_crashes: int = 5,
    **settings: Any,
) -> VecEnv:
    from fastwm.envs.gymnasium import GymEnv, GymVectorEnv

    function = _import_factory(task, path)
    if "num_envs" in inspect.signature(function).parameters:
        if "seed" in inspect.signature(function).parameters:
            settings = {**settings, "seed": seed}
        made = function(num_envs=num_envs, **settings)
        if isinstance(made, VecEnv):
            made.task, made.seed = task, seed
            return made
        if hasattr(made, "single_action_space"):
            return GymVectorEnv(made, seed, task=task, obs=obs, bounds=bounds)
        raise EnvError(
            f"{task}: expected a factory with num_envs to return a fastwm VecEnv or a "
            f"gymnasium.vector.VectorEnv, got {type(made).__name__}"
        )
    return GymEnv(
        lambda: function(**settings),
        num_envs,
        seed,
        task=task,
        obs=obs,
        action_repeat=action_repeat,
        bounds=bounds,
        max_crashes=max_crashes,
    )


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


def _dummy(task: str, num_envs: int, seed: int, *, obs: ObsOptions, **options: Any) -> VecEnv:
    from fastwm.envs.dummy import DummyEnv, DummyImageEnv

    options.pop("action_repeat", None)
    if task == "dummy":
        return DummyEnv(num_envs, seed, **options)
    size = obs.size or (64, 64)
    return DummyImageEnv(num_envs, seed, size=size[0], **options)


def _either(env_id: str, other: Callable, **defaults: Any) -> Callable:
    """envpool's id, or, where envpool is not installed, another builder with one warning."""

    def build(task: str, num_envs: int, seed: int, **options: Any) -> VecEnv:
        options = {**defaults, **options}
        try:
            return _envpool(task, num_envs, seed, env_id=env_id, **options)
        except MissingPackageError as error:
            _warn_once(task, error)
        return other(task, num_envs, seed, **options)

    return build


_warned: set[str] = set()


def _warn_once(task: str, error: Exception) -> None:
    if "envpool" not in _warned:
        _warned.add("envpool")
        warnings.warn(f"{task}: slower without envpool ({error})", stacklevel=4)


def _gym_id(env_id: str) -> Callable:
    return lambda task, num_envs, seed, **options: _gymnasium(
        task, num_envs, seed, env_id=env_id, **options
    )


TASKS: dict[str, Callable] = {
    "cartpole": _either("CartPole-v1", _gym_id("CartPole-v1")),
    "pendulum": _either("Pendulum-v1", _gym_id("Pendulum-v1")),
    "dummy": _dummy,
    "dummy_image": _dummy,
}
_FAMILY: dict[str, Callable] = {}
