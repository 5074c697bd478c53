"""The baseline that every learning curve has to beat, and the smallest example of an agent."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastwm.spaces import Space


class RandomAgent:
    """Uniform actions. The same interface as a learning agent; `replay_spec()` is None: no replay.

    Args: obs_space, act_space: as the environments describe them. config: unused.
          device: unused. seed: of its generator.
    """

    def __init__(
        self,
        obs_space: dict[str, Space],
        act_space: Space,
        config: Any = None,
        *,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.obs_space, self.act_space = obs_space, act_space
        self.classes = np.array(act_space.classes, np.float64)  # unused for continuous actions
        if act_space.kind == "discrete":
            self.classes = self.classes.reshape(act_space.shape)
        self.device = torch.device("cpu")
        self.generator = np.random.default_rng(seed)

    def replay_spec(self) -> None:
        return None

    def initial_state(self, num_envs: int) -> tuple:
        return ()

    def act(
        self,
        rows: dict[str, np.ndarray],
        state: tuple,
        mode: str = "train",
        generator: torch.Generator | None = None,
    ) -> tuple[np.ndarray, tuple, dict]:
        """Rows of N environments -> (action (N, *shape), the same state, no latents)."""
        random = self.generator
        if mode not in ("train", "random"):  # evaluation leaves the training sequence alone
            seed = 0 if generator is None else int(torch.randint(2**62, (), generator=generator))
            random = np.random.default_rng(seed)
        shape = (len(rows["is_first"]), *self.act_space.shape)
        if self.act_space.kind == "discrete":
            # below every count, and a third of the time of integers()
            return (random.random(shape) * self.classes).astype(np.int32), state, {}
        action = random.random(shape, np.float32)
        action *= 2.0
        action -= 1.0
        return action, state, {}

    def state_dict(self) -> dict:
        state = self.generator.bit_generator.state
        return {
            "numbers": {key: str(value) for key, value in state["state"].items()},
            "has_uint32": state["has_uint32"],
            "uinteger": state["uinteger"],
        }

    def load_state_dict(self, state: dict) -> None:
        self.generator.bit_generator.state = {
            "bit_generator": "PCG64",
            "has_uint32": state["has_uint32"],
            "uinteger": state["uinteger"],
            "state": {key: int(value) for key, value in state["numbers"].items()},
        }
