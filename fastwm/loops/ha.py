"""World Models, stage by stage: collect, vae, latents, rnn, ctrl. Each runs alone and resumes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastwm.loops.ha_run import HaRun
from fastwm.loops.signals import stop_signals

DONE = 0  # a signal n gives 128 + n


def train(run: HaRun, stages: dict[str, Callable[[], Any]]) -> int:
    """Run stages one after the other.

    stages: name -> a function that does what is missing of it, in their order.
    Returns the exit code: 0, or 128 + the signal's number.
    """
    with stop_signals() as stopped:
        run.stopped = stopped
        for name, work in stages.items():
            work()
            run.note_progress()
            if stopped:
                run.logger.say(f"stopped  in {name}; the same command goes on from here")
                return 128 + stopped[0]
    return DONE
