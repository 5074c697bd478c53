"""World Models, stage by stage: collect, vae, latents, rnn, ctrl. Each runs alone and resumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastwm.loops.ha_run import HaRun
from fastwm.loops.signals import stop_signals

DONE = 0  # a signal n gives 128 + n
Stage = tuple[int, str, Callable[[], Any]]  # (round, name, what does what is missing of it)


def train(run: HaRun, stages: Sequence[Stage]) -> int:
    """Run stages one after the other. Returns the exit code: 0, or 128 + the signal's number."""
    with stop_signals() as stopped:
        run.stopped = stopped
        for number, name, work in stages:
            if number > run.round:
                most = max(run.config.rounds, number + 1)  # a stage alone may be of a later one
                run.logger.say(f"round    {number + 1} of {most}")
            run.round = number
            work()
            run.note_progress()
            if stopped:
                run.logger.say(f"stopped  in {name}; the same command goes on from here")
                return 128 + stopped[0]
    return DONE
