"""The acting half of the modular recipe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastwm.agents.policy import MODES
from fastwm.spaces import Space
from fastwm.worldmodels.modular_components import build, prepare


class ModularPolicy(nn.Module):
    """Encodes an observation and acts on its state.

    State: carry (N, R) of the representation, action (N, A) that was taken last.
    """

    def __init__(
        self,
        obs_space: dict[str, Space],
        encoder: nn.Module,
        representation: nn.Module,
        actor: nn.Module,
        symlog: bool,
    ) -> None:
        super().__init__()
        self.obs_space, self.symlog = dict(obs_space), symlog
        self.encoder, self.representation, self.actor = encoder, representation, actor

    def initial_state(self, num_envs: int) -> dict[str, Tensor]:
        like = next(self.parameters())
        return {
            "carry": like.new_zeros(num_envs, self.representation.carry_size),
            "action": like.new_zeros(num_envs, self.actor.space.encoded_size),
        }

    @torch.no_grad()
    def step(
        self,
        obs: dict[str, Tensor],  # (N, ...)
        state: dict[str, Tensor],
        is_first: Tensor,  # (N,) bool
        mode: str,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Actions (N, *shape) and the next state; `is_first` rows forget theirs."""
        if mode not in MODES:
            raise ValueError(f"act: expected mode to be one of {MODES}, got {mode!r}")
        rows = {key: obs[key].unsqueeze(1) for key in self.obs_space}
        features = self.encoder(prepare(rows, self.obs_space, self.symlog))
        states, carry = self.representation.encode(
            features, state["action"].unsqueeze(1), is_first.unsqueeze(1), state["carry"]
        )
        noise = None
        if mode != "greedy":
            noise = self.actor.noise((states.shape[0],), generator)
        action = self.actor(states.squeeze(1)).sample(noise)
        return self.actor.to_env(action), {"carry": carry, "action": action}


def rebuild(
    obs_space: dict[str, Space], act_space: Space, options: dict[str, Any]
) -> ModularPolicy:
    """The policy that `ModularAgent.save_policy` described, with fresh weights."""
    encoder = build("encoder", *options["encoder"], obs_space)
    representation = build(
        "representation",
        *options["representation"],
        encoder.out_features,
        act_space.encoded_size,
    )
    actor = build("policy", *options["policy"], representation.state_size, act_space)
    return ModularPolicy(obs_space, encoder, representation, actor, options["symlog"])
