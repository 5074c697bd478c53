"""Task names: what each one is made of, and the nearest names for one that is not known."""

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
    raise unknown(task, [*TASKS, *(f"{known}_{name}" for known in _FAMILY)])


def unknown(task: str, names: list[str]) -> UnknownTaskError:
    near = difflib.get_close_matches(task, names, n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return UnknownTaskError(
        f"envs.make: expected one of {', '.join(task_names())}, got {task!r}{hint}"
    )


def _named(task: str, function: Callable, **fixed: Any) -> Build:
    def build(num_envs: int, seed: int, **options: Any) -> VecEnv:
        obs = ObsOptions(**{k: options.pop(k) for k in OBS_OPTIONS if k in options})
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


# ---------------------------------------------------------------------------------------- builders


def _envpool(task: str, num_envs: int, seed: int, *, env_id: str, **options: Any) -> VecEnv:
    from fastwm.envs.envpool import EnvpoolEnv, load_envpool

    known = load_envpool(task).list_all_envs()
    if env_id not in known:
        raise unknown(task, [f"envpool:{name}" for name in known])
    return EnvpoolEnv(env_id, num_envs, seed, task=task, **options)


def _singles(
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
) -> VecEnv:
    """Single gymnasium environments: in this process, or each in a process of its own."""
    from fastwm.envs.gymnasium import GymEnv, GymVectorEnv, in_processes

    if not parallel:
        repeat = {"action_repeat": action_repeat, "max_crashes": max_crashes}
        return GymEnv(factory, num_envs, seed, task=task, obs=obs, bounds=bounds, **repeat)
    if action_repeat != 1:
        raise EnvOptionError(
            f"{task}: expected action_repeat of 1 with parallel, got {action_repeat}; repeat "
            "inside the environment, or leave parallel out"
        )
    env = in_processes(task, factory, num_envs)
    return GymVectorEnv(env, seed, task=task, obs=obs, bounds=bounds)


SINGLE_OPTIONS = ("action_repeat", "bounds", "max_crashes", "parallel")


def _split(options: dict) -> tuple[dict, dict]:
    """(options of the adapter, options of the environment)"""
    ours = {name: options[name] for name in SINGLE_OPTIONS if name in options}
    return ours, {name: value for name, value in options.items() if name not in ours}


def _gymnasium(
    task: str, num_envs: int, seed: int, *, env_id: str, obs: ObsOptions, **options: Any
) -> VecEnv:
    from fastwm.envs.gymnasium import gym_factory

    ours, settings = _split(options)
    return _singles(task, num_envs, seed, gym_factory(task, env_id, settings), obs, **ours)


def _factory(
    task: str, num_envs: int, seed: int, *, path: str, obs: ObsOptions, **options: Any
) -> VecEnv:
    from fastwm.envs.gymnasium import GymVectorEnv

    ours, settings = _split(options)
    function = _import_factory(task, path)
    takes = inspect.signature(function).parameters
    if "num_envs" not in takes:
        _check_settings(task, function, settings)
        return _singles(task, num_envs, seed, lambda: function(**settings), obs, **ours)
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


def _dummy(
    task: str,
    num_envs: int,
    seed: int,
    *,
    obs: ObsOptions,
    lengths: tuple[int, ...] | None = None,
    action_repeat: int = 1,
) -> VecEnv:
    from fastwm.envs.dummy import DummyEnv

    if action_repeat != 1:
        raise EnvOptionError(f"{task}: expected action_repeat of 1, got {action_repeat}")
    return DummyEnv(num_envs, seed, lengths=lengths)


def _dummy_image(
    task: str,
    num_envs: int,
    seed: int,
    *,
    obs: ObsOptions,
    length: int = 20,
    action_repeat: int = 1,
) -> VecEnv:
    from fastwm.envs.dummy import DummyImageEnv

    if action_repeat != 1:
        raise EnvOptionError(f"{task}: expected action_repeat of 1, got {action_repeat}")
    side = (obs.size or (64, 64))[0]
    return DummyImageEnv(num_envs, seed, size=side, length=length)


# ------------------------------------------------------------- names with a choice of two packages


def _first_of(task: str, build: Build, other: Build) -> VecEnv:
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


def _either(env_id: str, **defaults: Any) -> Callable:
    """The same id in envpool and in gymnasium."""

    def build(task: str, num_envs: int, seed: int, *, obs: ObsOptions, **options: Any) -> VecEnv:
        obs = replace(obs, **{k: v for k, v in defaults.items() if getattr(obs, k) is None})
        here = {"env_id": env_id, "obs": obs, **options}
        return _first_of(
            task,
            lambda: _envpool(task, num_envs, seed, **here),
            lambda: _gymnasium(task, num_envs, seed, **here),
        )

    return build


def _find(task: str, family: str, name: str, ids: Iterable[str], suffix: str) -> str:
    """The id that `name` spells, whatever its capitals, dashes and underscores."""
    known = {_plain(env_id.removesuffix(suffix)): env_id for env_id in ids}
    found = known.get(_plain(name))
    if found is None:
        near = difflib.get_close_matches(_plain(name), known, n=3, cutoff=0.5)
        hint = ", ".join(f"{family}_{_snake(known[n].removesuffix(suffix))}" for n in near)
        raise UnknownTaskError(
            f"envs.make: expected {family}_<name> of one of {len(known)} known tasks, got {task!r}"
            + (f"; did you mean {hint}?" if hint else "")
        )
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _snake(name: str) -> str:
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.removeprefix("MiniGrid-"))
    return name.replace("-", "_").lower()


