"""Puts the pieces of a World Models run together from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastwm import assemble, checkpoint
from fastwm import config as settings
from fastwm.agents.ha import HaPolicy, image_key, make_controller, make_rnn, make_vae
from fastwm.envs.lanes import Lanes, make_lanes
from fastwm.log import Logger
from fastwm.loops import ha
from fastwm.loops.evaluate import seed_of
from fastwm.loops.ha_collect import collect
from fastwm.loops.ha_ctrl import CtrlStage, load_best, test
from fastwm.loops.ha_fit import encode, fit_rnn, fit_vae
from fastwm.loops.ha_run import FOLDERS, HaRun, StageError
from fastwm.loops.ha_world import RealWorld
from fastwm.worldmodels.ha import MDNRNN, ConvVAE
from fastwm.worldmodels.ha_controller import ActionCode

NOISE, WEIGHTS = 18, 19  # branches of the run's seed
MEAN_OF = 32  # episodes


def train(config: Any, folder: Path) -> int:
    """Run the stages that the configuration asks for; returns the exit code."""
    assemble.set_up_torch(config)
    notes = read_folder(config, folder)
    run = make_run(config, folder)
    try:
        announce(run)
        for note in notes:
            run.logger.say(note)
        return ha.train(run, stages(run))
    finally:
        run.logger.close()


def read_folder(config: Any, folder: Path) -> list[str]:
    """Lines about settings that changed since; CheckpointError where they may not."""
    if not (folder / "config.toml").is_file():
        return []
    old = settings.resolve(*assemble.algorithm_of(folder))[0]
    return checkpoint.compare(settings.differences(old, config), folder)


def make_run(config: Any, folder: Path) -> HaRun:
    """The run of a folder, new or stored."""
    lanes = partial(real_lanes, config)
    first = lanes([0])
    spaces, repeat = (first.obs_space, first.act_space), first.env.action_repeat
    first.close()
    _fits(config, *spaces)
    progress = _progress(folder)
    checkpoint.write_text(folder / "config.toml", settings.to_toml(config))
    logger = Logger(
        folder,
        steps=0,
        action_repeat=repeat,
        every_s=0,
        tensorboard=config.log.tensorboard,
        deterministic=config.deterministic,
        resume=progress.get("logger"),
    )
    counters = progress.get("counters", {"env_steps": 0, "updates": 0})
    return HaRun(config, folder, assemble.device_of(config), logger, spaces, lanes, counters)


def _fits(config: Any, obs_space: dict, act_space: Any) -> None:
    """One clear error before anything is written."""
    try:
        shape = obs_space[image_key(obs_space)].shape
        ActionCode.of(config.ctrl.action, act_space)
    except ValueError as error:
        raise StageError(str(error)) from None
    if config.env.rows > shape[0]:
        raise StageError(
            f"env.rows: expected at most the {shape[0]} rows of {config.task}'s pictures, got "
            f"{config.env.rows}; give --env.rows 0 to see all of them"
        )


def real_lanes(config: Any, seeds: Sequence[int]) -> Lanes:
    env = config.env
    options = {name: getattr(env, name) for name in ("size", "action_repeat", "time_limit")}
    if config.ctrl.env_threads:
        options["num_threads"] = config.ctrl.env_threads
    return make_lanes(config.task, seeds, **options, **env.options)


def _progress(folder: Path) -> dict[str, Any]:
    """The newest of what the stages stored: where the log and the counters stand."""
    paths = [folder / "progress.pt"]
    paths += [folder / name / "checkpoint.tar" for name in FOLDERS.values()]
    found = [checkpoint.load(path).get("progress") for path in paths if path.is_file()]
    found = [progress for progress in found if progress]
    return max(found, key=lambda progress: progress["logger"]["bytes"], default={})


def stages(run: HaRun) -> list[ha.Stage]:
    """What this call is to do, in order. Models are made where they are needed."""
    config = run.config
    code = ActionCode.of(config.ctrl.action, run.act_space)
    key = image_key(run.obs_space)
    vae = _fresh(run, 0, make_vae, config)
    work: dict[str, Callable[[], Any]] = {
        "collect": lambda: collect(run, code, key, lambda: _best(run, code, key)),
        "vae": lambda: fit_vae(run, vae),
        "latents": lambda: encode(run, vae),
        "rnn": lambda: _rnn(run, code, vae),
        "ctrl": lambda: _ctrl(run, code, key),
    }
    named = config.stages()
    chosen = [(which, name, work[name]) for which, name in _rounds(run, named)]
    if config.test or "ctrl" in named:
        if config.final.episodes:
            chosen.append((chosen[-1][0] if chosen else 0, "test", lambda: _test(run, code, key)))
        elif config.test:
            raise StageError("final.episodes: expected at least 1 with --test, got 0")
    return chosen


def _rounds(run: HaRun, named: Sequence[str]) -> list[tuple[int, str]]:
    """(round, stage). Stages without the others go on in the round that the run has come to."""
    if {"collect", "rnn", "ctrl"} <= set(named):
        rounds = range(run.config.rounds)
        return [(r, name) for r in rounds for name in named if not r or name != "vae"]
    stored = [run.saved(stage) or {} for stage in ("rnn", "ctrl")]
    return [(max(parts.get("round", 0) for parts in stored), name) for name in named]


def _best(run: HaRun, code: ActionCode, key: str) -> HaPolicy:
    policy = load_policy(run, code, key)
    load_best(run, policy)
    return policy


def _fresh(run: HaRun, which: int, make: Callable[..., Any], *args: Any) -> Any:
    """A model whose first weights depend on the seed alone, not on what ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(run.config.seed, WEIGHTS, which))
        return make(*args)


