"""Exploration: an ensemble that disagrees where the world model has seen little, and its actor.

Plan2Explore: every head predicts the next state from a feature (and the action taken there); how
far the heads differ is the reward of an actor-critic of its own, which acts during training. All
heads are one batched product a layer. Source: arXiv:2005.05960.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastwm import ops
from fastwm.behavior import Actor, Critic, ImagOut, ReturnNorm, imag_loss
from fastwm.nets import init_weight_
from fastwm.worldmodels.dreamer import Posterior

TINY = 1e-6  # the smallest disagreement that the logarithm sees


class Disagreement(nn.Module):
    """K MLPs from features to a later state: weights (K, in, out), hidden layers with LayerNorm."""

    def __init__(self, rssm: nn.Module, actions: int, options: Any) -> None:
        """options: settings `expl.*`, see fastwm.config_common.Expl."""
        super().__init__()
        self.options = options
        targets = {"stoch": rssm.latent_size, "deter": rssm.deter, "feat": rssm.feat_size}
        inputs = rssm.feat_size + (actions if options.disag_action_cond else 0)
        sizes = [inputs, *[options.disag_units] * options.disag_layers]
        sizes.append(targets[options.disag_target])
        heads, pairs = options.disag_models, list(zip(sizes, sizes[1:], strict=False))
        self.weights = nn.ParameterList(torch.empty(heads, i, o) for i, o in pairs)
        self.biases = nn.ParameterList(torch.zeros(heads, 1, o) for _, o in pairs)
        for weight in self.weights:
            init_weight_(weight, weight.shape[1])

    def forward(self, x: Tensor) -> Tensor:  # (M, in) -> (K, M, X)
        x = x.expand(len(self.weights[0]), -1, -1)
        layers = list(zip(self.weights, self.biases, strict=True))
        for weight, bias in layers[:-1]:
            x = torch.baddbmm(bias, x, weight)
            x = F.silu(F.layer_norm(x.float(), x.shape[-1:], eps=1e-3))
        return torch.baddbmm(layers[-1][1], x, layers[-1][0]).float()

    def inputs(self, features: Tensor, action: Tensor) -> Tensor:  # (..., F), (..., A) -> (..., in)
        if not self.options.disag_action_cond:
            return features
        return torch.cat([features, action], -1)

    def losses(self, post: Posterior, action: Tensor, is_first: Tensor) -> Tensor:
        """Half the squared error of the state `disag_offset` rows on, (B, T - offset).

        action: (B, T, A), the one that led to a row. Rows of another episode do not count.
        """
        offset, length = self.options.disag_offset, is_first.shape[1]
        stoch, deter = post.stoch.detach().flatten(-2), post.deter.detach()
        features = torch.cat([deter, stoch], -1)
        target = {"stoch": stoch, "deter": deter, "feat": features}[self.options.disag_target]
        x = self.inputs(features[:, :-offset], action[:, 1 : length - offset + 1])
        error = self(x.flatten(0, 1)) - target[:, offset:].flatten(0, 1)
        loss = 0.5 * error.square().sum(-1).mean(0).view(x.shape[:2])
        later = [is_first[:, i : length - offset + i] for i in range(1, offset + 1)]
        return loss.masked_fill(torch.stack(later).any(0), 0.0)

    def reward(self, features: Tensor, action: Tensor) -> Tensor:
        """Disagreement (N, I+1) along a rollout (N, I+1, ...), at the state that an action led to.

        Standard deviation over the heads, mean over the elements, its logarithm with `disag_log`.
        """
        x = self.inputs(features[:, :-1], action[:, :-1])
        found = self(x.flatten(0, 1)).std(0).mean(-1).view(x.shape[:2])
        found = found.clamp(min=TINY).log() if self.options.disag_log else found
        return F.pad(found, (1, 0))

    def mixed(self, features: Tensor, action: Tensor, extrinsic: Tensor) -> Tensor:  # (N, I+1)
        """The scaled sum of both rewards."""
        options = self.options
        own = options.intr_scale * self.reward(features, action)
        return own + options.extr_scale * extrinsic if options.extr_scale else own


class Explorer(nn.Module):
    """The ensemble with the actor-critic that its disagreement trains, for the 2024 algorithm."""

    def __init__(self, rssm: nn.Module, act_space: Any, config: Any) -> None:
        """config: fastwm.config_dreamer.DreamerConfig."""
        super().__init__()
        critic = asdict(config.critic)
        self.slow_reg = critic.pop("slow_reg")
        self.heads = Disagreement(rssm, act_space.encoded_size, config.expl)
        self.actor = Actor(rssm.feat_size, act_space, **asdict(config.actor))
        self.critic = Critic(rssm.feat_size, **critic)
        self.return_norm = ReturnNorm(**asdict(config.retnorm))

    def losses(
        self,
        world: nn.Module,
        batch: dict[str, Tensor],
        post: Posterior,
        start: tuple[Tensor, Tensor],  # (N, D), (N, S, K)
        draws: tuple[Tensor, Tensor],
        options: dict,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Terms by name, metrics, and the range of the return normalizer (2,).

        draws: uniform numbers (I, N, S) of the prior, and for the actions what `Actor.noise` gives
        for (I+1, N). options: discount, lam, actent.
        """
        action = world.encode_action(batch["prev_action"])
        with torch.no_grad():
            noises = iter(draws[1])
            features, taken = world.rssm.imagine(
                *start, lambda x: self.actor(x).sample(next(noises)), len(draws[0]), draws[0]
            )
            extrinsic = ops.twohot_mean(world.reward(features), world.reward_bins)
            reward = self.heads.mixed(features, taken, extrinsic)
            cont = torch.sigmoid(world.cont(features).squeeze(-1))
            slow = self.critic.slow_mean(features)
        policy, limits = self.actor(features), self.return_norm.range

        def scale_of(returns: Tensor) -> Tensor:
            nonlocal limits
            limits = self.return_norm.moved(returns)
            return self.return_norm.scale(limits)

        out: ImagOut = imag_loss(
            policy, taken, reward, cont, self.critic(features), slow, self.critic.bins, scale_of,
            slow_reg=self.slow_reg, **options,
        )  # fmt: skip
        terms = {
            "expl/disag": self.heads.losses(post, action, batch["is_first"]),
            "expl/policy": out.policy,
            "expl/value": out.value,
        }
        with torch.no_grad():
            metrics = {"expl/rew": reward[:, 1:].mean(), "expl/ent": policy.entropy().mean()}
        return terms, metrics, limits
