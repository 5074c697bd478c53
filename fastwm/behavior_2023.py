"""Actor and critic of 2023: three ways to estimate the policy's gradient in imagination.

`reinforce` scores actions, `dynamics` differentiates the returns through the world model to
reparametrised (or straight-through) actions, `both` mixes them. Source: arXiv:2301.04104, first
version.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastwm import behavior, ops
from fastwm.behavior import ReturnNorm, critic_loss
from fastwm.distributions import BoundedNormal, MultiCategorical
from fastwm.nets_2023 import MLP, Head, Output
from fastwm.spaces import Space

ESTIMATORS = ("reinforce", "dynamics", "both")


class StraightThrough(MultiCategorical):
    """One-hot samples that carry the gradient of their probabilities."""

    def sample(self, noise: Tensor | None) -> Tensor:
        hot = super().sample(noise)
        if not torch.is_grad_enabled():
            return hot
        probs = torch.cat([part.exp() for part in self.log_probs], -1)
        return hot + (probs - probs.detach())


class ClippedNormal(BoundedNormal):
    """Samples are divided by what exceeds 1, with the gradient of the sample itself."""

    def sample(self, noise: Tensor | None) -> Tensor:
        x = super().sample(noise)
        return x / x.abs().clamp(min=1.0).detach()


class Actor(behavior.Actor):
    """Features (..., F) -> distribution over actions, whose samples are differentiable."""

    def __init__(
        self,
        feat_size: int,
        act_space: Space,
        *,
        units: int,
        layers: int,
        outscale: float,
        unimix: float,
        min_std: float,
        max_std: float,
    ) -> None:
        nn.Module.__init__(self)
        self.space, self.unimix, self.std_range = act_space, unimix, (min_std, max_std)
        self.mlp = MLP(feat_size, units, layers)
        size, names = act_space.encoded_size, ("mean", "std")
        names = ("logits",) if act_space.kind == "discrete" else names
        self.heads = nn.ModuleDict({name: Output(units, size, outscale=outscale) for name in names})

    def distribution(self, outs: Sequence[Tensor]) -> behavior.Policy:
        if self.space.kind == "discrete":
            return StraightThrough(outs[0], self.space.classes, self.unimix)
        return ClippedNormal(outs[0], outs[1], *self.std_range)


class Critic(behavior.Critic):
    """Two-hot value head over symlog bins, and its slowly following copy."""

    def __init__(
        self,
        feat_size: int,
        *,
        units: int,
        layers: int,
        bins: int,
        outscale: float,
        slow_rate: float,
        slow_every: int,
    ) -> None:
        nn.Module.__init__(self)
        self.slow_rate, self.slow_every = slow_rate, slow_every
        self.net = Head(feat_size, bins, units=units, layers=layers, outscale=outscale)
        self.slow = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("bins", ops.symlog_bins(bins), persistent=False)

    def mean(self, logits: Tensor) -> Tensor:  # (..., V) -> (...)
        return ops.twohot_mean(logits, self.bins, squash=True)

    @torch.no_grad()
    def slow_mean(self, features: Tensor) -> Tensor:  # (..., F) -> (...)
        return self.mean(self.slow(features))


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Within the block their parameters ask for no gradient; what passes through them does."""
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    for param in params:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in params:
            param.requires_grad_(True)


def reach_weights(discount: Tensor) -> Tensor:  # (N, I) -> (N, I)
    """How much each imagined step counts: products of the discounts before it, 1 at the start."""
    ones = torch.ones_like(discount[:, :1])
    return torch.cat([ones, discount[:, :-1]], 1).cumprod(1).detach()


def actor_loss(
    policy: behavior.Policy,  # over (N, I), of detached features
    action: Tensor,  # (N, I, A)
    advantage: Tensor,  # (N, I) normalized; with gradient for "dynamics" and "both"
    score: Tensor,  # (N, I) what reinforce weighs its log-probabilities with
    weight: Tensor,  # (N, I)
    *,
    estimator: str,
    mix: float,
    actent: float,
) -> Tensor:  # (N, I)
    """-weight (target + actent entropy); target is log pi(a) score, the advantage, or their mix."""
    target = advantage
    if estimator != "dynamics":
        target = policy.log_prob(action.detach()) * score.detach()
    if estimator == "both":
        target = mix * advantage + (1.0 - mix) * target
    return -weight * (target + actent * policy.entropy())


