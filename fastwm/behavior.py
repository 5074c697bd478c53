"""Actor and critic, and the losses that train them in imagination and on replay.

The losses are plain functions of tensors. Source: arXiv:2301.04104 and its 2024 code.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastwm import ops
from fastwm.distributions import BoundedNormal, MultiCategorical
from fastwm.nets import MLP, Head, Linear
from fastwm.spaces import Space

Policy = MultiCategorical | BoundedNormal


class Actor(nn.Module):
    """Features (..., F) -> distribution over actions."""

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
        super().__init__()
        self.space, self.unimix, self.std_range = act_space, unimix, (min_std, max_std)
        self.mlp = MLP(feat_size, units, layers)
        size = act_space.encoded_size
        names = ("logits",) if act_space.kind == "discrete" else ("mean", "std")
        self.heads = nn.ModuleDict(
            {name: Linear(self.mlp.out_features, size, outscale=outscale) for name in names}
        )

    def forward(self, features: Tensor) -> Policy:
        return self.policy(self.mlp(features))

    def recall(self, product: Tensor, features: Tensor) -> Policy:
        """forward(features) where the first layer's product is known; see NormLinear.recall."""
        return self.policy(self.mlp.recall(product, features))

    def policy(self, x: Tensor) -> Policy:
        """The distribution from the last hidden layer."""
        return self.distribution([head(x).float() for head in self.heads.values()])

    def distribution(self, outs: Sequence[Tensor]) -> Policy:
        """The distribution from what the heads say, each (..., A)."""
        if self.space.kind == "discrete":
            return MultiCategorical(outs[0], self.space.classes, self.unimix)
        return BoundedNormal(outs[0], outs[1], *self.std_range)

    def noise(self, lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Fresh noise for `sample`: uniform for discrete elements, normal for continuous ones."""
        discrete = self.space.kind == "discrete"
        width = len(self.space.classes) if discrete else self.space.encoded_size
        draw = torch.rand if discrete else torch.randn
        return draw(*lead, width, generator=generator, device=generator.device)

    def random(self, count: int, generator: torch.Generator) -> Tensor:  # -> (count, A)
        """Encoded actions drawn uniformly, whatever the state."""
        width, device = self.space.encoded_size, generator.device
        if self.space.kind != "discrete":
            return 2.0 * torch.rand(count, width, generator=generator, device=device) - 1.0
        uniform = MultiCategorical(
            torch.zeros(count, width, device=device), self.space.classes, 1.0
        )
        return uniform.sample(self.noise((count,), generator))

    def to_env(self, action: Tensor) -> Tensor:
        """Encoded actions (N, A) -> what the environment takes (N, *shape)."""
        if self.space.kind != "discrete":
            return action
        if len(self.space.classes) == 1:
            return action.argmax(-1).reshape(-1, *self.space.shape).to(torch.int32)
        parts = [part.argmax(-1) for part in action.split(self.space.classes, -1)]
        return torch.stack(parts, -1).reshape(-1, *self.space.shape).to(torch.int32)


class Critic(nn.Module):
    """Two-hot value head and its slowly following copy."""

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
        super().__init__()
        self.slow_rate, self.slow_every = slow_rate, slow_every
        self.net = Head(feat_size, bins, units=units, layers=layers, outscale=outscale)
        self.slow = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("bins", ops.symexp_bins(bins), persistent=False)

    def forward(self, features: Tensor) -> Tensor:  # (..., F) -> (..., V)
        return self.net(features)

    def mean(self, logits: Tensor) -> Tensor:  # (..., V) -> (...)
        return ops.twohot_mean(logits, self.bins)

    @torch.no_grad()
    def slow_mean(self, features: Tensor) -> Tensor:  # (..., F) -> (...)
        return self.slow.mean(features, self.bins)

    @torch.no_grad()
    def follow(self, updates: Tensor, finite: Tensor) -> None:  # () int64, () bool
        """Move the slow copy where that is due; `finite` False leaves it."""
        if self.slow_every > 1:
            finite = finite & (updates % self.slow_every == 0)
        ops.ema_(list(self.slow.parameters()), list(self.net.parameters()), self.slow_rate, finite)

    def copies(self, params: Sequence[nn.Parameter]) -> ops.Copies:
        """`follow` as what an optimizer of `params` writes along; none if not due at every step."""
        if self.slow_every > 1:
            return ops.Copies()
        slow = dict(zip(self.net.parameters(), self.slow.parameters(), strict=True))
        return ops.Copies([slow.get(p) for p in params], self.slow_rate)


class ReturnNorm(nn.Module):
    """Running range between two percentiles of the returns; the scale is at least `limit`."""

    def __init__(self, *, rate: float, limit: float, low: float, high: float) -> None:
        super().__init__()
        self.rate, self.limit = rate, limit
        self.register_buffer("range", torch.zeros(2))
        self.register_buffer("quantiles", torch.tensor([low, high]) / 100.0, persistent=False)

    def moved(self, returns: Tensor) -> Tensor:
        """The range (2,) after seeing `returns`; the state itself does not change."""
        seen = torch.quantile(returns.detach().float().flatten(), self.quantiles)
        return (1.0 - self.rate) * self.range + self.rate * seen

    def scale(self, limits: Tensor) -> Tensor:  # (2,) -> ()
        return (limits[1] - limits[0]).clamp(min=self.limit)

    @torch.no_grad()
    def commit(self, limits: Tensor, finite: Tensor) -> None:
        self.range.copy_(torch.where(finite, limits, self.range))


class ImagOut(NamedTuple):
    """policy, value: losses (N, I). returns, advantage (N, I); weight, mean (N, I+1).

    mean: the critic's value of every state.
    """

    policy: Tensor
    value: Tensor
    mean: Tensor
    returns: Tensor
    advantage: Tensor
    weight: Tensor


def imag_loss(
    policy: Policy,  # over (N, I+1)
    action: Tensor,  # (N, I+1, A)
    reward: Tensor,  # (N, I+1)
    cont: Tensor,  # (N, I+1) probability of going on
    value_logits: Tensor | ops.LinearLogits,  # (N, I+1, V)
    slow_value: Tensor,  # (N, I+1)
    bins: Tensor,  # (V,)
    scale_of,  # returns (N, I) -> scale ()
    *,
    discount: float,
    lam: float,
    actent: float,
    slow_reg: float,
) -> ImagOut:
    """Reinforce with normalised advantages, and the critic's two-hot losses.

    R_t = r_{t+1} + d c_{t+1} ((1 - lam) v_{t+1} + lam R_{t+1}); weights are the cumulated chances
    that state t is reached, w_0 = c_0. Gradients reach `policy` and `value_logits` only.
    """
    with torch.no_grad():
        mean = ops.twohot_mean(value_logits, bins)
        returns = ops.lambda_return(reward, mean, cont * discount, lam)
        weight = torch.cumprod(cont * discount, 1) / discount
        advantage = (returns - mean[:, :-1]) / scale_of(returns)
    score = policy.log_prob(action)[:, :-1] * advantage + actent * policy.entropy()[:, :-1]
    value_loss = critic_loss(value_logits, returns, slow_value, bins, slow_reg)
    return ImagOut(
        -weight[:, :-1] * score, weight[:, :-1] * value_loss, mean, returns, advantage, weight
    )


def critic_loss(
    logits: Tensor | ops.LinearLogits,  # (N, L, V)
    returns: Tensor,  # (N, L-1)
    slow_value: Tensor,  # (N, L)
    bins: Tensor,  # (V,)
    slow_reg: float,
) -> Tensor:  # (N, L-1)
    """Two-hot loss towards the returns and, weighted, towards the slow critic's mean.

    The last row has no return. It is computed with the others and dropped: cutting the logits
    instead would copy them, here and in the backward pass.
    """
    targets = (F.pad(returns, (0, 1)), slow_value)
    return ops.twohot_loss(logits, targets, bins, (1.0, slow_reg))[:, :-1]


def repl_loss(
    reward: Tensor,  # (B, T)
    is_last: Tensor,  # (B, T)
    is_terminal: Tensor,  # (B, T)
    boot: Tensor,  # (B, T) imagined return from each state
    value_logits: Tensor | ops.LinearLogits,  # (B, T, V)
    slow_value: Tensor,  # (B, T)
    bins: Tensor,  # (V,)
    *,
    discount: float,
    lam: float,
    slow_reg: float,
) -> Tensor:  # (B, T-1)
    """The critic's loss on replayed rewards, bootstrapped from imagined returns.

    A truncated episode bootstraps from its last state; a terminal one does not.
    """
    live = (1.0 - is_terminal.float()) * discount
    going = 1.0 - is_last.float()
    returns = ops.lambda_return(reward, boot, live, going * lam)
    return going[:, :-1] * critic_loss(value_logits, returns, slow_value, bins, slow_reg)
