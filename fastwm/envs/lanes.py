"""Many environments for one episode each: chosen seeds, and only those stepped that still run.

A population search needs this: equal seeds for all candidates, and no work for what has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastwm.envs.base import EnvOptionError, Rows, VecEnv
from fastwm.envs.registry import resolve


def make_lanes(task: str, seeds: Sequence[int], **options: Any) -> Lanes:
    """One environment per seed; equal seeds play the same episode under the same actions.

    Options are those of `make`. Where a task cannot be told the seed of each environment, they get
    different ones (`Lanes.common` is False): everything still works, comparisons are noisier.
    """
    build = resolve(task)
    options = {name: value for name, value in options.items() if value is not None}
    try:
        return Lanes(build(len(seeds), int(seeds[0]), seeds=list(seeds), **options), True)
    except EnvOptionError:  # of this option or of another one: then it is raised again
        return Lanes(build(len(seeds), int(seeds[0]), **options), False)


class Lanes:
    """N environments; `send` and `receive` step some of them, and other work fits in between."""

    def __init__(self, env: VecEnv, common: bool) -> None:
        self.env, self.common, self.num_envs = env, common, env.num_envs
        self.obs_space, self.act_space, self.task = env.obs_space, env.act_space, env.task
        self._partial = hasattr(env, "send_part")

    def reset(self) -> Rows:
        return self.env.reset()

    def send(self, action: np.ndarray, lanes: np.ndarray) -> None:  # (n, ...), (n,) ascending
        """Begin a step of these environments, none of which may have ended."""
        self._lanes = lanes
        if self._partial:
            self.env.send_part(action, lanes)
            return
        whole = np.zeros((self.num_envs, *action.shape[1:]), action.dtype)
        whole[lanes] = action
        self._action = whole

    def receive(self) -> Rows:
        """The rows (n, ...) of the environments of the last `send`."""
        if self._partial:
            return self.env.receive_part()
        # Those that ended are stepped along and start anew: nobody looks at them.
        rows = self.env.step(self._action)
        return {key: value[self._lanes] for key, value in rows.items()}

    def close(self) -> None:
        self.env.close()
