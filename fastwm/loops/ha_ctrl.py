"""Stage ctrl: CMA-ES over C, every candidate of a generation on the same episodes.

What is kept is the mean of the search, judged on held-out episodes that no candidate plays; the
best candidate of a generation is mostly a lucky one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastwm import checkpoint
from fastwm.agents.ha import HaPolicy, pack
from fastwm.loops.evaluate import seed_of
from fastwm.loops.ha_run import HaRun, StageError
from fastwm.loops.ha_search import Search
from fastwm.loops.ha_world import play

SEARCH, TRAIN, HOLDOUT, TEST = 14, 15, 16, 17  # branches of the run's seed
# (seeds of the episodes, candidates) -> worlds that take turns, for `play`
MakeWorlds = Callable[[Sequence[int], int], list[Any]]


class CtrlStage:
    """The search and what it has reached.

    policy: V, M and C, of which C's parameters are searched. make_worlds: where candidates play.
    settings: the resolved configuration as text, for the checkpoints that play and eval read.
    mean: of the controller's features, around which the search begins; h of an LSTM is far from 0,
    so that without it a random controller mostly gives a random constant.
    """

    def __init__(
        self,
        run: HaRun,
        policy: HaPolicy,
        make_worlds: MakeWorlds,
        settings: str,
        mean: Tensor | None = None,
    ) -> None:
        self.run, self.policy, self.make_worlds, self.settings = run, policy, make_worlds, settings
        self.options, self.controller = run.config.ctrl, policy.controller
        self.generation, self.best, self.mean = 0, -np.inf, mean
        self.ends = np.cumsum(self.options.generations)
        stored = run.saved("ctrl")
        self.over = stored is not None and stored.get("round", 0) > run.round
        if stored is None or stored.get("round", 0) < run.round:  # another M, another dream
            self.search = self._new_search()
        else:
            self._resume(stored)

    def _seed(self, *branch: int) -> int:
        return seed_of(self.run.config.seed, *branch, *([self.run.round] if self.run.round else []))

    def _new_search(self) -> Search:
        options, seed = self.options, self._seed(SEARCH)
        diagonal = options.cma == "diagonal"
        return Search(self.controller.size, options.pop, options.sigma, seed, diagonal=diagonal)

    def _resume(self, stored: dict[str, Any]) -> None:
        try:
            self.controller.flat(stored["state_dict"])
        except ValueError as error:
            raise StageError(
                f"ctrl: expected a controller of these settings in {self.run.path('ctrl')}: "
                f"{error}; give the settings it was trained with, or another --logdir"
            ) from None
        self.generation, self.best = stored["epoch"], stored["reward"]
        self.search, self.mean = Search.restore(stored["es"]), stored["mean"]

    def _params(self, found: np.ndarray) -> Tensor:  # (P, size) of the search -> of the controller
        params = torch.from_numpy(found)
        return params if self.mean is None else self.controller.centred(params, self.mean)

    @property
    def total(self) -> int:
        return int(self.ends[-1])

    def train(self) -> None:
        """Until the last phase's last generation, ctrl.target, or a signal."""
        say = self.run.logger.say
        if self.over or self.generation >= self.total:
            say(f"ctrl     done at generation {self.generation}; raise --ctrl.generations to go on")
        else:
            say(
                f"ctrl     {self.controller.size} parameters, {self.options.pop} candidates per "
                f"generation in the {self.options.world} world"
            )
        while not (self.over or self.run.stopped or self.generation >= self.total):
            self._generation()

    def _generation(self) -> None:
        run, options, began = self.run, self.options, time.monotonic()
        phase = int(np.searchsorted(self.ends, self.generation, side="right"))
        # One number stands for all phases.
        samples, limit = (x[min(phase, len(x) - 1)] for x in (options.samples, options.time_limit))
        seeds = [self._seed(TRAIN, self.generation, i) for i in range(samples)]
        asked = self.search.ask()
        params = self._params(asked).to(run.device)
        returns, lengths = self._play(params, seeds, limit, options.patience)
        fitness = returns.mean(1).numpy() - options.decay * np.square(asked).mean(1)
        self.search.tell(fitness)
        self.generation += 1
        steps, seconds = int(lengths.sum()), time.monotonic() - began
        values = {
            "ctrl/return": float(returns.mean()),
            "ctrl/return_max": float(fitness.max()),
            "ctrl/return_min": float(fitness.min()),
            "ctrl/length": float(lengths.float().mean()),
            "ctrl/sigma": self.search.sigma,
            "ctrl/generation": self.generation,
            "speed/lane_steps_per_s": steps / seconds,
        }
        if run.config.deterministic:
            values.pop("speed/lane_steps_per_s")
        due = self.generation % options.holdout_every == 0 or self.generation == self.total
        if due:
            values |= self._hold_out()
        run.log(values)
        self._save()
        held = f", held out {values['ctrl/holdout']:.4g} (best {self.best:.4g})" if due else ""
        run.logger.say(
            f"ctrl     generation {self.generation} of {self.total}: mean "
            f"{values['ctrl/return']:.4g}, max {values['ctrl/return_max']:.4g}{held}, "
            f"{steps / seconds:.0f} steps/s ({(self.total - self.generation) * seconds:.0f} s left)"
        )

    def _play(
        self, params: Tensor, seeds: list[int], limit: int, patience: int = 0
    ) -> tuple[Tensor, Tensor]:
        found = play_all(
            self.make_worlds, self.controller, params, seeds, self.options.envs, limit, patience
        )
        if self.options.world == "real":
            self.run.env_steps += int(found[1].sum())
        return found

    def _hold_out(self) -> dict[str, float]:
        """The mean candidate on episodes that only judge; the best one is kept."""
        options, final = self.options, self.run.config.final
        seeds = [seed_of(self.run.config.seed, HOLDOUT, i) for i in range(options.holdout_episodes)]
        mean = self._params(self.search.mean[None])[0].to(self.run.device)
        returns, _ = self._play(mean[None], seeds, final.time_limit)
        reached = float(returns.mean())
        if reached > self.best:
            self.best = reached
            self.policy.params.copy_(mean)
            self.run.save("ctrl", self._parts(mean, reached), "best")
            self._export()
        self.over = options.target is not None and reached >= options.target
        return {"ctrl/holdout": reached, "ctrl/holdout_best": self.best}

    def _parts(self, params: Tensor, reward: float) -> dict[str, Any]:
        return {
            "epoch": self.generation,
            "round": self.run.round,
            "reward": reward,
            "state_dict": self.controller.state_dict(params.cpu()),
        }

    def _save(self) -> None:
        parts = self._parts(self._params(self.search.mean[None])[0], self.best)
        self.run.save("ctrl", {**parts, "es": self.search.state(), "mean": self.mean})

    def _export(self) -> None:
        """What play, eval and load_policy read."""
        run, folder = self.run, self.run.folder / "checkpoint"
        state = {k: v.detach().cpu().clone() for k, v in self.policy.state_dict().items()}
        parts = {
            "config": self.settings,
            "agent": state,
            "obs_space": {key: space.to_dict() for key, space in run.obs_space.items()},
            "act_space": run.act_space.to_dict(),
            "env_steps": run.env_steps,
            "updates": run.updates,
        }
        checkpoint.save(folder / "best.pt", parts)
        checkpoint.save(folder / "policy.pt", pack(self.policy, run.obs_space))


