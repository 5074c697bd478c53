"""Puts the pieces of a run together from its configuration, for the command lines."""

from __future__ import annotations

import ctypes
import importlib
import itertools
import os
import time
import tomllib
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastwm import checkpoint, envs, ops
from fastwm import config as settings
from fastwm.agents import defaults
from fastwm.episodes import EpisodeError
from fastwm.log import Logger
from fastwm.loops import resume
from fastwm.loops.evaluate import seed_of
from fastwm.loops.ha_run import StageError
from fastwm.loops.online import OnlineRun
from fastwm.replay import Replay
from fastwm.replay_import import DataError
from fastwm.spaces import Space

AGENTS = {
    "dreamerv3": "fastwm.agents.dreamer:DreamerAgent",
    "dreamerv3_2023": "fastwm.agents.dreamer_2023:DreamerAgent2023",
    "modular": "fastwm.agents.modular:ModularAgent",
    "random": "fastwm.agents.random:RandomAgent",
    "ha": "fastwm.agents.ha:HaAgent",
}
# What a person can put right: shown as one line, without a traceback.
MISTAKES = (
    settings.ConfigError,
    checkpoint.CheckpointError,
    envs.UnknownTaskError,
    envs.EnvOptionError,
    envs.EnvSpaceError,
    envs.MissingPackageError,
    EpisodeError,
    StageError,
    DataError,
)


def online_run(config: Any, folder: Path, stored: dict[str, Any] | None = None) -> OnlineRun:
    """Environments, agent, replay and logger of a training run, new or stored.

    Nothing in the folder changes before all of them stand.
    """
    set_up_torch(config)
    vec_env = make_envs(config)(config.envs, seed_of(config.seed, 0))
    agent = make_agent(config, vec_env.obs_space, vec_env.act_space)
    replay = make_replay(config, agent, folder)
    resume.load_replay(config, replay, folder, stored)
    checkpoint.write_text(folder / "config.toml", settings.to_toml(config))
    logger = Logger(
        folder,
        steps=config.steps,
        action_repeat=vec_env.action_repeat,
        batch_rows=config.batch_size * config.batch_length,
        every_s=config.log.every_s,
        tensorboard=config.log.tensorboard,
        deterministic=config.deterministic,
        resume=stored and stored["logger"],
    )
    return OnlineRun(
        config,
        agent,
        vec_env,
        replay,
        logger,
        make_envs(config),
        folder,
    )


def set_up_torch(config: Any) -> None:
    """Process-wide switches; only command lines may turn them."""
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # On a GPU some operations have no deterministic form: those warn instead of ending the run.
        torch.use_deterministic_algorithms(True, warn_only=device_of(config) == "cuda")
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, changes nothing


def keep_freed_memory() -> None:
    """Let the C library reuse what tensors gave back instead of returning it to the system.

    An update on the CPU allocates the same large tensors every time; mapping them anew costs a page
    fault per 4 KiB, a tenth of the update. Blocks above 1 GiB (replay rings) stay outside.
    """
    trim_threshold, mmap_threshold = -1, -3  # names of <malloc.h>
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)


def make_envs(config: Any) -> Any:
    """(num_envs, seed) -> VecEnv of the configured task."""
    options = {
        "size": config.env.size,
        "action_repeat": config.env.action_repeat,
        "time_limit": config.env.time_limit,
        **config.env.options,
    }

    return lambda num_envs, seed: _build(envs.make, config.task, num_envs, seed, **options)


