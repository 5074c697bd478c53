"""Training online: act, store, learn, and now and then evaluate, film and save.

The counters: env_steps (agent decisions, all environments together), updates (gradient steps).
Everything that is due is due by env_steps, so that a run that was stopped and goes on from its
checkpoint does exactly what it would have done.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from fastwm.agents.video import strip
from fastwm.loops import clock, resume
from fastwm.loops.evaluate import evaluate, seed_of, summarize
from fastwm.loops.finite import FiniteWatch, NonFiniteError
from fastwm.loops.profile import Trace, gpu_busy
from fastwm.loops.record import Recorder, videos
from fastwm.loops.signals import stop_signals
from fastwm.loops.tally import tally
from fastwm.loops.transfer import Transfer

DONE, NOT_FINITE = 0, 3  # exit codes; a signal n gives 128 + n


def train(run: OnlineRun, stored: dict[str, Any] | None = None) -> int:
    """Train until config.steps, config.eval.stop_at, a signal, or three bad updates in a row.

    Args:    run: the pieces. stored: the parts of `latest.pt` to go on from, or None.
    Returns: the exit code: 0, 3 for non-finite updates, 128 + the signal's number.
    """
    run.begin(stored)
    if not run.wants_more():
        run.logger.say(f"finished already at env_steps {run.env_steps}; raise --steps to go on")
        return DONE
    with stop_signals() as stopped:
        try:
            while run.wants_more() and not stopped:
                run.act()
                run.learn()
                run.receive()
                run.evaluate_if_due()
                run.film_if_due()
                run.log_if_due()
                run.save_if_due()
            run.save()
        except NonFiniteError as error:
            resume.dump(run, error)
            return NOT_FINITE
        finally:
            run.trace.close()
    if stopped:
        run.logger.say(f"stopped at env_steps {run.env_steps}; the same command goes on from here")
        return 128 + stopped[0]
    run.say_what_next()
    return DONE


class OnlineRun:
    """The pieces of a run and its counters.

    Args: config: fastwm.config. agent: act, update, report (see fastwm.agents). envs: a VecEnv.
          replay: fastwm.replay.Replay, or None for an agent that does not learn. logger:
          fastwm.log.Logger. make_envs: (num_envs, seed) -> VecEnv for evaluations. folder: the run
          folder.
    """

    def __init__(
        self,
        config: Any,
        agent: Any,
        envs: Any,
        replay: Any,
        logger: Any,
        make_envs: Callable[[int, int], Any],
        folder: Path,
    ) -> None:
        self.config, self.agent, self.envs, self.replay = config, agent, envs, replay
        self.logger, self.make_envs, self.folder = logger, make_envs, Path(folder)
        self.env_steps = self.updates = self.episodes = 0
        self.evaluated_at, self.best, self.solved = -1, -np.inf, False
        self.score, self.length = np.zeros(config.envs), np.zeros(config.envs, np.int64)
        self.batch: dict | None = None  # the newest one, for pictures
        self.transfer: Transfer | None = None
        if replay is not None:
            self.transfer = Transfer(replay, agent.device, config.batch_size)
        ratio = config.train_ratio / (config.batch_size * config.batch_length)
        self.ratio = clock.Ratio(ratio, limit=max(1, ceil(4 * ratio * config.envs)))
        self.clocks = {
            "eval": clock.Every(config.eval.every),
            "log": clock.Every(config.log.every),
            "video": clock.Every(config.log.video_every),
            "histogram": clock.Every(config.log.histogram_every),
            "checkpoint": clock.Every(config.checkpoint.every),
        }
        self.under_way = False  # whether the environments owe rows
        self.finite = FiniteWatch()
        self.trace = Trace(config.log.profile, self.folder, logger.say)

    def begin(self, stored: dict[str, Any] | None) -> None:
        """Fresh episodes, or the state that was stored."""
        if stored is not None:
            resume.restore(self, stored)
            return
        self.rows, self.state = self.envs.reset(), self.agent.initial_state(self.config.envs)

    def wants_more(self) -> bool:
        return self.env_steps < self.config.steps and not self.solved

    def act(self) -> None:
        """One decision in every environment; its row goes into the replay."""
        self.receive()
        time = self.logger.time
        mode = "random" if self.env_steps < self.config.replay.prefill else "train"
        time.start()
        action, self.state, latents = self.agent.act(self.rows, self.state, mode)
        time.lap("policy")
        self.envs.send(action)
        time.lap("env")
        self.under_way = True
        if self.replay is not None:  # while the environments step
            self.replay.add({**self.rows, "action": self._stored(action), **latents})
            time.lap("replay")
        self.env_steps += self.config.envs
        if not self.config.overlap:
            self.receive()

    def receive(self) -> None:
        """The rows that the last action led to. Whether the learner ran meanwhile changes nothing:
        it sees what the replay holds, and that is the rows before them."""
        if not self.under_way:
            return
        self.logger.time.start()
        self.rows = self.envs.receive()
        self.logger.time.lap("env")
        self.under_way = False
        self._count_episodes()

    def _stored(self, action: np.ndarray) -> np.ndarray:
        """What the replay keeps of the actions: zeros where the episode is over."""
        last = self.rows["is_last"]
        if not np.count_nonzero(last):
            return action
        action = action.copy()
        action[last] = 0
        return action

    def learn(self) -> None:
        """As many updates as the train ratio asks for, once the replay holds enough.

        Where the agent can run several at once, they share a launch; what is left runs singly.
        """
        if self.replay is None or not self._may_learn():
            return
        pretrain = self.config.replay.pretrain if self.updates == 0 else 0
        due = self.ratio(self.env_steps) + pretrain
        at_once = getattr(self.agent, "updates_at_once", 1)
        while due > 0:
            count = at_once if due >= at_once else 1
            self._update(count)
            due -= count

    def _may_learn(self) -> bool:
        config = self.config
        if self.env_steps < config.replay.prefill:
            return False
        rows = config.batch_length * (config.batch_size + config.envs)
        most = config.replay.capacity // config.envs * config.envs
        return len(self.replay) >= min(rows, most) and self.replay.can_sample(config.batch_size)

    def _update(self, count: int) -> None:
        """`count` updates; several have sampled their batches before the first of them runs."""
        time = self.logger.time
        ids, batches = [], []
        for _ in range(count):
            self.trace()
            with time("replay"):
                sampled = self.transfer.sample()
                ids.append(sampled["ids"].clone() if count > 1 else sampled["ids"])
            with time("copy"):
                batches.append(self.transfer.to_device(sampled))
        with time("learner"):
            update = self.agent.update
            results = self.agent.update_many(batches) if count > 1 else [update(batches[0])]
            self.transfer.wait()
        self.batch = batches[-1]
        for i, (metrics, latents) in enumerate(results):
            self.updates += 1
            self.finite(metrics["opt/finite"], {"batch": batches[i], "metrics": metrics})
            with time("replay"):
                self.transfer.write_back(ids[i], latents, metrics["opt/finite"], first=i == 0)
            with time("log"):
                self.logger.train.add(metrics)

    def _count_episodes(self) -> None:
        ended = tally(self.rows, self.score, self.length)
        if ended is not None:
            self.episodes += len(ended[0])
            self.logger.ended(*ended)

    def evaluate_if_due(self) -> None:
        at_end = self.config.eval.every > 0 and not self.wants_more()
        if self.clocks["eval"](self.env_steps) or at_end:
            self._evaluate()

    def _evaluate(self) -> None:
        options = self.config.eval
        recorder = Recorder(self.config.batch_length) if self._films() else None
        with self.logger.time("eval"):
            found = evaluate(
                self.agent,
                self.make_envs,
                episodes=options.episodes,
                envs=options.envs,
                mode=options.mode,
                max_steps=options.max_steps,
                seed=seed_of(self.config.seed, 1, self.env_steps),
                record=recorder,
            )
        self.evaluated_at = self.env_steps
        result = summarize(found)
        mean, std, count = result["mean"], result["std"], result["n"]
        self.logger.set({"eval/return": mean, "eval/return_std": std, "eval/episodes": count})
        self.logger.set({"eval/return_min": result["min"], "eval/length": result["length"]})
        self.logger.set({"eval/cut": result["cut"]})
        self._log()
        where = f"env_steps {self.env_steps}, updates {self.updates}"
        self.logger.say(f"{where}: evaluation {mean:.4g} +- {std:.3g} over {count} episodes")
        if recorder is not None:
            self._film("eval_openl", recorder.batch())
            self._show("eval_policy", recorder.pictures())
        if mean > self.best:
            self.best = mean
            if self.config.checkpoint.best:
                resume.save_best(self)
        stop_at = options.stop_at
        if stop_at is not None and mean >= stop_at:
            self.logger.say(f"evaluation reached {stop_at:g}: done")
            self.solved = True

    def film_if_due(self) -> None:
        if self.clocks["video"](self.env_steps) and self.batch is not None:
            self._film("train_openl", self.batch)
        if self.clocks["histogram"](self.env_steps) and self.batch is not None:
            with self.logger.time("log"):
                self.logger.histograms(self.agent.model.named_parameters(), self.env_steps)

    def _films(self) -> bool:
        images = any(space.kind == "image" for space in self.agent.obs_space.values())
        return images and self.config.log.video_every > 0

    def _film(self, name: str, batch: dict | None) -> None:
        """What the model dreams after the first rows of a batch, moving and as a picture."""
        with self.logger.time("log"):
            for key, frames in videos(self.agent, batch).items():
                self.logger.video(f"{name}/{key}", frames, self.env_steps)
                width = self.agent.obs_space[key].shape[1]
                self.logger.picture(f"{name}/{key}", strip(frames, width), self.env_steps)

    def _show(self, name: str, frames: np.ndarray | None) -> None:
        if frames is not None:
            with self.logger.time("log"):
                self.logger.video(name, frames, self.env_steps)

    def log_if_due(self) -> None:
        if self.clocks["log"](self.env_steps) and self.evaluated_at != self.env_steps:
            self._log()
        self.logger.tick(self.env_steps, self.updates)

    def _log(self) -> None:
        with self.logger.time("log"):
            self.finite.flush()
            if self.replay is not None:
                stats = self.replay.stats()
                self.logger.set({f"replay/{name}": value for name, value in stats.items()})
                self.logger.set({"train/opt/skipped": self.finite.skipped})
            self.logger.set({"episode/total": self.episodes} | gpu_busy(self.agent.device))
            self.logger.write(self.env_steps, self.updates)

    def say_what_next(self) -> None:
        best = f", best evaluation {self.best:.4g}" if np.isfinite(self.best) else ""
        self.logger.say(
            f"done     env_steps {self.env_steps}, updates {self.updates}{best}\n"
            f"look     python -m fastwm.play {self.folder} --save-gif"
        )

    def save_if_due(self) -> None:
        if self.clocks["checkpoint"](self.env_steps):
            self.save()

    def save(self) -> None:
        with self.logger.time("log"):
            resume.save(self)