def play_all(
    make_worlds: MakeWorlds,
    controller: Any,
    params: Tensor,  # (P, size)
    seeds: Sequence[int],
    envs: int,
    limit: int,
    patience: int = 0,
) -> tuple[Tensor, Tensor]:
    """Returns and lengths (P, S) on the episodes of S seeds, at most `envs` lanes at a time."""
    columns = []
    for start in range(0, len(seeds), envs):
        some = list(seeds[start : start + envs])
        rows = []
        for part in params.split(max(1, envs // len(some))):
            worlds = make_worlds(some, len(part))
            try:
                rows.append(play(worlds, controller, part, limit=limit, patience=patience))
            finally:
                for world in worlds:
                    world.close()
        columns.append([torch.cat(values) for values in zip(*rows, strict=True)])
    returns, lengths = (torch.cat(values, 1) for values in zip(*columns, strict=True))
    return returns, lengths


def load_best(run: HaRun, policy: HaPolicy) -> float:
    """Put the best controller into the policy; returns what it reached on held-out episodes."""
    stored = run.saved("ctrl", "best")
    if stored is None:
        raise StageError(
            f"ctrl: expected {run.path('ctrl', 'best')}, found none; run --stage ctrl first"
        )
    try:
        params = policy.controller.flat(stored["state_dict"])
    except ValueError as error:
        raise StageError(
            f"ctrl: expected {run.path('ctrl', 'best')} to fit the settings: {error}; give the "
            "settings it was trained with, or another --logdir"
        ) from None
    policy.params.copy_(params)
    return float(stored["reward"])


def test(run: HaRun, policy: HaPolicy, make_worlds: MakeWorlds) -> dict[str, Any]:
    """The best controller in real episodes on seeds that nothing else uses; writes test.json."""
    options = run.config.final
    reached = load_best(run, policy)
    seeds = [seed_of(run.config.seed, TEST, i) for i in range(options.episodes)]
    params, limit = policy.params[None], options.time_limit
    found = play_all(make_worlds, policy.controller, params, seeds, options.envs, limit)
    scores, lengths = (values.flatten().tolist() for values in found)
    run.env_steps += sum(lengths)
    result = {
        "mean": float(np.mean(scores)),
        "std": float(np.std(scores)),
        "n": len(scores),
        "min": min(scores),
        "max": max(scores),
        "length": float(np.mean(lengths)),
        "scores": scores,
        "held_out": reached,
        "task": run.config.task,
    }
    checkpoint.write_text(run.folder / "test.json", json.dumps(result) + "\n")
    run.log(
        {
            "eval/return": result["mean"],
            "eval/return_std": result["std"],
            "eval/return_min": result["min"],
            "eval/length": result["length"],
            "eval/episodes": result["n"],
        }
    )
    run.logger.say(
        f"test     {result['mean']:.4g} +- {result['std']:.3g} over {result['n']} unseen episodes "
        f"(from {result['min']:.4g} to {result['max']:.4g})"
    )
    return result