class Imagined(NamedTuple):
    """A rollout with its returns; everything but the policy loss is detached."""

    policy_loss: Tensor  # (N, I)
    features: Tensor  # (N, I+1, F)
    returns: Tensor  # (N, I)
    weight: Tensor  # (N, I)
    limits: Tensor  # (2,) of the return normalizer
    metrics: dict[str, Tensor]


class Behavior(nn.Module):
    """Actor, critic and return normalizer that learn from one kind of reward."""

    def __init__(
        self, actor: Actor, critic: Critic, return_norm: ReturnNorm, options: dict
    ) -> None:
        """options: grad, mix, normalize_reinforce, discount, lam, actent, slow_reg."""
        super().__init__()
        self.actor, self.critic, self.return_norm = actor, critic, return_norm
        self.options = dict(options)
        if self.options["grad"] == "auto":
            discrete = actor.space.kind == "discrete"
            self.options["grad"] = "reinforce" if discrete else "dynamics"

    def imagine(
        self,
        rssm: nn.Module,
        start: tuple[Tensor, Tensor],  # (N, D), (N, S, K)
        heads: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        draws: tuple[Tensor | None, Tensor | None],
        horizon: int,
    ) -> Imagined:
        """Roll out and score. Call it with everything but the actor frozen.

        heads: (features, action) -> reward, continue (N, I+1). draws: uniform numbers (I, N, S) of
        the prior, and for the actions (I+1, N, ...) what `Actor.noise` gives; None takes modes.
        """
        through = self.options["grad"] != "reinforce" and torch.is_grad_enabled()
        noises = iter([None] * (horizon + 1) if draws[1] is None else draws[1])
        with torch.set_grad_enabled(through):
            features, action = rssm.imagine(
                *start, lambda x: self.actor(x).sample(next(noises)), horizon, draws[0]
            )
            reward, cont = heads(features, action)
            value = self.critic.mean(self.critic(features))
            discount = self.options["discount"] * cont
            returns = ops.lambda_return(reward, value, discount, self.options["lam"])
            limits = self.return_norm.moved(returns)
            raw = returns - value[:, :-1]
            advantage = raw / self.return_norm.scale(limits)
        weight = reach_weights(discount[:, :-1])
        policy = self.actor(features[:, :-1].detach())
        loss = actor_loss(
            policy, action[:, :-1], advantage,
            advantage if self.options["normalize_reinforce"] else raw, weight,
            estimator=self.options["grad"], mix=self.options["mix"],
            actent=self.options["actent"],
        )  # fmt: skip
        metrics = self.metrics(policy, reward, cont, value, returns, advantage, limits, weight)
        kept = (x.detach() for x in (features, returns, weight, limits))
        return Imagined(loss, *kept, metrics)

    def critic_loss(self, out: Imagined) -> tuple[Tensor, Tensor]:
        """Weighted two-hot loss (N, I) towards returns and slow critic, and the slow value."""
        slow, critic = self.critic.slow_mean(out.features), self.critic
        targets = ops.symlog(out.returns), ops.symlog(slow)
        logits = critic(out.features)
        loss = critic_loss(logits, *targets, critic.bins, self.options["slow_reg"])
        return out.weight * loss, slow

    @torch.no_grad()
    def metrics(self, policy, reward, cont, value, returns, advantage, limits, weight) -> dict:
        scaled = (returns - limits[0]) / self.return_norm.scale(limits)
        entropy = policy.entropy().mean()
        metrics = {
            "adv": advantage.mean(),
            "adv_std": advantage.std(correction=0),
            "adv_mag": advantage.abs().mean(),
            "rew": reward.mean(),
            "con": cont.mean(),
            "val": value.mean(),
            "ret": scaled.mean(),
            "ret_min": scaled.min(),
            "ret_max": scaled.max(),
            "ret_rate": (scaled.abs() >= 1.0).float().mean(),
            "weight": weight.mean(),
            "ent": entropy,
        }
        limit = policy.max_entropy()
        return metrics if limit is None else metrics | {"rand": entropy / limit}
