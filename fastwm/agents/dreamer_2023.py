"""DreamerV3 of 2023: world model, actor and critic, each with its own optimizer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from fastwm.agents.dreamer_base import DreamerBase, Noise
from fastwm.behavior import ReturnNorm
from fastwm.behavior_2023 import Actor, Behavior, Critic, frozen
from fastwm.config import DreamerConfig2023
from fastwm.explore import Disagreement
from fastwm.optim_scaled import ScaledAdam
from fastwm.spaces import Space
from fastwm.worldmodels.dreamer import Posterior
from fastwm.worldmodels.dreamer_2023 import WorldModel2023

POLICY_KEYS = ("layers", "units", "outscale", "unimix", "min_std", "max_std")


def split_options(config: DreamerConfig2023) -> tuple[dict, dict]:
    """Of the actor's settings those of its network, and those of its training."""
    network = asdict(config.actor)
    training = {key: network.pop(key) for key in list(network) if key not in POLICY_KEYS}
    return network, training


class DreamerModel2023(nn.Module):
    """World model and behavior, built from a configuration."""

    def __init__(
        self, obs_space: dict[str, Space], act_space: Space, config: DreamerConfig2023
    ) -> None:
        super().__init__()
        rssm, reward = asdict(config.rssm), asdict(config.reward)
        self.world = WorldModel2023(
            obs_space,
            act_space,
            encoder=asdict(config.encoder),
            decoder=asdict(config.decoder),
            free_nats=rssm.pop("free_nats"),
            rssm=rssm,
            bins=reward.pop("bins"),
            reward=reward,
            cont=asdict(config.cont),
            grad_heads=config.grad_heads,
        )
        self.task = self.behavior(act_space, config)
        self.explorer = self.disagreement = None
        if config.expl.behavior == "plan2explore":
            rssm = self.world.rssm
            self.disagreement = Disagreement(rssm, act_space.encoded_size, config.expl)
            self.explorer = self.behavior(act_space, config)

    def behavior(self, act_space: Space, config: DreamerConfig2023) -> Behavior:
        size, critic = self.world.rssm.feat_size, asdict(config.critic)
        network, training = split_options(config)
        training["slow_reg"] = critic.pop("slow_reg")
        training["discount"] = 1.0 - 1.0 / config.discount_horizon
        training |= {"lam": config.lam, "actent": config.actent}
        actor = Actor(size, act_space, **network)
        return Behavior(
            actor, Critic(size, **critic), ReturnNorm(**asdict(config.retnorm)), training
        )

    @property
    def actor(self) -> Actor:
        return self.task.actor

    @property
    def critic(self) -> Critic:
        return self.task.critic


