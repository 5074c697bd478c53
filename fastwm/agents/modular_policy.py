"""The acting half of the modular recipe."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastwm.agents.policy import MODES
from fastwm.spaces import Space
from fastwm.worldmodels.modular_components import Prepare, build


class ModularPolicy(nn.Module):
    """Encodes an observation and acts on its state.

    State: carry (N, R) of the representation, action (N, A) that was taken last.
    """

    def __init__(
        self,
        prepare: Prepare,
        encoder: nn.Module,
        representation: nn.Module,
        actor: nn.Module,
    ) -> None:
        super().__init__()
        self.prepare, self.encoder = prepare, encoder
        self.representation, self.actor = representation, actor

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
        rows = {key: obs[key].unsqueeze(1) for key in self.prepare.spaces}
        features = self.encoder(self.prepare(rows))
        states, carry = self.representation.encode(
            features, state["action"].unsqueeze(1), is_first.unsqueeze(1), state["carry"]
        )
        count = states.shape[0]
        if mode == "random":
            action = random_action(self.actor.space, count, generator)
        else:
            noise = None if mode == "greedy" else self.actor.noise((count,), generator)
            action = self.actor(states.squeeze(1)).sample(noise)
        return self.actor.to_env(action), {"carry": carry, "action": action}


def random_action(space: Space, count: int, generator: torch.Generator) -> Tensor:
    """Encoded actions (count, A), uniform whatever the state."""
    draw = {"generator": generator, "device": generator.device}
    if space.kind != "discrete":
        return 2.0 * torch.rand(count, space.encoded_size, **draw) - 1.0
    index = [torch.randint(n, (count,), **draw) for n in space.classes]
    parts = [F.one_hot(i, n).float() for i, n in zip(index, space.classes, strict=True)]
    return torch.cat(parts, -1)


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
    prepare = Prepare(obs_space, options["observation_scale"])
    return ModularPolicy(prepare, encoder, representation, actor)
