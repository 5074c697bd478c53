"""The modular recipe: world model, actor and critic with an optimizer each.

One batch trains the world model on what happened, the actor on what it imagines from there, and the
critic on the actor's imagined returns. Gradients are kept apart by freezing: imagination runs
through world model and critic whose parameters want no gradient, so that the actor's loss reaches
the policy alone, and the critic sees detached states.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastwm.agents.modular_policy import ModularPolicy
from fastwm.agents.policy import pack_policy
from fastwm.agents.video import open_loop_video
from fastwm.config import ModularConfig
from fastwm.optim import Adam
from fastwm.spaces import Space
from fastwm.worldmodels import losses
from fastwm.worldmodels.losses import weighted_mean
from fastwm.worldmodels.modular import ModularWorldModel, Seen, Steps
from fastwm.worldmodels.modular_components import build, default_name
from fastwm.worldmodels.modular_metrics import (
    Running,
    critic_metrics,
    open_loop_error,
    world_metrics,
)

SLOTS = ("encoder", "representation", "dynamics", "reward", "cont", "decoder", "policy", "value")
GROUPS = ("world_model", "actor", "critic")


class Rollout(NamedTuple):
    """states (N, H+1, S); returns, reward, cont, weight (N, H); value (N, H+1)."""

    states: Tensor
    returns: Tensor
    reward: Tensor
    cont: Tensor
    value: Tensor
    weight: Tensor


class ModularModel(nn.Module):
    """World model, policy and value, built from a configuration."""

    def __init__(
        self, obs_space: dict[str, Space], act_space: Space, config: ModularConfig
    ) -> None:
        super().__init__()
        self.chosen = {}
        for slot in SLOTS:
            part = getattr(config, slot)
            auto = part.name == "auto"
            name = default_name(slot, obs_space, act_space) if auto else part.name
            self.chosen[slot] = (name, dict(part.options))
        self.world = ModularWorldModel(
            obs_space,
            act_space,
            self.chosen,
            observation_scale=config.observation_scale,
            reward_input=config.reward_input,
            continue_input=config.continue_input,
            dynamics_detach_target=config.dynamics_detach_target,
            multi_step_detach_target=config.multi_step_detach_target,
            decoder_loss_weight=config.decoder_loss_weight,
            representation_loss_weight=config.representation_loss_weight,
            multi_step_loss_weight=config.multi_step_loss_weight,
        )
        size = self.world.state_size
        self.policy = build("policy", *self.chosen["policy"], size, act_space)
        self.value = build("value", *self.chosen["value"], size)
        self.running = Running()


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Parameters of the modules want no gradient inside; gradients still flow through them."""
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(True)