def _build(function: Callable, *args: Any, **options: Any) -> Any:
    """Call, and turn what this package says about wrong values into a ConfigError.

    Errors that a user's own environment raises keep their traceback.
    """
    try:
        return function(*args, **options)
    except (ValueError, TypeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if Path(frames[-1].filename).is_relative_to(Path(__file__).parent):
            raise settings.ConfigError(str(error)) from None
        raise


def make_agent(config: Any, obs_space: dict[str, Space], act_space: Space) -> Any:
    module, _, name = AGENTS[config.algorithm].partition(":")
    function = getattr(importlib.import_module(module), name)
    options = {"device": device_of(config), "seed": config.seed}
    return _build(function, obs_space, act_space, config, **options)


def device_of(config: Any) -> str:
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.device == "cuda" and not torch.cuda.is_available():
        raise settings.ConfigError(
            "device: expected a CUDA device for 'cuda', found none; "
            "use --device cpu, or see python -m fastwm.doctor"
        )
    return config.device


def make_replay(config: Any, agent: Any, folder: Path) -> Replay | None:
    spec, options = _build(agent.replay_spec), config.replay
    if spec is None:
        return None
    return _build(
        Replay,
        spec,
        config.envs,
        options.capacity,
        config.batch_length,
        online=options.online,
        seed=seed_of(config.seed, 2),
        **storage_of(options, agent, folder),
    )


def storage_of(options: Any, agent: Any, folder: Path) -> dict[str, Any]:
    """What `Replay` is told about the place of its rows."""
    if options.storage == "cuda" and agent.device.type != "cuda":
        raise settings.ConfigError(
            "replay.storage: expected a run on a CUDA device for 'cuda', got device "
            f"{agent.device}; use --replay.storage ram"
        )
    return {
        "storage": options.storage,
        "directory": folder / "ring" if options.storage == "mmap" else None,
        "device": agent.device,
        "gather": ops.gather_windows,
        "force": options.force,
    }


def run_folder(config: Any) -> Path:
    """The folder that the settings name, or a new one that no other run of this second has."""
    if config.logdir:
        return Path(config.logdir).expanduser()
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in config.task)
    base = f"runs/{config.algorithm}-{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        path = Path(base if number == 1 else f"{base}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:  # whoever locks the folder says what is wrong with it
            pass
        return path


def read_folder(config: Any, folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The checkpoint to go on from, if any, and lines about settings that changed since.

    Raises: CheckpointError when the folder belongs to another configuration. Writes nothing.
    """
    stored = None
    if (folder / "checkpoint" / "latest.pt").exists():
        stored = checkpoint.load(folder / "checkpoint" / "latest.pt")
        old = settings.from_dict(tomllib.loads(stored["config"]))
    elif (folder / "config.toml").is_file():
        old = settings.resolve(*algorithm_of(folder))[0]
    else:
        old = config
    return stored, checkpoint.compare(settings.differences(old, config), folder)


def algorithm_of(folder: Path) -> tuple[str, list[Path]]:
    path = folder / "config.toml"
    return str(tomllib.loads(path.read_text())["algorithm"]), [path]


def announce(run: OnlineRun) -> None:
    """What a person wants to know before waiting for hours."""
    config, agent, say = run.config, run.agent, run.logger.say
    threads = f", {torch.get_num_threads()} threads" if agent.device.type == "cpu" else ""
    say(f"run      {run.folder}   (tensorboard --logdir {run.folder.parent})")
    say(
        f"task     {config.task}: {config.envs} envs, observations "
        f"{ {k: s.shape for k, s in agent.obs_space.items()} }, actions "
        f"{agent.act_space.kind} {agent.act_space.classes or agent.act_space.shape}"
    )
    say(f"device   {agent.device}{threads}")
    say("kernels  " + ", ".join(f"{k} {v}" for k, v in ops.backend_info().items()))
    if run.replay is None:
        return
    counts = agent.parameter_counts()
    say(
        f"network  {counts['total']:,} parameters ("
        + ", ".join(f"{k} {v:,}" for k, v in counts.items() if k != "total")
        + f"), precision {agent.precision}{defaults.caution(agent.precision, agent.device)}"
    )
    say(run.replay.announce())
    per_step = config.train_ratio / (config.batch_size * config.batch_length)
    say(
        f"training {per_step:.4g} updates per env_step (train_ratio {config.train_ratio:g} "
        f"replayed rows per env_step, {config.batch_size} x {config.batch_length} rows per update)"
    )


def load_run(run: str, which: str, device: str | None = None) -> tuple[Any, Any, Path, list[str]]:
    """Config, agent ready to act, the file it came from, and what was wrong with other files.

    device: in place of the one that the run is configured for.
    """
    stored, path, troubles = checkpoint.load_any(run, which)
    try:
        config = settings.from_dict(tomllib.loads(stored["config"]))
        config = replace(config, device=device or config.device)
        spaces = {key: Space.from_dict(space) for key, space in stored["obs_space"].items()}
        act_space = Space.from_dict(stored["act_space"])
    except (KeyError, TypeError) as error:
        raise checkpoint.CheckpointError(
            f"checkpoint: expected a training checkpoint in {path}, found none of its "
            f"parts ({error}); policy.pt is for fastwm.load_policy"
        ) from None
    agent = make_agent(config, spaces, act_space)
    agent.load_state_dict(stored["agent"])
    return config, agent, path, troubles
