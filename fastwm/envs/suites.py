"""The named tasks: one function per family, and the tables of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fastwm.envs.base import EnvOptionError, VecEnv
from fastwm.envs.builders import (
    either,
    envpool_task,
    find,
    first_of,
    gymnasium_task,
    plain,
    pool_ids,
)
from fastwm.envs.convert import ObsOptions


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
            find(task, "atari", name, pool_ids(task, "envpool.atari"), "-v5"),
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

    return first_of(task, pool, ale)


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
    time_limit: int | None = None,
) -> VecEnv:
    """dm_control's suite; action_repeat is a true repetition.

    image: pictures (64 x 64 by default).   proprio: the physical state.   camera: for pictures.
    """
    repeat = {"action_repeat": action_repeat, "time_limit": time_limit}
    size = obs.size or (64, 64)
    if camera is None:
        camera = 2 if name.startswith("quadruped") else 0  # camera 0 looks through its body
    if not image and not proprio:
        raise EnvOptionError(f"{task}: expected image or proprio observations, got neither")

    def pool() -> VecEnv:
        from fastwm.envs.envpool import pixel_settings

        env_id = find(task, "dmc", name, pool_ids(task, "envpool.mujoco.dmc"), "-v1")
        more = pixel_settings(task, env_id, size, camera) if image else {}
        options = {"obs": obs, **repeat, **more}
        return envpool_task(task, num_envs, seed, env_id=env_id, **options)

    def suite() -> VecEnv:
        from fastwm.envs.dm_control import suite_factory
        from fastwm.envs.gymnasium import GymEnv

        factory = suite_factory(task, name, size if image else None, proprio, camera)
        return GymEnv(factory, num_envs, seed, task=task, obs=obs, **repeat)

    if image and proprio:  # envpool returns one or the other
        return suite()

    return first_of(task, pool, suite)


def _minigrid(
    task: str, num_envs: int, seed: int, *, name: str, obs: ObsOptions, **options: Any
) -> VecEnv:
    """The symbolic 7 x 7 view and the direction; the mission text is left out."""
    name = name if plain(name).startswith("minigrid") else f"MiniGrid-{name}"
    obs = replace(obs, ignore=obs.ignore or ("mission",))

    def pool() -> VecEnv:
        env_id = find(task, "minigrid", name, pool_ids(task, "envpool.minigrid"), "-v0")
        return envpool_task(task, num_envs, seed, env_id=env_id, obs=obs, **options)

    def package() -> VecEnv:
        from fastwm.envs.gymnasium import registered_ids

        ids = [i for i in registered_ids(task, "minigrid") if i.startswith("MiniGrid")]
        env_id = find(task, "minigrid", name, ids, "-v0")
        return gymnasium_task(task, num_envs, seed, env_id=env_id, obs=obs, **options)

    return first_of(task, pool, package)


def _takecover(
    task: str,
    num_envs: int,
    seed: int,
    *,
    obs: ObsOptions,
    action_repeat: int = 1,
    actions: str = "discrete",
    length: int = 2100,
    time_limit: int | None = None,
    seeds: Sequence[int] | None = None,
    num_threads: int = 0,
) -> VecEnv:
    """ViZDoom's TakeCover: actions "discrete" or "continuous"; length and time_limit in tics."""
    from fastwm.envs.envpool import load_envpool

    load_envpool(task)
    from fastwm.envs.vizdoom import TakeCover

    options = {
        "action_repeat": action_repeat,
        "actions": actions,
        "length": length if time_limit is None else time_limit,
    }
    options |= {"seeds": seeds, "num_threads": num_threads}
    return TakeCover(num_envs, seed, task=task, obs=obs, **options)


def _procgen(
    task: str, num_envs: int, seed: int, *, name: str, obs: ObsOptions, **options: Any
) -> VecEnv:
    """Hard levels without a limit, as published; `_easy` and other modes at the end of the name.

    options: envpool's, among them num_levels and start_level.
    """
    ids = pool_ids(task, "envpool.procgen")
    modes = ("easy", "hard", "extreme", "memory", "exploration")
    name = name if name.rpartition("_")[2] in modes else f"{name}_hard"
    env_id = find(task, "procgen", name, ids, "-v0")
    return envpool_task(task, num_envs, seed, env_id=env_id, obs=obs, **options)


