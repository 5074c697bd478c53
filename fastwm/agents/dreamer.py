"""DreamerV3: wires world model, actor-critic and optimizer; acts, updates, saves."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastwm import ops
from fastwm.agents.policy import RecurrentPolicy, pack_policy
from fastwm.agents.video import open_loop_video
from fastwm.behavior import Actor, Critic, ReturnNorm, imag_loss, repl_loss
from fastwm.config import DreamerConfig
from fastwm.cudagraph import CudaRecorder, GraphedUpdate
from fastwm.explore import Explorer
from fastwm.nets import FirstLayers
from fastwm.optim import LaProp, LossScale
from fastwm.rssm import feat
from fastwm.settings import ConfigError
from fastwm.spaces import Space
from fastwm.worldmodels.dreamer import Posterior, WorldModel


class Noise(NamedTuple):
    """Every random draw of one update; None stands for the mode.

    posterior (B, T, S) and prior (I, N, S) are uniform; action (I+1, N, ...) is what
    `Actor.noise` draws, with N = B*T. explore holds prior and action for the explorer's rollout.
    """

    posterior: Tensor | None
    prior: Tensor | None
    action: Tensor | None
    explore: tuple[Tensor, Tensor] | None = None


class Losses(NamedTuple):
    """total 0-d; terms by name, each (B, T) or (B, T-1); metrics 0-d by name."""

    total: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]
    post: Posterior
    return_range: Tensor
    explore_range: Tensor | None = None  # of the explorer's normalizer


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
        wanted = config.expl.behavior == "plan2explore"
        self.explorer = Explorer(self.world.rssm, act_space, config) if wanted else None


class DreamerAgent:
    """Acts in environments and learns from replay batches.

    obs_space, act_space: see fastwm.spaces. config: fastwm.config.DreamerConfig.
    The same seed, data and device give the same agent bit for bit on a CPU.
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
        self.config, self.device = config, torch.device(device)
        self.obs_space, self.act_space = dict(obs_space), act_space
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = DreamerModel(obs_space, act_space, config).to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.act_generator = torch.Generator(self.device).manual_seed(seed + (1 << 40))
        self.optimizer = LaProp(self.trainable(), **asdict(config.optim))
        self.copies = self.model.critic.copies(self.optimizer.params)
        self.loss_scale = LossScale(self.device) if self.precision == "fp16" else None
        self.policy = RecurrentPolicy(
            self.model.world.encoder, self.model.world.rssm, self.model.actor
        )
        # Class indices travel in the smallest type that holds them.
        self.index_dtype = torch.uint8 if config.rssm.classes <= 256 else torch.int32
        self.updates = self.acted = 0  # acted: env_steps of training
        self.counter = torch.zeros((), dtype=torch.int64, device=self.device)  # the same, there
        self.step = self.update_on_device
        if config.cudagraphs == "on" and self.device.type != "cuda":
            raise ConfigError(
                f"DreamerAgent: expected cudagraphs auto or off on device {self.device}, got on; "
                "graphs are of CUDA"
            )
        if config.cudagraphs != "off" and self.device.type == "cuda":
            self.step = GraphedUpdate(self.update_on_device, CudaRecorder([self.generator]))
        self.loss_terms: dict[str, Tensor] = {}

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def parameter_counts(self) -> dict[str, int]:
        """Trainable parameters by part, and in total (the slow critic does not count)."""
        world = self.model.world
        parts = {
            "rssm": world.rssm,
            "encoder": world.encoder,
            "decoder": world.decoder,
            "reward": world.reward,
            "cont": world.cont,
            "actor": self.model.actor,
            "critic": self.model.critic.net,
        }
        parts |= {"explorer": self.model.explorer} if self.model.explorer else {}
        counts = {name: sum(p.numel() for p in m.parameters()) for name, m in parts.items()}
        return counts | {"total": sum(counts.values())}

    def replay_spec(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype name of every key of a replay row, latents included."""
        rssm = self.model.world.rssm
        index = str(self.index_dtype).removeprefix("torch.")
        spec = {key: ((), "bool") for key in ("is_first", "is_last", "is_terminal")}
        spec |= {
            "action": (self.act_space.shape, self.act_space.dtype),
            "reward": ((), "float32"),
            "deter": ((rssm.deter,), "bfloat16"),
            "stoch": ((rssm.stoch,), index),
        }
        taken = sorted(set(spec) & set(self.obs_space))
        if taken:
            raise ValueError(
                f"DreamerAgent: expected other observation names than {sorted(spec)}, got {taken}; "
                "rename them in the environment"
            )
        return spec | {key: (space.shape, space.dtype) for key, space in self.obs_space.items()}

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16: what "auto" stands for on this device."""
        if self.config.precision != "auto":
            return self.config.precision
        if self.device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"

    def autocast(self):
        if self.precision == "fp32":
            return nullcontext()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return torch.autocast(self.device.type, dtype)

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
        """Actions (N, *shape) for a row of every environment.

        rows: observations and is_first (see fastwm.envs). mode: "train" and "sample" draw actions,
        "greedy" takes the mode. generator: source of noise, the agent's own by default.
        Returns actions, the next state, and the latents to store: deter (N, D), stoch (N, S).
        """
        obs = {key: torch.as_tensor(rows[key]).to(self.device) for key in self.obs_space}
        is_first = torch.as_tensor(rows["is_first"]).to(self.device)
        source = self.act_generator if generator is None else generator
        mode, actor = self.who_acts(mode, len(is_first))
        with self.autocast():
            action, state = self.policy.step(obs, state, is_first, mode, source, actor)
        return action.cpu().numpy(), state, self.latents(state)

    def who_acts(self, mode: str, count: int) -> tuple[str, Actor]:
        """How actions are chosen, and by whom: in training by the explorer while it is wanted."""
        expl, acted = self.config.expl, self.acted
        self.acted += count if mode in ("train", "random") else 0
        if mode != "train" or expl.behavior == "greedy" or 0 < expl.until <= acted:
            return mode, self.model.actor
        if expl.behavior == "random":
            return "random", self.model.actor
        return mode, self.model.explorer.actor

    def latents(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a replay row keeps of an acting state."""
        return {
            "deter": state["deter"].to(torch.bfloat16).cpu(),
            "stoch": state["stoch"].argmax(-1).to(self.index_dtype).cpu(),
        }

    # Learning

    def draw_noise(self, batch: int, length: int) -> Noise:
        rssm, horizon = self.model.world.rssm, self.config.imag_horizon
        starts = batch * min(self.config.imag_last or length, length)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=self.generator, device=self.device)

        def rollout() -> tuple[Tensor, Tensor]:
            action = self.model.actor.noise((horizon + 1, starts), self.generator)
            return uniform(horizon, starts, rssm.stoch), action

        posterior, (prior, action) = uniform(batch, length, rssm.stoch), rollout()
        return Noise(posterior, prior, action, rollout() if self.model.explorer else None)

    def losses(self, batch: dict[str, Tensor], noise: Noise, *, normalize: bool = True) -> Losses:
        """All loss terms of one batch (see fastwm.replay for its keys), already on the device.

        normalize: whether returns move the normalizer's range before it scales the advantage.
        """
        world, config = self.model.world, self.config
        with self.autocast():
            _, post = world.observe(batch, noise.posterior)
            terms, metrics = world.losses(batch, post)
            last = min(config.imag_last or post.deter.shape[1], post.deter.shape[1])
            behavior, more, limits = self.behavior_losses(batch, post, last, noise, normalize)
            explored = self.explorer_losses(batch, post, last, noise)
        terms, metrics = terms | behavior | explored[0], metrics | more | explored[1]
        scales = asdict(config.loss) | {"recon": config.loss.rec, "expl": 1.0}
        total = sum(scales[name.split("/")[0]] * term.mean() for name, term in terms.items())
        return Losses(total, terms, metrics, post, limits, explored[2])

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
        """Imagine from the last rows of the posterior, and train actor and critic."""
        world, critic, config = self.model.world, self.model.critic, self.config
        features, action, products = self.imagine(post, last, noise)
        with torch.no_grad():
            reward = world.reward.recall(products["reward"], features)
            reward = ops.twohot_mean(reward, world.reward_bins)
            cont = torch.sigmoid(world.cont.recall(products["cont"], features).squeeze(-1))
            slow = critic.mean(critic.slow.recall(products["slow"], features))
        limits = self.model.return_norm.range

        def scale_of(returns: Tensor) -> Tensor:
            nonlocal limits
            if normalize:
                limits = self.model.return_norm.moved(returns)
            return self.model.return_norm.scale(limits)

        policy = self.model.actor.recall(products["actor"], features)
        value_logits = critic.net.recall(products["critic"], features)
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
        window = {k: batch[k][:, -last:] for k in ("reward", "is_last", "is_terminal")}
        replay_features = feat(post.deter[:, -last:], post.stoch[:, -last:])
        repval = repl_loss(
            **window,
            boot=out.returns[:, 0].reshape(shape),
            value_logits=critic(replay_features),
            slow_value=critic.slow_mean(replay_features.detach()),
            bins=critic.bins,
            discount=horizon_discount,
            lam=config.lam,
            slow_reg=config.critic.slow_reg,
        )
        terms = {
            "policy": out.policy.mean(1).reshape(shape),
            "value": out.value.mean(1).reshape(shape),
            "repval": repval,
        }
        metrics = self.behavior_metrics(out, reward, cont, slow, policy, limits)
        metrics["val"] = out.mean.mean()
        return terms, metrics, limits

    @torch.no_grad()
    def imagine(
        self, post: Posterior, last: int, noise: Noise
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Roll out from every one of the last rows, without gradients.

        Returns features (N, I+1, F), actions (N, I+1, A), and what the first layer of every head
        made of the features before its norm, (N, I+1, units) by name: each state is read once.
        """
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
        return features, action, dict(zip(heads, products, strict=True))

    def starts(self, post: Posterior, last: int) -> tuple[Tensor, Tensor]:
        """Where imagination begins, (N, D) and (N, S, K): the last rows of the posterior."""
        return tuple(x[:, -last:].detach().flatten(0, 1) for x in (post.deter, post.stoch))

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

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def update(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One gradient step on a replay batch.

        Returns metrics (0-d tensors on the device, no host sync) and the fresh latents to write
        back: deter (B, T, D) bfloat16, stoch (B, T, S). A non-finite loss or gradient changes no
        parameter, moment or normalizer; metrics["opt/finite"] tells.
        """
        metrics, latents = self.step(self.to_device(batch))
        self.updates += 1
        return metrics, latents

    def update_on_device(self, batch: dict[str, Tensor]) -> tuple[dict, dict]:
        """All of `update` that a CUDA graph can hold: no host sync, no number kept in Python."""
        out = self.losses(batch, self.draw_noise(*batch["is_first"].shape))
        self.optimizer.zero_grad()
        grad_norm, applied, finite = self.descend(out.total)
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

    def descend(self, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Backward pass and optimizer step: gradient norm, whether it was applied, and whether
        all is well. An overflow that a smaller loss scale can cure is well: it costs one update.
        """
        loss, scale = total.detach(), self.loss_scale
        factor = 1.0 if scale is None else scale.value
        (total if scale is None else total * factor).backward()
        grad_norm, applied = self.optimizer.step(loss, factor, self.copies)
        if scale is None:
            return grad_norm, applied, applied
        finite = applied | (torch.isfinite(loss) & scale.can_shrink())
        scale.follow(applied)
        return grad_norm, applied, finite

    def first_nonfinite(self, batch: dict[str, Tensor]) -> str:
        """Name of the first bad tensor of the last update, in the order data flows."""
        groups = {
            "batch": {k: v for k, v in batch.items() if v.is_floating_point()},
            "param": dict(self.model.named_parameters()),
            "loss": self.loss_terms,
            "grad": {n: p.grad for n, p in self.trainable() if p.grad is not None},
        }
        for group, tensors in groups.items():
            for name, tensor in tensors.items():
                if not torch.isfinite(tensor.float()).all():
                    return f"{group}/{name}"
        return "none"

    @torch.no_grad()
    def report(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Open-loop videos by image key: (T, H, W, 3) uint8, truth over model over error."""
        world = self.model.world
        if not world.decoder.image_keys:
            return {}
        batch = {key: value[:6] for key, value in self.to_device(batch).items()}
        rows, length = batch["is_first"].shape
        context = max(1, min(length // 2, 16))
        source = torch.Generator(self.device).manual_seed(self.config.seed)
        shape = {"generator": source, "device": self.device}
        noise = torch.rand(rows, context, world.rssm.stoch, **shape)
        imag_noise = torch.rand(length - context, rows, world.rssm.stoch, **shape)
        recon = world.open_loop(batch, context, noise, imag_noise)
        return {
            f"openloop/{key}": open_loop_video(batch[key], recon[key], context) for key in recon
        }

    def save_policy(self, path: str | Path) -> None:
        """Write what acting needs, for `fastwm.load_policy`."""
        rssm = asdict(self.config.rssm)
        rssm.pop("free_nats")
        options = {
            "encoder": asdict(self.config.encoder),
            "rssm": rssm,
            "actor": asdict(self.config.actor),
        }
        torch.save(pack_policy(self.policy, self.obs_space, options), path)

    # State

    def state_dict(self) -> dict:
        """Everything that the next update depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "act_generator": self.act_generator.get_state(),
            "updates": self.updates,
            "acted": self.acted,
            "loss_scale": self.loss_scale and self.loss_scale.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.act_generator.set_state(state["act_generator"].cpu())
        self.updates, self.acted = int(state["updates"]), int(state.get("acted", 0))
        self.counter.fill_(self.updates)
        if self.loss_scale is not None and state.get("loss_scale"):  # precision may change
            self.loss_scale.load_state_dict(state["loss_scale"])
