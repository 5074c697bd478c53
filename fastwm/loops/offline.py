"""Training on stored episodes alone: the online loop without acting."""

from __future__ import annotations

from typing import Any

from fastwm.loops import resume
from fastwm.loops.online import OnlineRun


class OfflineRun(OnlineRun):
    """Counts env_steps as if `config.envs` environments were stepped, so that `steps`,
    `train_ratio` and everything that is due mean what they mean online. Evaluations play in the
    task's environment, where there is one."""

    def begin(self, stored: dict[str, Any] | None) -> None:
        self.rows = self.state = None
        if stored is not None:
            resume.restore_learner(self, stored)

    def act(self) -> None:
        self.env_steps += self.config.envs
        if hasattr(self.agent, "env_steps"):  # it counts what it acts on, which is nothing here
            self.agent.env_steps = self.env_steps

    def evaluate_if_due(self) -> None:
        if self.make_envs is not None:
            super().evaluate_if_due()
