"""The recurrent state-space model of 2023: dense GRU, learned initial state, two kinds of latents.

One step::

    x      = silu(layernorm(Linear([stoch, action])))
    deter' = GRU(x, deter)                                # fastwm.ops.gru_step_layernorm
    prior  = Linear(silu(layernorm(Linear(deter'))))
    post   = Linear(silu(layernorm(Linear([deter', tokens]))))

At the start of an episode deter is tanh of a parameter and stoch the prior's mode there. Source:
arXiv:2301.04104, first version.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastwm import ops
from fastwm.nets_2023 import MLP, LayerNormLinear, Output, init_hidden_
from fastwm.ops._rssm_layernorm import gates
from fastwm.rssm import feat


class Categorical:
    """S one-hot variables of K classes. Statistics are raw logits (..., S, K)."""

    def __init__(self, stoch: int, classes: int, unimix: float) -> None:
        self.shape, self.unimix = (stoch, classes), unimix
        self.outputs = stoch * classes

    def stats(self, x: Tensor) -> Tensor:  # (..., S*K) -> (..., S, K)
        return x.unflatten(-1, self.shape)

    def sample(self, stats: Tensor, noise: Tensor | None) -> Tensor:  # noise (..., S) uniform
        """Straight-through one-hot (..., S, K); the mode without noise."""
        index, _ = ops.latent_sample(stats.detach(), noise, self.unimix)
        return ops.straight_through(index, stats, self.unimix)

    def kl(self, post: Tensor, prior: Tensor, free_nats: float) -> tuple[Tensor, ...]:
        """dyn, rep, entropy of post and of prior: see ops.kl_balance."""
        return ops.kl_balance(post, prior, self.unimix, free_nats)


class Gaussian:
    """S normal variables, K = 1. Statistics (..., S, 2) are mean and standard deviation."""

    STDS = {
        "sigmoid2": lambda x: 2.0 * torch.sigmoid(x / 2.0),
        "softplus": F.softplus,
        "sigmoid": torch.sigmoid,
        "abs": lambda x: (x + 1.0).abs(),
    }

    def __init__(self, stoch: int, mean: str, std: str, min_std: float) -> None:
        self.shape, self.outputs = (stoch, 1), 2 * stoch
        self.tanh5, self.std, self.min_std = mean == "tanh5", self.STDS[std], min_std

    def stats(self, x: Tensor) -> Tensor:  # (..., 2S) -> (..., S, 2)
        mean, std = x.chunk(2, -1)
        if self.tanh5:
            mean = 5.0 * torch.tanh(mean / 5.0)
        return torch.stack([mean, self.std(std) + self.min_std], -1)

    def sample(self, stats: Tensor, noise: Tensor | None) -> Tensor:  # noise (..., S) uniform
        """Reparametrised (..., S, 1); the mean without noise. The inverse CDF gives the value."""
        mean, std = stats.unbind(-1)
        if noise is not None:
            tiny = 2.0**-24  # the smallest step of uniform numbers: the ends have no value
            mean = mean + std * torch.special.ndtri(noise.clamp(tiny, 1.0 - tiny))
        return mean.unsqueeze(-1)

    def kl(self, post: Tensor, prior: Tensor, free_nats: float) -> tuple[Tensor, ...]:
        """dyn, rep, entropy of post and of prior, summed over S; the meaning of ops.kl_balance."""

        def divergence(p: Tensor, q: Tensor) -> Tensor:
            (mean, std), (mean_q, std_q) = p.unbind(-1), q.unbind(-1)
            ratio = (std / std_q).square()
            distance = ((mean - mean_q) / std_q).square()
            total = (0.5 * (ratio + distance - 1.0 - ratio.log())).sum(-1)
            return torch.where(total < free_nats, free_nats, total)

        def entropy(p: Tensor) -> Tensor:
            return torch.distributions.Normal(*p.detach().unbind(-1)).entropy().sum(-1)

        dyn, rep = divergence(post.detach(), prior), divergence(post, prior.detach())
        return dyn, rep, entropy(post), entropy(prior)


class RSSM(nn.Module):
    """Deterministic state (D) from a dense GRU, stochastic state (S, K), K = 1 for normal latents.

    Attributes: feat_size = D + S*K. latent: what the stochastic state is drawn from.
    """

    def __init__(
        self,
        tokens: int,  # E
        action: int,  # A
        *,
        deter: int,
        hidden: int,
        stoch: int,
        classes: int,
        latent: str,
        mean: str,
        std: str,
        min_std: float,
        obslayers: int,
        imglayers: int,
        unimix: float,
        initial: str,
    ) -> None:
        super().__init__()
        self.deter, self.stoch, self.learned = deter, stoch, initial == "learned"
        categorical = latent == "onehot"
        self.latent = (
            Categorical(stoch, classes, unimix)
            if categorical
            else Gaussian(stoch, mean, std, min_std)
        )
        self.classes = self.latent.shape[1]
        self.latent_size = stoch * self.classes
        self.feat_size = deter + self.latent_size
        self.start = nn.Parameter(torch.zeros(deter), requires_grad=self.learned)
        self.inputs = LayerNormLinear(self.latent_size + action, hidden)
        self.cell = nn.Parameter(torch.empty(3 * deter, hidden + deter))
        self.cell_scale = nn.Parameter(torch.ones(3 * deter))
        self.cell_shift = nn.Parameter(torch.zeros(3 * deter))
        init_hidden_(self.cell, hidden + deter, 3 * deter)
        self.post = MLP(deter + tokens, hidden, obslayers)
        self.post_stats = Output(hidden, self.latent.outputs)
        self.prior = MLP(deter, hidden, imglayers)
        self.prior_stats = Output(hidden, self.latent.outputs)

    def initial(self, batch: int) -> tuple[Tensor, Tensor]:  # (B, D), (B, S, K)
        """The learned start, or zeros."""
        deter = torch.tanh(self.start).expand(batch, -1)
        if not self.learned:
            return deter, deter.new_zeros(batch, *self.latent.shape)
        stoch = self.latent.sample(self.prior_logits(deter[:1]), None)
        return deter, stoch.expand(batch, -1, -1)

    def prior_logits(self, deter: Tensor) -> Tensor:  # (..., D) -> statistics (..., S, K or 2)
        return self._stats(self.prior_stats, self.prior(deter))

    def _stats(self, layer: Output, x: Tensor) -> Tensor:
        return self.latent.stats(layer(x).to(self.start.dtype))  # float32 under autocast too

    def core(self, x: Tensor, deter: Tensor) -> Tensor:  # (B, U), (B, D) -> (B, D)
        parts = F.linear(torch.cat([x, deter], -1), self.cell)
        return gates(parts, self.cell_scale, self.cell_shift, deter)

    def observe(
        self,
        deter: Tensor,  # (B, D)
        stoch: Tensor,  # (B, S, K)
        tokens: Tensor,  # (B, T, E)
        prev_action: Tensor,  # (B, T, A)
        is_first: Tensor,  # (B, T) bool
        noise: Tensor | None,  # (B, T, S) uniform, None for the mode
    ) -> tuple[Tensor, Tensor, Tensor]:  # deter (B,T,D), statistics (B,T,S,.), stoch (B,T,S,K)
        """Posterior over a sequence, differentiable throughout.

        Out of the loop: what actions and tokens add to the first layers, and the prior.
        """
        first = is_first.unsqueeze(-1)
        width, (layer, *deeper) = self.latent_size, self.post
        from_stoch, from_action = self.inputs.weight[:, :width], self.inputs.weight[:, width:]
        action_part = F.linear(prev_action.masked_fill(first, 0.0), from_action)
        from_deter = layer.weight[:, : self.deter]
        token_part = F.linear(tokens, layer.weight[:, self.deter :])
        start_deter, start_stoch = self.initial(len(is_first))
        out = []
        for t in range(is_first.shape[1]):
            deter = torch.where(first[:, t], start_deter, deter)
            stoch = torch.where(first[:, t, :, None], start_stoch, stoch)
            x = F.linear(stoch.flatten(-2), from_stoch) + action_part[:, t]
            deter = self.core(self.inputs.activate(x), deter)
            x = layer.activate(F.linear(deter, from_deter) + token_part[:, t])
            for hidden in deeper:
                x = hidden(x)
            stats = self._stats(self.post_stats, x)
            stoch = self.latent.sample(stats, None if noise is None else noise[:, t])
            out.append((deter, stats, stoch))
        return tuple(torch.stack(x, 1) for x in zip(*out, strict=True))

    def step(
        self,
        deter: Tensor,  # (N, D)
        stoch: Tensor,  # (N, S, K)
        tokens: Tensor,  # (N, E)
        prev_action: Tensor,  # (N, A)
        is_first: Tensor,  # (N,) bool
        noise: Tensor | None,  # (N, S) uniform, None for the mode
    ) -> tuple[Tensor, Tensor]:  # (N, D), (N, S, K)
        """One step of `observe`, for acting."""
        rows = (x if x is None else x.unsqueeze(1) for x in (tokens, prev_action, is_first, noise))
        deter, _, stoch = self.observe(deter, stoch, *rows)
        return deter.squeeze(1), stoch.squeeze(1)

    def imagine(
        self,
        deter: Tensor,  # (N, D)
        stoch: Tensor,  # (N, S, K)
        policy: Callable[[Tensor], Tensor],  # (N, F) -> (N, A)
        length: int,
        noise: Tensor | None,  # (I, N, S) uniform
    ) -> tuple[Tensor, Tensor]:  # (N, I+1, F), (N, I+1, A)
        """Roll the prior forward under a policy, differentiable from states to earlier actions.

        The policy reads detached features: its gradient comes through the actions alone.
        """
        features = [feat(deter, stoch)]
        actions = [policy(features[0].detach())]
        for step in range(length):
            x = self.inputs(torch.cat([stoch.flatten(-2), actions[-1]], -1))
            deter = self.core(x, deter)
            stats = self.prior_logits(deter)
            stoch = self.latent.sample(stats, None if noise is None else noise[step])
            features.append(feat(deter, stoch))
            actions.append(policy(features[-1].detach()))
        return torch.stack(features, 1), torch.stack(actions, 1)

    def split(self, features: Tensor) -> tuple[Tensor, Tensor]:  # (..., F)
        """Views of deter (..., D) and stoch (..., S, K)."""
        deter, stoch = features.split([self.deter, self.latent_size], -1)
        return deter, stoch.unflatten(-1, self.latent.shape)
