"""Puts a run on stored episodes together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastwm import assemble, checkpoint
from fastwm import config as settings
from fastwm.log import Logger
from fastwm.loops import resume
from fastwm.loops.evaluate import seed_of
from fastwm.loops.offline import OfflineRun
from fastwm.replay import Replay
from fastwm.replay_import import Folder, fill, summary

NO_TASK = "offline"  # a task that stands for "only the data"


def offline_run(config: Any, folder: Path, stored: dict[str, Any] | None = None) -> OfflineRun:
    """Agent, a replay full of the episodes, and logger; environments only for evaluations.

    A new run reads the folder; one that goes on reads what its checkpoint stored.
    """
    assemble.set_up_torch(config)
    data = Folder(config.offline_traindir)
    make_envs = None if config.task == NO_TASK else assemble.make_envs(config)
    if make_envs is None:
        obs_space, act_space = data.spaces()
    else:
        env = make_envs(1, seed_of(config.seed, 0))
        obs_space, act_space = env.obs_space, env.act_space
        env.close()
    agent = assemble.make_agent(config, obs_space, act_space)
    memory = _replay(config, agent, data, folder)
    resume.load_replay(config, memory, folder, stored)
    if not len(memory):
        for rows in data.pieces(obs_space, act_space):
            fill(memory, rows)
    if not memory.can_sample(1):
        raise settings.ConfigError(
            f"offline_traindir: expected more than batch_length = {config.batch_length} rows, got "
            f"{len(memory)} in {data.folder}"
        )
    checkpoint.write_text(folder / "config.toml", settings.to_toml(config))
    logger = Logger(
        folder,
        steps=config.steps,
        batch_rows=config.batch_size * config.batch_length,
        every_s=config.log.every_s,
        tensorboard=config.log.tensorboard,
        deterministic=config.deterministic,
        resume=stored and stored["logger"],
    )
    logger.say(summary(data, memory))
    if make_envs is None:
        config = replace(config, eval=replace(config.eval, every=0))
    return OfflineRun(config, agent, None, memory, logger, make_envs, folder)


def _replay(config: Any, agent: Any, data: Folder, folder: Path) -> Replay:
    """One stream, exactly as long as the data."""
    spec = agent.replay_spec()
    if spec is None:
        raise settings.ConfigError(
            f"offline_traindir: expected an algorithm that learns, got {config.algorithm!r}"
        )
    try:
        return Replay(
            spec,
            1,
            data.rows,
            config.batch_length,
            online=False,
            seed=seed_of(config.seed, 2),
            **assemble.storage_of(config.replay, agent, folder),
        )
    except ValueError as error:
        raise settings.ConfigError(f"offline_traindir: {error}") from None
