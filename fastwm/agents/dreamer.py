"""DreamerV3: wires world model, actor-critic and optimizer; acts, updates, saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastwm.agents import defaults
from fastwm.agents.dreamer_base import DreamerBase, Noise
from fastwm.behavior import Actor, Critic, ReturnNorm, imag_loss, repl_loss
from fastwm.compiled import CompiledParts
from fastwm.config import DreamerConfig
from fastwm.cudagraph import CudaRecorder, Graphed
from fastwm.explore import Explorer
from fastwm.nets import FirstLayers
from fastwm.optim import LaProp, LossScale
from fastwm.rssm import feat
from fastwm.spaces import Space
from fastwm.worldmodels.dreamer import Posterior, WorldModel

COMPILED = {  # setting `compile` -> what torch.compile gets; gradients follow
    "off": (),
    "ops": ("world_losses", "actor_critic_losses"),  # heads and losses, around the kernels
    "full": ("losses",),  # with encoder, sequence and rollout: the kernels are opaque in it
}


class Losses(NamedTuple):
    """total 0-d; terms by name, each (B, T) or (B, T-1); metrics 0-d by name."""

    total: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]
    post: Posterior
    return_range: Tensor
    explore_range: Tensor | None = None  # of the explorer's normalizer


class Imagined(NamedTuple):
    """features (N, I+1, F), action (N, I+1, A); products: what the first layer of every head made
    of the features before its norm, (N, I+1, units) by name, so that each state is read once."""

    features: Tensor
    action: Tensor
    products: dict[str, Tensor]


class DreamerModel(nn.Module):
    """World model, actor, critic and return normalizer, built from a configuration."""

    def __init__(
        self, obs_space: dict[str, Space], act_space: Space, config: DreamerConfig
    ) -> None:
        super().__init__()
        discount = 1.0 - 1.0 / config.discount_horizon
        rssm, reward, critic = asdict(config.rssm), asdict(config.reward), asdict(config.critic)
        critic.pop("slow_reg")
        self.world = WorldModel(
            obs_space,
            act_space,
            encoder=asdict(config.encoder),
            decoder=asdict(config.decoder),
            free_nats=rssm.pop("free_nats"),
            rssm=rssm,
            bins=reward.pop("bins"),
            reward=reward,
            cont=asdict(config.cont),
            discount=discount if config.contdisc else 1.0,
        )
        size = self.world.rssm.feat_size
        self.actor = Actor(size, act_space, **asdict(config.actor))
        self.critic = Critic(size, **critic)
        self.return_norm = ReturnNorm(**asdict(config.retnorm))
        heads = self.world.reward, self.world.cont, self.actor, self.critic.net, self.critic.slow
        for head in heads:  # their features end with the latents
            head.mlp[0].one_hots = self.world.rssm.latent_size
        wanted = config.expl.behavior == "plan2explore"
        self.explorer = Explorer(self.world.rssm, act_space, config) if wanted else None


class DreamerAgent(DreamerBase):
    """Acts in environments and learns from replay batches.

    obs_space, act_space: see fastwm.spaces. config: fastwm.config.DreamerConfig.
    """

    def __init__(
        self,
        obs_space: dict[str, Space],
        act_space: Space,
        config: DreamerConfig,
        *,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        super().__init__(obs_space, act_space, config, DreamerModel, device, seed)
        self.optimizer = LaProp(self.trainable(), **asdict(config.optim))
        self.copies = self.model.critic.copies(self.optimizer.params)
        self.loss_scale = LossScale(self.device) if self.precision == "fp16" else None
        self.counter = torch.zeros((), dtype=torch.int64, device=self.device)  # updates, there
        mode = defaults.chosen("compile", config.compile, self.device)
        self.compiled = CompiledParts(self, COMPILED[mode])
        self.step, self.updates_at_once = self.updates_on_device, 1
        if self.graphs():
            recorder = CudaRecorder([self.generator])
            self.step = Graphed(self.updates_on_device, recorder, "the update")
            self.updates_at_once = config.updates_per_launch

    # Learning

    def losses(self, batch: dict[str, Tensor], noise: Noise, *, normalize: bool = True) -> Losses:
        """All loss terms of one batch (see fastwm.replay for its keys), already on the device.

        normalize: whether returns move the normalizer's range before it scales the advantage.
        """
        world, config = self.model.world, self.config
        with self.autocast():
            _, post = world.observe(batch, noise.posterior)
            terms, metrics = self.world_losses(batch, post)
            last = min(config.imag_last or post.deter.shape[1], post.deter.shape[1])
            behavior, more, limits = self.behavior_losses(batch, post, last, noise, normalize)
            explored = self.explorer_losses(batch, post, last, noise)
        terms, metrics = terms | behavior | explored[0], metrics | more | explored[1]
        scales = asdict(config.loss) | {"recon": config.loss.rec, "expl": 1.0}
        total = sum(scales[name.split("/")[0]] * term.mean() for name, term in terms.items())
        return Losses(total, terms, metrics, post, limits, explored[2])

    def world_losses(self, batch: dict[str, Tensor], post: Posterior) -> tuple[dict, dict]:
        return self.model.world.losses(batch, post)

    def explorer_losses(
        self, batch: dict[str, Tensor], post: Posterior, last: int, noise: Noise
    ) -> tuple[dict, dict, Tensor | None]:
        """Terms, metrics and range of the explorer's normalizer; nothing where there is none."""
        if self.model.explorer is None:
            return {}, {}, None
        discount = 1.0 if self.config.contdisc else 1.0 - 1.0 / self.config.discount_horizon
        options = {"discount": discount, "lam": self.config.lam, "actent": self.config.actent}
        start, world = self.starts(post, last), self.model.world
        return self.model.explorer.losses(world, batch, post, start, noise.explore, options)

    def behavior_losses(
        self, batch: dict[str, Tensor], post: Posterior, last: int, noise: Noise, normalize: bool
    ) -> tuple[dict, dict, Tensor]:
        """Terms, metrics and the normalizer's range: imagined from the last rows, and on these."""
        imagined = self.imagine(post, last, noise)
        return self.actor_critic_losses(batch, post, last, imagined, normalize)

    def actor_critic_losses(
        self,
        batch: dict[str, Tensor],
        post: Posterior,
        last: int,
        imagined: Imagined,
        normalize: bool,
    ) -> tuple[dict, dict, Tensor]:
        world, critic, config = self.model.world, self.model.critic, self.config
        features, action, products = imagined
        with torch.no_grad():
            reward = world.reward.mean(features, world.reward_bins, products["reward"])
            cont = torch.sigmoid(world.cont.recall(products["cont"], features).squeeze(-1))
            slow = critic.slow.mean(features, critic.bins, products["slow"])
        limits = self.model.return_norm.range

        def scale_of(returns: Tensor) -> Tensor:
            nonlocal limits
            if normalize:
                limits = self.model.return_norm.moved(returns)
            return self.model.return_norm.scale(limits)

        policy = self.model.actor.recall(products["actor"], features)
        value_logits = critic.net.logits(features, products["critic"])
        horizon_discount = 1.0 - 1.0 / config.discount_horizon
        out = imag_loss(
            policy,
            action,
            reward,
            cont,
            value_logits,
            slow,
            critic.bins,
            scale_of,
            discount=1.0 if config.contdisc else horizon_discount,
            lam=config.lam,
            actent=config.actent,
            slow_reg=config.critic.slow_reg,
        )
        shape = (post.deter.shape[0], last)
        terms = {
            "policy": out.policy.mean(1).reshape(shape),
            "value": out.value.mean(1).reshape(shape),
            "repval": self.replay_value_loss(batch, post, out.returns[:, 0].reshape(shape)),
        }
        metrics = self.behavior_metrics(out, reward, cont, slow, policy, limits)
        metrics["val"] = out.mean.mean()
        return terms, metrics, limits

    def replay_value_loss(self, batch: dict[str, Tensor], post: Posterior, boot: Tensor) -> Tensor:
        """The critic's loss on the last rows, (B, L-1); boot (B, L): the return imagined there."""
        critic, config, last = self.model.critic, self.config, boot.shape[1]
        window = {k: batch[k][:, -last:] for k in ("reward", "is_last", "is_terminal")}
        features = feat(post.deter[:, -last:], post.stoch[:, -last:])
        return repl_loss(
            **window,
            boot=boot,
            value_logits=critic.net.logits(features),
            slow_value=critic.slow_mean(features.detach()),
            bins=critic.bins,
            discount=1.0 - 1.0 / config.discount_horizon,
            lam=config.lam,
            slow_reg=config.critic.slow_reg,
        )

    @torch.no_grad()
    def imagine(self, post: Posterior, last: int, noise: Noise) -> Imagined:
        """Roll out from every one of the last rows, without gradients."""
        model, horizon = self.model, self.config.imag_horizon
        heads = {
            "actor": model.actor.mlp,
            "critic": model.critic.net.mlp,
            "slow": model.critic.slow.mlp,
            "reward": model.world.reward.mlp,
            "cont": model.world.cont.mlp,
        }
        first = FirstLayers(list(heads.values()))
        draws = iter([None] * (horizon + 1) if noise.action is None else noise.action)
        deter, stoch = self.starts(post, last)
        steps: list[tuple[Tensor, ...]] = []

        def policy(features: Tensor) -> Tensor:
            steps.append(first(features))
            x = model.actor.mlp[0].finish(steps[-1][0])
            return model.actor.policy(model.actor.mlp.rest(x)).sample(next(draws))

        features, action = model.world.rssm.imagine(deter, stoch, policy, horizon, noise.prior)
        products = (torch.stack(parts, 1) for parts in zip(*steps, strict=True))
        return Imagined(features, action, dict(zip(heads, products, strict=True)))

    @torch.no_grad()
    def behavior_metrics(self, out, reward, cont, slow, policy, limits) -> dict[str, Tensor]:
        scaled = (out.returns - limits[0]) / self.model.return_norm.scale(limits)
        entropy = policy.entropy()[:, :-1].mean()
        metrics = {
            "adv": out.advantage.mean(),
            "adv_std": out.advantage.std(correction=0),
            "adv_mag": out.advantage.abs().mean(),
            "rew": reward.mean(),
            "con": cont.mean(),
            "ret": scaled.mean(),
            "ret_min": scaled.min(),
            "ret_max": scaled.max(),
            "ret_rate": (scaled.abs() >= 1.0).float().mean(),
            "weight": out.weight.mean(),
            "slowval": slow.mean(),
            "ent": entropy,
        }
        limit = policy.max_entropy()
        if limit is not None:
            metrics["rand"] = entropy / limit
        return metrics

    def update(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One gradient step on a replay batch.

        Returns metrics (0-d tensors on the device, no host sync) and the fresh latents to write
        back: deter (B, T, D) bfloat16, stoch (B, T, S). A non-finite loss or gradient changes no
        parameter, moment or normalizer; metrics["opt/finite"] tells.
        """
        return self.update_many([batch])[0]

    def update_many(self, batches: Sequence[dict[str, Tensor]]) -> list[tuple[dict, dict]]:
        """`update` on each batch in turn; as one graph they cost one launch."""
        results = self.step([self.to_device(batch) for batch in batches])
        self.updates += len(batches)
        return results

    def updates_on_device(self, batches: Sequence[dict[str, Tensor]]) -> list[tuple[dict, dict]]:
        return [self.update_on_device(batch) for batch in batches]

    def update_on_device(self, batch: dict[str, Tensor]) -> tuple[dict, dict]:
        """All of `update` that a CUDA graph can hold: no host sync, no number kept in Python."""
        noise = self.draw_noise(*batch["is_first"].shape)
        out = self.compiled(lambda: self.gradients(batch, noise))
        grad_norm, applied, finite = self.descend(out.total.detach())
        self.model.return_norm.commit(out.return_range, applied)
        self.counter += 1
        if not self.copies.slow:
            self.model.critic.follow(self.counter, applied)
        if self.model.explorer:
            self.model.explorer.return_norm.commit(out.explore_range, applied)
            self.model.explorer.critic.follow(self.counter, applied)
        self.loss_terms = {name: term.detach() for name, term in out.terms.items()}
        metrics = {f"loss/{name}": term.mean() for name, term in self.loss_terms.items()}
        metrics |= out.metrics
        metrics |= {"opt/loss": out.total.detach(), "opt/grad_norm": grad_norm}
        metrics |= {"opt/finite": finite, "opt/updates": self.optimizer.step_count.clone()}
        if self.loss_scale is not None:
            metrics["opt/grad_scale"] = self.loss_scale.value.clone()
        latents = {
            "deter": out.post.deter.detach().to(torch.bfloat16),
            "stoch": out.post.stoch.detach().argmax(-1).to(self.index_dtype),
        }
        return metrics, latents

    def gradients(self, batch: dict[str, Tensor], noise: Noise) -> Losses:
        """The losses of a batch; their gradients, times the loss scale, are left in `.grad`."""
        self.optimizer.zero_grad()
        out, scale = self.losses(batch, noise), self.loss_scale
        (out.total if scale is None else out.total * scale.value).backward()
        return out

    def descend(self, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Optimizer step: gradient norm, whether it was applied, and whether all is well.

        An overflow that a smaller loss scale can cure is well: it costs one update.
        """
        scale = self.loss_scale
        factor = 1.0 if scale is None else scale.value
        grad_norm, applied = self.optimizer.step(loss, factor, self.copies)
        if scale is None:
            return grad_norm, applied, applied
        finite = applied | (torch.isfinite(loss) & scale.can_shrink())
        scale.follow(applied)
        return grad_norm, applied, finite

    # State

    def state_dict(self) -> dict:
        """Everything that the next update depends on."""
        scale = self.loss_scale and self.loss_scale.state_dict()
        return super().state_dict() | {
            "optimizer": self.optimizer.state_dict(),
            "loss_scale": scale,
        }

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.counter.fill_(self.updates)
        if self.loss_scale is not None and state.get("loss_scale"):  # precision may change
            self.loss_scale.load_state_dict(state["loss_scale"])