class DreamerAgent2023(DreamerBase):
    """Acts in environments and learns from replay batches; stores no latents.

    obs_space, act_space: see fastwm.spaces. config: fastwm.config.DreamerConfig2023.
    """

    def __init__(
        self,
        obs_space: dict[str, Space],
        act_space: Space,
        config: DreamerConfig2023,
        *,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        super().__init__(obs_space, act_space, config, DreamerModel2023, device, seed)
        self.optimizers = self.make_optimizers()

    def make_optimizers(self) -> dict[str, ScaledAdam]:
        model, options = self.model, self.config.optim
        parts = {
            "model": (model.world, options.model),
            "actor": (model.task.actor, options.actor),
            "critic": (model.task.critic, options.critic),
        }
        if model.explorer:
            parts["disag"] = (model.disagreement, options.model)
            parts["expl_actor"] = (model.explorer.actor, options.actor)
            parts["expl_critic"] = (model.explorer.critic, options.critic)
        made = {}
        for name, (module, adam) in parts.items():
            params = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
            made[name] = ScaledAdam(params, **asdict(adam), scaled=self.precision == "fp16")
        return made

    def replay_spec(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype name of every key of a replay row."""
        return {k: v for k, v in super().replay_spec().items() if k not in ("deter", "stoch")}

    def latents(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}

    # Learning

    def world_losses(
        self, batch: dict[str, Tensor], noise: Noise
    ) -> tuple[Tensor, dict, dict, Posterior]:
        """The weighted total, the terms (B, T), metrics, and the posterior."""
        world = self.model.world
        with self.autocast():
            _, post = world.observe(batch, noise.posterior)
            terms, metrics = world.losses(batch, post)
        scales = asdict(self.config.loss) | {"recon": self.config.loss.rec}
        total = sum(scales[name.split("/")[0]] * term.mean() for name, term in terms.items())
        return total, terms, metrics, post

    def learn_behavior(
        self, post: Posterior, draws: tuple, healthy: Tensor, prefix: str = ""
    ) -> tuple[dict, dict, Tensor]:
        """One update of actor and critic: losses, metrics, whether all is well.

        prefix: "" for the task's, "expl_" for the explorer's.
        """
        model, horizon = self.model, self.config.imag_horizon
        task = model.explorer if prefix else model.task

        def heads(features: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
            reward = model.world.reward_mean(features)
            if prefix:
                reward = model.disagreement.mixed(features, action, reward)
            return reward, model.world.cont_mean(features)

        start = self.starts(post, self.config.imag_last)
        others = [model.world, task.critic, *([model.disagreement] if prefix else [])]
        with frozen(*others), self.autocast():
            out = task.imagine(model.world.rssm, start, heads, draws, horizon)
        policy_loss = out.policy_loss.mean()
        actor, applied, well = self.optimizers[f"{prefix}actor"].descend(policy_loss, healthy)
        with self.autocast():
            value_losses, slow = task.critic_loss(out)
        value_loss = value_losses.mean()
        critic, critic_applied, critic_well = self.optimizers[f"{prefix}critic"].descend(
            value_loss, healthy
        )
        task.return_norm.commit(out.limits, applied)
        task.critic.follow(self.updates, critic_applied)
        metrics = out.metrics | {"slowval": slow.mean()}
        if not prefix:
            metrics |= {f"opt/actor_{name}": value for name, value in actor.items()}
            metrics |= {f"opt/critic_{name}": value for name, value in critic.items()}
        losses = {"policy": policy_loss.detach(), "value": value_loss.detach()}
        return losses, metrics, well & critic_well

    def learn_explorer(
        self, batch: dict[str, Tensor], post: Posterior, noise: Noise, healthy: Tensor
    ) -> tuple[dict, dict, Tensor]:
        """One update of the ensemble, and of the actor and critic that it rewards."""
        if self.model.explorer is None:
            return {}, {}, healthy
        action = self.model.world.encode_action(batch["prev_action"])
        with self.autocast():
            loss = self.model.disagreement.losses(post, action, batch["is_first"]).mean()
        _, _, well = self.optimizers["disag"].descend(loss, healthy)
        losses, metrics, more = self.learn_behavior(post, noise.explore, healthy, "expl_")
        losses = {"disag": loss.detach(), **losses}
        kept = {f"expl/{name}": metrics[name] for name in ("rew", "ent")}
        return {f"expl/{name}": value for name, value in losses.items()}, kept, well & more

    def update(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step of the world model, then, through its new weights, of actor and critic.

        Returns metrics (0-d tensors on the device, no host sync) and no latents. A part whose loss
        or gradient is not finite stays as it is, and with the world model's loss all do;
        metrics["opt/finite"] tells.
        """
        batch = self.to_device(batch)
        noise = self.draw_noise(*batch["is_first"].shape)
        total, terms, metrics, post = self.world_losses(batch, noise)
        model, _, well = self.optimizers["model"].descend(total)
        self.updates += 1
        healthy = torch.isfinite(total.detach())  # bad data say nothing to actor and critic either
        draws = (noise.prior, noise.action)
        losses, more, behavior_well = self.learn_behavior(post, draws, healthy)
        explored, extra, explorer_well = self.learn_explorer(batch, post, noise, healthy)
        terms = {name: term.detach() for name, term in terms.items()}
        self.loss_terms = terms | losses | explored
        metrics |= (
            more | extra | {f"loss/{name}": term.mean() for name, term in self.loss_terms.items()}
        )
        metrics |= {f"opt/{name}": value for name, value in model.items()}
        metrics |= {"opt/loss": total.detach(), "opt/finite": well & behavior_well & explorer_well}
        return metrics, {}

    def actor_options(self) -> dict[str, Any]:
        return {"networks": "2023", "actor": split_options(self.config)[0]}

    # State

    def state_dict(self) -> dict:
        """Everything that the next update depends on."""
        optimizers = {name: part.state_dict() for name, part in self.optimizers.items()}
        return super().state_dict() | {"optimizers": optimizers}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        for name, part in self.optimizers.items():
            part.load_state_dict(state["optimizers"][name])