def _metaworld(
    task: str, num_envs: int, seed: int, *, name: str, obs: ObsOptions, **options: Any
) -> VecEnv:
    """The 39 numbers of MetaWorld's tasks, 500 decisions."""
    ids = pool_ids(task, "envpool.mujoco.metaworld")
    env_id = find(task, "metaworld", f"MetaWorld/{name}", ids, "-v3")
    return envpool_task(task, num_envs, seed, env_id=env_id, obs=obs, **options)


def _vizdoom(
    task: str,
    num_envs: int,
    seed: int,
    *,
    name: str,
    obs: ObsOptions,
    action_repeat: int = 4,
    length: int = 2100,
    **options: Any,
) -> VecEnv:
    """64 x 64 RGB by default; every combination of buttons is one action. Rewards are envpool's.

    length: in frames.
    """
    from fastwm.envs.envpool import EnvpoolEnv

    obs = replace(obs, size=obs.size or (64, 64))
    env_id = find(task, "vizdoom", name, pool_ids(task, "envpool.vizdoom"), "-v1")
    common = {"stack_num": 1, "use_combined_action": True}
    return EnvpoolEnv(
        env_id,
        num_envs,
        seed,
        task=task,
        obs=obs,
        frames_per_action=int(action_repeat),
        frame_skip=int(action_repeat),
        max_episode_steps=int(length) // int(action_repeat),
        img_height=obs.size[0],
        img_width=obs.size[1],
        **{**common, **options},
    )


def _crafter(
    task: str,
    num_envs: int,
    seed: int,
    *,
    name: str,
    obs: ObsOptions,
    length: int = 10_000,
    action_repeat: int = 1,
    **options: Any,
) -> VecEnv:
    """length: in frames.   options: the package's, e.g. area or view."""
    from fastwm.envs.crafter import crafter_factory
    from fastwm.envs.gymnasium import GymEnv

    factory = crafter_factory(task, name, obs.size or (64, 64), {"length": int(length), **options})
    return GymEnv(factory, num_envs, seed, task=task, obs=obs, action_repeat=action_repeat)


def _memorymaze(
    task: str,
    num_envs: int,
    seed: int,
    *,
    name: str,
    obs: ObsOptions,
    action_repeat: int = 1,
    time_limit: int | None = None,
    **options: Any,
) -> VecEnv:
    """options: the package's, e.g. global_observables or good_visibility."""
    from fastwm.envs.gymnasium import GymEnv
    from fastwm.envs.memorymaze import maze_factory

    factory = maze_factory(task, name, obs.size or (64, 64), options)
    repeat = {"action_repeat": action_repeat, "time_limit": time_limit}
    return GymEnv(factory, num_envs, seed, task=task, obs=obs, **repeat)


def _minecraft(
    task: str,
    num_envs: int,
    seed: int,
    *,
    name: str,
    obs: ObsOptions,
    length: int = 36_000,
    action_repeat: int = 1,
) -> VecEnv:
    """length: in frames."""
    from fastwm.envs.gymnasium import GymEnv
    from fastwm.envs.minecraft import minecraft_factory

    factory = minecraft_factory(task, name, int(length))
    return GymEnv(factory, num_envs, seed, task=task, obs=obs, action_repeat=action_repeat)


def _mario(
    task: str,
    num_envs: int,
    seed: int,
    *,
    name: str,
    obs: ObsOptions,
    action_repeat: int = 4,
    flag: float = 1000.0,
    clock: float = 0.1,
    death: float = 15.0,
    time_limit: int | None = None,
) -> VecEnv:
    """flag, clock, death: what reaching it, one of its ticks, and dying are worth."""
    from fastwm.envs.gymnasium import GymEnv
    from fastwm.envs.mario import mario_factory

    obs = replace(obs, size=obs.size or (64, 64))
    factory = mario_factory(task, name, int(action_repeat), flag, clock, death)
    frames = {"frames_per_action": int(action_repeat), "time_limit": time_limit}
    return GymEnv(factory, num_envs, seed, task=task, obs=obs, **frames)


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


TASKS: dict[str, Callable] = {
    "carracing": either("CarRacing-v3", size=(64, 64)),
    "cartpole": either("CartPole-v1"),
    "dummy": _dummy,
    "dummy_image": _dummy_image,
    "pendulum": either("Pendulum-v1"),
    "takecover": _takecover,
}
FAMILY: dict[str, Callable] = {
    "atari": _atari,
    "atari100k": _atari,
    "crafter": _crafter,
    "dmc": _dmc,
    "mario": _mario,
    "memorymaze": _memorymaze,
    "metaworld": _metaworld,
    "minecraft": _minecraft,
    "minigrid": _minigrid,
    "procgen": _procgen,
    "vizdoom": _vizdoom,
}