def _pool_ids(task: str, module: str) -> list[str]:
    """envpool's ids of one family."""
    from fastwm.envs.envpool import load_envpool

    load_envpool(task)
    from envpool.registration import registry

    return [env_id for env_id, spec in registry.specs.items() if spec[0] == module]


def _atari(
    task: str,
    num_envs: int,
    seed: int,
    *,
    name: str,
    obs: ObsOptions,
    action_repeat: int = 4,
    sticky: bool | float = False,
    actions: str = "needed",
    noops: int = 30,
    length: int = 108_000,
    stack: int = 1,
) -> VecEnv:
    """64 x 64 RGB by default; the 200M-frame protocol is size=(96, 96), gray, sticky, all actions.

    sticky: probability that the game repeats the last action instead (True is 0.25).
    actions: "needed" by the game or "all" 18.   noops: at most this many idle frames at the start.
    length: in frames.   stack: frames in one observation.
    """
    if actions not in ("needed", "all"):
        raise EnvOptionError(f"{task}: expected actions to be 'needed' or 'all', got {actions!r}")
    obs = replace(obs, size=obs.size or (64, 64))
    common = {
        "img_height": obs.size[0],
        "img_width": obs.size[1],
        "stack_num": int(stack),
        "noop_max": max(1, int(noops)),
        "full_action_space": actions == "all",
        "repeat_action_probability": float(0.25 if sticky is True else sticky),
        "use_fire_reset": False,
    }

    def pool() -> VecEnv:
        from fastwm.envs.envpool import EnvpoolEnv

        return EnvpoolEnv(
            _find(task, "atari", name, _pool_ids(task, "envpool.atari"), "-v5"),
            num_envs,
            seed,
            task=task,
            obs=obs,
            frames_per_action=action_repeat,
            frame_skip=int(action_repeat),
            max_episode_steps=int(length) // int(action_repeat),
            gray_scale=obs.gray,
            **common,
        )

    def ale() -> VecEnv:
        from fastwm.envs.gymnasium import atari_vector

        return atari_vector(
            task, name, num_envs, seed, obs, int(action_repeat), max_frames=int(length), **common
        )

    return _first_of(task, pool, ale)


def _dmc(
    task: str,
    num_envs: int,
    seed: int,
    *,
    name: str,
    obs: ObsOptions,
    action_repeat: int = 2,
    image: bool = False,
    proprio: bool = True,
    camera: int | None = None,
) -> VecEnv:
    """dm_control's suite; action_repeat is a true repetition.

    image: pictures (64 x 64 by default).   proprio: the physical state.   camera: for pictures.
    """
    size = obs.size or (64, 64)
    if camera is None:
        camera = 2 if name.startswith("quadruped") else 0  # camera 0 looks through its body
    if not image and not proprio:
        raise EnvOptionError(f"{task}: expected image or proprio observations, got neither")

    def pool() -> VecEnv:
        from fastwm.envs.envpool import pixel_settings

        env_id = _find(task, "dmc", name, _pool_ids(task, "envpool.mujoco.dmc"), "-v1")
        more = pixel_settings(task, env_id, size, camera) if image else {}
        options = {"obs": obs, "action_repeat": action_repeat, **more}
        return _envpool(task, num_envs, seed, env_id=env_id, **options)

    def suite() -> VecEnv:
        from fastwm.envs.dm_control import suite_factory
        from fastwm.envs.gymnasium import GymEnv

        factory = suite_factory(task, name, size if image else None, proprio, camera)
        return GymEnv(factory, num_envs, seed, task=task, obs=obs, action_repeat=action_repeat)

    if image and proprio:  # envpool returns one or the other
        return suite()

    return _first_of(task, pool, suite)


def _minigrid(
    task: str, num_envs: int, seed: int, *, name: str, obs: ObsOptions, **options: Any
) -> VecEnv:
    """The symbolic 7 x 7 view and the direction; the mission text is left out."""
    name = name if _plain(name).startswith("minigrid") else f"MiniGrid-{name}"
    obs = replace(obs, ignore=obs.ignore or ("mission",))

    def pool() -> VecEnv:
        env_id = _find(task, "minigrid", name, _pool_ids(task, "envpool.minigrid"), "-v0")
        return _envpool(task, num_envs, seed, env_id=env_id, obs=obs, **options)

    def package() -> VecEnv:
        from fastwm.envs.gymnasium import registered_ids

        ids = [i for i in registered_ids(task, "minigrid") if i.startswith("MiniGrid")]
        env_id = _find(task, "minigrid", name, ids, "-v0")
        return _gymnasium(task, num_envs, seed, env_id=env_id, obs=obs, **options)

    return _first_of(task, pool, package)


TASKS: dict[str, Callable] = {
    "carracing": _either("CarRacing-v3", size=(64, 64)),
    "cartpole": _either("CartPole-v1"),
    "dummy": _dummy,
    "dummy_image": _dummy_image,
    "pendulum": _either("Pendulum-v1"),
}
_FAMILY: dict[str, Callable] = {"atari": _atari, "dmc": _dmc, "minigrid": _minigrid}