def _rnn(run: HaRun, code: ActionCode, vae: ConvVAE) -> None:
    for member in range(run.config.rnn.members):
        if not run.stopped:
            fit_rnn(run, _fresh(run, 1 + member, make_rnn, run.config, code), vae, member)


def load_policy(run: HaRun, code: ActionCode, key: str) -> HaPolicy:
    """V and M as they were trained, and an empty C."""
    vae, rnn = make_vae(run.config), make_rnn(run.config, code)
    controller = make_controller(run.config, code)
    mark = run.load_model("vae", vae)
    if controller.inputs != "z" or run.config.ctrl.world == "dream":  # else nothing asks M
        run.load_model("rnn", rnn)
        learned = (run.saved("rnn", "best") or {}).get("vae", mark)
        if learned != mark:
            run.logger.say("note     M learned from the latents of another V: --stage latents,rnn")
    rows = run.config.env.rows
    return HaPolicy(vae, rnn, controller, code, run.act_space, key, rows).to(run.device).eval()


def _ctrl(run: HaRun, code: ActionCode, key: str) -> None:
    policy = load_policy(run, code, key)
    config, controller = run.config, policy.controller
    if config.ctrl.world == "dream":
        make_worlds = partial(dream_worlds, run, policy, other_members(run, code))
    else:
        make_worlds = partial(real_worlds, run, policy)
    center = config.ctrl.center and (controller.bias or controller.units > 0)
    mean = feature_mean(run, policy) if center else None
    text = settings.to_toml(config)
    CtrlStage(run, policy, make_worlds, text, mean).train()


