"""The modular world model: components that are trained together, and imagination through them.

Time: row t holds what arrived with observation t; action a_t, reward r_t and continue c_t belong to
the step from row t to row t + 1, so a window of T rows holds T - 1 steps. Steps that would cross
the end of an episode are masked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastwm.nets import one_hot_encode
from fastwm.spaces import Space
from fastwm.worldmodels import losses
from fastwm.worldmodels.losses import weighted_mean
from fastwm.worldmodels.modular_components import Prepare, build, default_name

Chosen = Mapping[str, tuple[str, Mapping[str, Any]]]  # slot -> (name, options)


class Seen(NamedTuple):
    """obs: what the decoder should predict, by key. features (B, T, E), states (B, T, S)."""

    obs: dict[str, Tensor]
    features: Tensor
    states: Tensor


class Steps(NamedTuple):
    """T - 1 steps of a window of T rows.

    action (B, T-1, A); reward (B, T-1); cont (B, T-1) 0 where it ended in a terminal state;
    valid (B, T-1) 0 where the next row belongs to another episode; ongoing (B, T-1) 0 where it led
    to the last row of an episode, terminal or cut.
    """

    action: Tensor
    reward: Tensor
    cont: Tensor
    valid: Tensor
    ongoing: Tensor


class Predicted(NamedTuple):
    """The distributions behind the losses, for metrics; recon is the decoder's loss (B, T)."""

    next_state: Any
    target: Tensor
    reward: Any
    cont: Any
    recon: Tensor


class Imagined(NamedTuple):
    """states (N, H+1, S), action (N, H, A), reward (N, H), cont (N, H)."""

    states: Tensor
    action: Tensor
    reward: Tensor
    cont: Tensor