class ModularAgent:
    """Acts in environments and learns from replay batches.

    obs_space, act_space: see fastwm.spaces. config: fastwm.config_modular.ModularConfig.
    The same seed, data and device give the same agent bit for bit on a CPU.
    """

    precision = "fp32"

    def __init__(
        self,
        obs_space: dict[str, Space],
        act_space: Space,
        config: ModularConfig,
        *,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        self.config, self.device = config, torch.device(device)
        self.obs_space, self.act_space = dict(obs_space), act_space
        warn_about(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = ModularModel(obs_space, act_space, config).to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.act_generator = torch.Generator(self.device).manual_seed(seed + (1 << 40))
        rates = (config.world_model_lr, config.actor_lr, config.critic_lr)
        parts = (self.model.world, self.model.policy, self.model.value)
        self.optimizers = {
            name: Adam(
                part.named_parameters(), lr=lr, clip=config.max_grad_norm, eps=config.adam_eps
            )
            for name, part, lr in zip(GROUPS, parts, rates, strict=True)
        }
        world = self.model.world
        self.policy = ModularPolicy(
            world.prepare, world.encoder, world.representation, self.model.policy
        )
        self.updates = self.env_steps = 0
        self.openloop: dict[str, Tensor] = {}  # as last measured
        self.loss_terms: dict[str, Tensor] = {}

    def parameter_counts(self) -> dict[str, int]:
        """Trainable parameters by component, and in total."""
        world = self.model.world
        parts = {slot: getattr(world, slot) for slot in SLOTS[:6]}
        parts |= {"policy": self.model.policy, "value": self.model.value}
        counts = {
            name: sum(p.numel() for p in part.parameters())
            for name, part in parts.items()
            if part is not None
        }
        return counts | {"total": sum(counts.values())}

    def replay_spec(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype name of every key of a replay row."""
        spec = {key: ((), "bool") for key in ("is_first", "is_last", "is_terminal")}
        spec |= {"action": (self.act_space.shape, self.act_space.dtype), "reward": ((), "float32")}
        taken = sorted(set(spec) & set(self.obs_space))
        if taken:
            raise ValueError(
                f"ModularAgent: expected other observation names than {sorted(spec)}, got {taken}; "
                "rename them in the environment"
            )
        return spec | {key: (space.shape, space.dtype) for key, space in self.obs_space.items()}

    # Acting

    def initial_state(self, num_envs: int) -> dict[str, Tensor]:
        return self.policy.initial_state(num_envs)

    def act(
        self,
        rows: dict[str, np.ndarray],
        state: dict[str, Tensor],
        mode: str = "train",
        generator: torch.Generator | None = None,
    ) -> tuple[np.ndarray, dict[str, Tensor], dict[str, Tensor]]:
        """Actions (N, *shape) for a row of every environment, the next state, nothing to store.

        rows: observations and is_first (see fastwm.envs). mode: "train" and "sample" draw actions,
        "greedy" takes the mode, "random" does not look. generator: of an evaluation; without one
        the rows count as env_steps, which end the warm-up.
        """
        obs = {key: torch.as_tensor(rows[key]).to(self.device) for key in self.obs_space}
        is_first = torch.as_tensor(rows["is_first"]).to(self.device)
        source = self.act_generator if generator is None else generator
        action, state = self.policy.step(obs, state, is_first, mode, source)
        if generator is None:  # not an evaluation
            self.env_steps += len(rows["is_first"])
        return action.cpu().numpy(), state, {}

    # Learning

    @property
    def warming_up(self) -> bool:
        return self.env_steps < self.config.world_model_warmup_steps

    def update(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The configured number of steps of each optimizer on one replay batch.

        Returns metrics (0-d tensors on the device, no host sync), and no latents. A non-finite loss
        or gradient changes no parameter and no moment; metrics["opt/finite"] tells.
        """
        config, world = self.config, self.model.world
        batch = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        world.prepare.follow(batch)
        step = world.steps(batch)
        counts = dict.fromkeys(GROUPS, 0)
        counts["world_model"] = config.world_model_updates_per_batch
        if not self.warming_up:
            counts["actor"] = config.actor_updates_per_batch
            counts["critic"] = config.critic_updates_per_batch
        metrics: dict[str, Tensor] = {}
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        states = None  # those of the current weights, if known
        for i in range(max(counts.values())):
            due = {name for name, count in counts.items() if i < count}
            found, states, well = self.iterate(batch, step, due, states)
            metrics |= found
            finite = finite & well
        self.updates += 1
        self.measure_open_loop(batch, step)
        metrics |= self.openloop
        metrics |= {
            "warmup_phase": self.number(self.warming_up),
            "env_steps_processed": self.number(self.env_steps),
            "opt/finite": finite,
        }
        return metrics, {}

    def iterate(
        self, batch: dict[str, Tensor], step: Steps, due: set[str], states: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None, Tensor]:
        """One step of each due optimizer: metrics, states that are still current, and finite.

        All gradients are taken at the weights of before, then all are applied.
        """
        world, terms, metrics = self.model.world, {}, {}
        for name in due:
            self.optimizers[name].zero_grad()
        if "world_model" in due:
            seen = world.observe(batch)
            total, found, predicted = world.losses(seen, step)
            terms["world_model_loss"] = total
            metrics |= found | world_metrics(seen, step, predicted, self.model.running)
            metrics["representation_loss"] = self.representation_metric(found)
            states = seen.states.detach()
            total.backward()
        elif states is None:
            with torch.no_grad():
                states = world.observe(batch).states
        if due & {"actor", "critic"}:
            found, more = self.behavior_step(batch, step, states, due)
            terms |= found
            metrics |= more
        finite, norms = self.apply(due, terms)
        self.loss_terms = {name: term.detach() for name, term in terms.items()}
        metrics |= terms | norms
        metrics = {name: value.detach() for name, value in metrics.items()}
        return metrics, None if "world_model" in due else states, finite

    def behavior_step(
        self, batch: dict[str, Tensor], step: Steps, states: Tensor, due: set[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of actor and critic, as far as they are due: losses and metrics."""
        terms, metrics = {}, {}
        alive = 1.0 - batch["is_terminal"].float()  # nothing happens after a terminal state
        rollout = self.imagine(states, alive, with_grad="actor" in due)
        if "actor" in due:
            terms["actor_loss"], metrics = self.actor_step(rollout)
            terms["actor_loss"].backward()
        if "critic" in due:
            terms["critic_loss"], found = self.critic_step(rollout, states, step)
            terms["critic_loss"].backward()
            metrics |= found
        w = rollout.weight
        metrics |= {
            "mean_imagined_return": weighted_mean(rollout.returns.detach(), w),
            "mean_imagined_reward": weighted_mean(rollout.reward.detach(), w),
            "mean_imagined_value": weighted_mean(rollout.value[:, :-1].detach(), w),
            "mean_imagined_continue": weighted_mean(rollout.cont.detach(), w),
        }
        return terms, metrics

    def imagine(self, states: Tensor, alive: Tensor, with_grad: bool) -> Rollout:
        """Imagine from states (B, T, S), detached; rows that are not alive (B, T) do not count.

        with_grad: keep the graph from the returns to the policy. World model and critic are frozen
        in the forward pass already, so that no weight of theirs is part of that graph.
        """
        config, world = self.config, self.model.world
        start = states.detach().flatten(0, 1)
        lead = (config.imagination_horizon, start.shape[0])
        noise = self.model.policy.noise(lead, self.generator)
        with frozen(world, self.model.value), torch.set_grad_enabled(with_grad):
            path, _, reward, cont = world.imagine(
                start,
                self.model.policy,
                noise,
                config.imagination_gumbel_tau,
                config.imagination_gumbel_hard,
            )
            value = self.model.value(path)
            returns = losses.imagined_returns(
                reward, value, cont, config.gamma, config.lambda_return
            )
        weight = alive.reshape(-1, 1).expand_as(reward)
        if config.imagination_discount_weights:
            reach = torch.cumprod(config.gamma * cont.detach(), 1)
            weight = weight * torch.cat([torch.ones_like(reach[:, :1]), reach[:, :-1]], 1)
        return Rollout(path, returns, reward, cont, value, weight)

    def actor_step(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss 6. The entropy is that at detached states: it does not steer where to go."""
        dist = self.model.policy(rollout.states[:, :-1].detach())
        entropy, scale = dist.entropy(), self.number(1.0)
        if self.config.actor_normalize_returns:
            scale = rollout.returns.detach().std(correction=0).clamp(min=1e-5)
        loss = losses.actor_loss(
            rollout.returns / scale, entropy, rollout.weight, self.config.entropy_coef
        )
        mean = weighted_mean(entropy.detach(), rollout.weight)
        metrics = {"entropy": mean, "actor_return_scale": scale}
        limit = dist.max_entropy()
        if limit is not None:
            metrics["entropy_share"] = mean / limit
        return loss, metrics

    def critic_step(
        self, rollout: Rollout, states: Tensor, step: Steps
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss 7, mixed with one-step targets on replayed rows where that is wanted."""
        config = self.config
        mix = config.critic_real_return_mix
        target = losses.critic_targets(
            rollout.returns, config.critic_target_clip, config.critic_target_standardize
        )
        value = self.model.value(rollout.states[:, :-1].detach())
        loss = losses.critic_loss(value, target, rollout.weight)
        if mix > 0:
            with torch.no_grad():
                after = self.model.value(states[:, 1:])
                real = step.reward + config.gamma * step.cont * after
                real = losses.critic_targets(real, config.critic_target_clip, False)
            before = self.model.value(states[:, :-1].detach())
            loss = (1.0 - mix) * loss + mix * losses.critic_loss(before, real, step.valid)
        metrics = critic_metrics(value.detach(), target, rollout.weight)
        return loss, metrics | {"critic_real_mix": self.number(mix)}

    def apply(self, due: set[str], terms: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Clip and step each due group; all of them or, where one is not finite, none."""
        due = [name for name in GROUPS if name in due]
        grads = [p.grad for name in due for p in self.optimizers[name].params if p.grad is not None]
        total = torch.nn.utils.get_total_norm(grads)
        checked = total + sum(term.detach() for term in terms.values())
        norms = {name: self.optimizers[name].step(checked)[0] for name in due}
        return torch.isfinite(checked), {f"{name}_grad_norm": norm for name, norm in norms.items()}

    def representation_metric(self, terms: dict[str, Tensor]) -> Tensor:
        own, decoder = terms["representation_own_loss"], terms["decoder_reconstruction_loss"]
        return {"accumulate": own + decoder, "replace": decoder, "none": own}[
            self.config.decoder_mode
        ]

    def measure_open_loop(self, batch: dict[str, Tensor], step: Steps) -> None:
        every = self.config.openloop_every
        if every and (self.updates - 1) % every == 0:
            with torch.no_grad():
                seen = self.model.world.observe(batch)
            self.openloop = open_loop_error(self.model.world, seen, step)

    def number(self, value: float) -> Tensor:
        return torch.full((), float(value), device=self.device)

    def first_nonfinite(self, batch: dict[str, Tensor]) -> str:
        """Name of the first bad tensor of the last update, in the order data flows."""
        params = dict(self.model.named_parameters())
        groups = {
            "batch": {k: v for k, v in batch.items() if v.is_floating_point()},
            "param": params,
            "loss": self.loss_terms,
            "grad": {n: p.grad for n, p in params.items() if p.grad is not None},
        }
        for group, tensors in groups.items():
            for name, tensor in tensors.items():
                if not torch.isfinite(tensor).all():
                    return f"{group}/{name}"
        return "none"

    @torch.no_grad()
    def report(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Open-loop videos by image key: (T, H, W, 3) uint8, truth over model over error."""
        world = self.model.world
        images = [key for key, space in self.obs_space.items() if space.kind == "image"]
        if not images or world.decoder is None:
            return {}
        batch = {key: value[:6].to(self.device) for key, value in batch.items()}
        seen: Seen = world.observe(batch)
        context = max(1, min(seen.states.shape[1] // 2, 16))
        path = world.open_loop(seen.states, world.steps(batch).action, context)
        recon = world.decoder(path)
        return {
            f"openloop/{key}": open_loop_video(batch[key], recon[key], context) for key in images
        }

    def save_policy(self, path: str | Path) -> None:
        """Write what acting needs, for `fastwm.load_policy`."""
        options = {slot: list(self.model.chosen[slot]) for slot in SLOTS}
        options |= {"kind": "modular", "observation_scale": self.config.observation_scale}
        torch.save(pack_policy(self.policy, self.obs_space, options), path)

    # State

    def state_dict(self) -> dict:
        """Everything that the next update depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
            "generator": self.generator.get_state(),
            "act_generator": self.act_generator.get_state(),
            "updates": self.updates,
            "env_steps": self.env_steps,
            "openloop": dict(self.openloop),
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.generator.set_state(state["generator"].cpu())
        self.act_generator.set_state(state["act_generator"].cpu())
        self.updates, self.env_steps = int(state["updates"]), int(state["env_steps"])
        self.openloop = {name: x.to(self.device) for name, x in state["openloop"].items()}


def warn_about(config: ModularConfig) -> None:
    """Settings that are allowed and rarely meant."""
    horizon = config.imagination_horizon
    if horizon == 1:
        text = "imagination_horizon is 1: the model hardly plans; 10 or more is usual"
        warnings.warn(f"modular: {text}", stacklevel=3)
    elif horizon < 5:
        text = f"imagination_horizon is {horizon}: short for credit; 10 or more is usual"
        warnings.warn(f"modular: {text}", stacklevel=3)
    if config.entropy_coef < 1e-5:
        text = f"entropy_coef is {config.entropy_coef:g}: the policy may stop exploring early"
        warnings.warn(f"modular: {text}", stacklevel=3)