@torch.inference_mode()
def feature_mean(run: HaRun, policy: HaPolicy) -> torch.Tensor:  # (width,)
    """Mean of the controller's features over some stored episodes, as the random policy drove."""
    store = run.store()
    episodes = np.linspace(0, len(store) - 1, min(len(store), MEAN_OF)).astype(int)
    found = []
    for episode, start in zip(episodes, store.starts[episodes], strict=True):
        decisions = int(store.lengths[episode]) - 1
        rows = slice(int(start), int(start) + decisions)
        z = torch.from_numpy(_latents(run, "mu", rows)).to(run.device)
        action = torch.from_numpy(np.array(store.action[rows])).to(run.device)
        first = torch.arange(decisions, device=run.device) == 0
        state, x = policy.rnn.initial(1), policy.rnn.features(z, action, first)
        for t in range(decisions):
            found.append(policy.controller.features(z[t : t + 1], state))
            _, state = policy.rnn.step(x[t : t + 1], state)
    return torch.cat(found).mean(0).cpu()


def _latents(run: HaRun, name: str, rows: Any) -> np.ndarray:
    """Stored means or log-variances of some rows, float32."""
    path = run.folder / "latents" / f"{name}.npy"
    if not path.is_file():
        raise StageError(f"ctrl: expected {path}, found none; run --stage latents first")
    return np.array(np.load(path, mmap_mode="r")[rows], np.float32)


def _test(run: HaRun, code: ActionCode, key: str) -> None:
    policy = load_policy(run, code, key)
    test(run, policy, partial(real_worlds, run, policy))


def real_worlds(
    run: HaRun, policy: HaPolicy, seeds: Sequence[int], candidates: int
) -> list[RealWorld]:
    """On a GPU two halves of the candidates, so that it works while the environments do. On a CPU
    both want the same cores, and one batch is a quarter faster (benchmarks/bench_ha.py)."""
    parts = 2 if run.device.type == "cuda" else 1
    halves = [len(half) for half in np.array_split(np.arange(candidates), parts) if len(half)]
    noise = seed_of(run.config.seed, NOISE, *seeds) if run.config.ctrl.sample else None
    return [
        RealWorld(
            run.make_lanes(list(seeds) * count),
            policy.vae,
            policy.rnn,
            policy.controller,
            policy.code,
            key=policy.key,
            rows=policy.rows,
            samples=len(seeds),
            noise=noise,
        )
        for count in halves
    ]


def other_members(run: HaRun, code: ActionCode) -> list[MDNRNN]:
    """The Ms of rnn.members behind the first."""
    members = [make_rnn(run.config, code) for _ in range(1, run.config.rnn.members)]
    for number, rnn in enumerate(members, 1):
        run.load_model(f"rnn:{number}", rnn)
    return members


def dream_worlds(
    run: HaRun, policy: HaPolicy, others: Sequence[MDNRNN], seeds: Sequence[int], candidates: int
) -> list[Any]:
    """One world for all: nothing to wait for."""
    from fastwm.worldmodels.ha_dream import DreamWorld

    return [
        DreamWorld(
            policy.rnn,
            policy.controller,
            policy.code,
            dream_starts(run),
            list(seeds) * candidates,
            temperature=run.config.dream.temperature,
            max_steps=run.config.dream.length,
            others=others,
        )
    ]


def dream_starts(run: HaRun) -> tuple[torch.Tensor, torch.Tensor]:
    """mu and logvar (E, Z) of the first rows of up to dream.starts episodes."""
    first = run.store().starts[: run.config.dream.starts]
    mu, logvar = (torch.from_numpy(_latents(run, name, first)) for name in ("mu", "logvar"))
    return mu.to(run.device), logvar.to(run.device)


def announce(run: HaRun) -> None:
    """What a person wants to know before waiting."""
    say, config = run.logger.say, run.config
    threads = f", {torch.get_num_threads()} threads" if run.device.type == "cpu" else ""
    say(f"run      {run.folder}   (tensorboard --logdir {run.folder.parent})")
    space = run.act_space
    say(
        f"task     {config.task}: observations { {k: s.shape for k, s in run.obs_space.items()} }, "
        f"actions {space.kind} {space.classes or space.shape}"
    )
    say(f"device   {run.device}{threads}")
    say(f"stages   {', '.join(config.stages()) or 'test'}")