class ModularWorldModel(nn.Module):
    """Encoder, representation, dynamics, reward, continue and decoder.

    chosen: (name, options) of each. observation_scale: see Prepare.
    reward_input, continue_input: whether these heads read the state that a step leaves ("state") or
    the one it leads to ("next_state"). The other arguments are settings of the same name.
    """

    def __init__(
        self,
        obs_space: dict[str, Space],
        act_space: Space,
        chosen: Chosen,
        *,
        observation_scale: str = "none",
        reward_input: str = "state",
        continue_input: str = "state",
        dynamics_detach_target: bool = False,
        multi_step_detach_target: bool = True,
        decoder_loss_weight: float = 1.0,
        representation_loss_weight: float = 1.0,
        multi_step_loss_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.obs_space, self.act_space = dict(obs_space), act_space
        self.prepare = Prepare(obs_space, observation_scale)
        self.reward_input, self.continue_input = reward_input, continue_input
        self.detach = (dynamics_detach_target, multi_step_detach_target)
        self.weights = {
            "dynamics_loss": 1.0,
            "reward_loss": 1.0,
            "continue_loss": 1.0,
            "decoder_reconstruction_loss": decoder_loss_weight,
            "representation_own_loss": representation_loss_weight,
            "multi_step_loss": multi_step_loss_weight,
        }

        def make(slot: str, *sizes: Any) -> nn.Module:
            name, options = chosen[slot]
            name = default_name(slot, obs_space, act_space) if name == "auto" else name
            return build(slot, name, options, *sizes)

        actions = act_space.encoded_size
        self.encoder = make("encoder", self.obs_space)
        self.representation = make("representation", self.encoder.out_features, actions)
        size = self.state_size = self.representation.state_size
        self.dynamics = make("dynamics", size, actions)
        self.reward = make("reward", size)
        self.cont = make("cont", size)
        self.decoder = None
        if chosen["decoder"][0] != "none":
            self.decoder = make("decoder", self.obs_space, size)
        self._check_shapes()

    def encode_action(self, action: Tensor) -> Tensor:  # (B, T, *shape) -> (B, T, A)
        if self.act_space.kind == "discrete":
            return one_hot_encode(action, self.act_space.classes, 2)
        return action.float()

    def observe(self, batch: Mapping[str, Tensor]) -> Seen:
        """States of a replay batch (see fastwm.replay); memory starts at zero."""
        obs = self.prepare(batch)
        features = self.encoder(obs)
        carry = features.new_zeros(features.shape[0], self.representation.carry_size)
        action = self.encode_action(batch["prev_action"])
        states, _ = self.representation.encode(features, action, batch["is_first"], carry)
        return Seen(obs, features, states)

    def steps(self, batch: Mapping[str, Tensor]) -> Steps:
        return Steps(
            self.encode_action(batch["prev_action"][:, 1:]),
            batch["reward"][:, 1:],
            1.0 - batch["is_terminal"][:, 1:].float(),
            1.0 - batch["is_last"][:, :-1].float(),
            1.0 - batch["is_last"][:, 1:].float(),
        )

    def losses(self, seen: Seen, step: Steps) -> tuple[Tensor, dict[str, Tensor], Predicted]:
        """Their weighted sum, every loss by name (0-d), and what was predicted."""
        before, after = seen.states[:, :-1], seen.states[:, 1:]
        target = after.detach() if self.detach[0] else after
        next_state = self.dynamics(before, step.action)
        reward = self.reward(after if self.reward_input == "next_state" else before)
        cont = self.cont(after if self.continue_input == "next_state" else before)
        dynamics = losses.dynamics_loss(next_state, target, self.dynamics.loss)
        terms = {
            "dynamics_loss": weighted_mean(dynamics, step.valid),
            "reward_loss": weighted_mean(losses.reward_loss(reward, step.reward), step.valid),
            "continue_loss": weighted_mean(losses.continue_loss(cont, step.cont), step.valid),
        }
        recon = self.reconstruction(seen)
        terms["decoder_reconstruction_loss"] = recon.mean()
        own = self.representation.loss(seen.features, seen.states)
        terms["representation_own_loss"] = recon.new_zeros(()) if own is None else own.mean()
        if self.weights["multi_step_loss"] > 0:
            terms["multi_step_loss"] = self.multi_step(seen.states, step)
        total = sum(self.weights[name] * term for name, term in terms.items())
        return total, terms, Predicted(next_state, target.detach(), reward, cont, recon)

    def reconstruction(self, seen: Seen) -> Tensor:  # (B, T)
        """Loss 4 of every row, summed over the observations."""
        if self.decoder is None:
            return seen.states.new_zeros(seen.states.shape[:2])
        recon = self.decoder(seen.states)
        parts = [losses.reconstruction_loss(recon[k], seen.obs[k], 2) for k in self.obs_space]
        return torch.stack(parts).sum(0)

    def multi_step(self, states: Tensor, step: Steps) -> Tensor:  # ()
        """Loss 5."""
        target = states[:, 1:]
        return losses.masked_rollout_mse(
            lambda state, action: self.dynamics(state, action).mean,
            states[:, 0],
            step.action,
            target.detach() if self.detach[1] else target,
            step.ongoing,
            step.valid[:, 0],
        )

    def imagine(
        self,
        start: Tensor,  # (N, S)
        policy: nn.Module,
        noise: Tensor,  # (H, N, ...)
        tau: float,
        hard: bool,
    ) -> Imagined:
        """Act by the policy in the model's mean predictions, with gradients through all of it."""
        states, actions = [start], []
        for draw in noise:
            actions.append(policy(states[-1]).rsample(draw, tau, hard))
            states.append(self.dynamics(states[-1], actions[-1]).mean)
        # Whole tensors, not slices of one: a linear layer is twice as fast on them.
        ends = {"state": torch.stack(states[:-1], 1), "next_state": torch.stack(states[1:], 1)}
        reward = self.reward(ends[self.reward_input]).mean
        cont = self.cont(ends[self.continue_input]).probs
        return Imagined(torch.stack(states, 1), torch.stack(actions, 1), reward, cont)

    @torch.no_grad()
    def open_loop(self, states: Tensor, action: Tensor, context: int) -> Tensor:  # (B, T, S)
        """States of the first `context` rows, then predictions from actions (B, T-1, A) alone."""
        path = list(states[:, :context].unbind(1))
        for t in range(context - 1, action.shape[1]):
            path.append(self.dynamics(path[-1], action[:, t]).mean)
        return torch.stack(path, 1)

    @torch.no_grad()
    def _check_shapes(self) -> None:
        """Run every component once on zeros, so that a wrong one is named before training."""
        obs = {k: torch.zeros(2, 3, *s.shape).to(_DTYPES[s.dtype]) for k, s in self._spaces()}
        action = torch.zeros(2, 3, *self.act_space.shape).to(_DTYPES[self.act_space.dtype])
        batch = obs | {"prev_action": action, "is_first": torch.zeros(2, 3, dtype=torch.bool)}
        seen = self.observe(batch)
        state, lead = seen.states[:, :-1], (2, 2)
        _expect("encoder", seen.features, (2, 3, self.encoder.out_features))
        _expect("representation", seen.states, (2, 3, self.state_size))
        step = self.dynamics(state, self.encode_action(action)[:, 1:])
        _expect("dynamics", step.mean, (*lead, self.state_size))
        _expect("reward", self.reward(state).mean, lead)
        _expect("cont", self.cont(state).probs, lead)
        if self.decoder is not None:
            found = self.decoder(seen.states)
            if set(found) != set(seen.obs):
                raise ValueError(
                    f"decoder: expected predictions of {sorted(seen.obs)}, got {sorted(found)}; "
                    "see fastwm/worldmodels/modular_components.py"
                )
            for name, target in seen.obs.items():
                _expect(f"decoder[{name!r}]", found[name], tuple(target.shape))

    def _spaces(self):
        return self.obs_space.items()


_DTYPES = {"uint8": torch.uint8, "int32": torch.int32, "float32": torch.float32}


def _expect(who: str, found: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(found.shape) != shape:
        raise ValueError(
            f"{who}: expected an output of shape {shape} for 2 sequences of length {shape[1]}, got "
            f"{tuple(found.shape)}; see fastwm/worldmodels/modular_components.py"
        )
