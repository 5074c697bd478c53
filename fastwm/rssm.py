"""The recurrent state-space model: parameters around the ops of fastwm.ops.rssm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastwm import ops
from fastwm.nets import BlockLinear, BlockNormLinear, Linear, NormLinear
from fastwm.ops.rssm import packed_posterior


def stack(in_features: int, units: int, layers: int) -> nn.ModuleList:
    sizes = [in_features] + [units] * layers
    return nn.ModuleList(NormLinear(i, o) for i, o in zip(sizes, sizes[1:], strict=False))


class RSSM(nn.Module):
    """Deterministic state (D) from a block-diagonal GRU, stochastic state of S categoricals (K).

    Attributes: feat_size = D + S*K. States start at zero. Source: arXiv:2301.04104, 2024 code.
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
        blocks: int,
        dynlayers: int,
        obslayers: int,
        imglayers: int,
        unimix: float,
    ) -> None:
        super().__init__()
        self.deter, self.stoch, self.classes, self.unimix = deter, stoch, classes, unimix
        self.latent_size = stoch * classes
        self.feat_size = deter + self.latent_size
        self.deter_in = NormLinear(deter, hidden)
        self.stoch_in = NormLinear(self.latent_size, hidden)
        self.action_in = NormLinear(action, hidden)
        # Every block reads its own slice of deter and all three projections.
        first = deter + 3 * hidden * blocks
        self.hidden = nn.ModuleList(
            BlockNormLinear(first if i == 0 else deter, deter, blocks) for i in range(dynlayers)
        )
        self.gru = BlockLinear(deter, 3 * deter, blocks)
        self.post = stack(deter + tokens, hidden, obslayers)
        self.post_logit = Linear(hidden, self.latent_size)
        self.prior = stack(deter, hidden, imglayers)
        self.prior_logit = Linear(hidden, self.latent_size)
        self._packed, self._packed_from = None, None

    def weights(self) -> ops.RSSMWeights:
        """The parameters as the ops take them."""
        return ops.RSSMWeights(
            deter_in=self.deter_in.tensors(),
            stoch_in=self.stoch_in.tensors(),
            action_in=self.action_in.tensors(),
            hidden=tuple(layer.tensors() for layer in self.hidden),
            gru=(self.gru.weight, self.gru.bias),
            post=tuple(layer.tensors() for layer in self.post),
            post_logit=(self.post_logit.weight, self.post_logit.bias),
            prior=tuple(layer.tensors() for layer in self.prior),
            prior_logit=(self.prior_logit.weight, self.prior_logit.bias),
        )

    def initial(self, batch: int) -> tuple[Tensor, Tensor]:  # (B, D), (B, S, K)
        new = self.gru.bias.new_zeros
        return new(batch, self.deter), new(batch, self.stoch, self.classes)

    def one_hot(self, index: Tensor) -> Tensor:  # (..., S) -> (..., S, K)
        hot = nn.functional.one_hot(index.long(), self.classes)
        return hot.to(self.gru.bias.dtype)

    def observe(
        self,
        deter: Tensor,  # (B, D)
        stoch: Tensor,  # (B, S, K)
        tokens: Tensor,  # (B, T, E)
        prev_action: Tensor,  # (B, T, A)
        is_first: Tensor,  # (B, T) bool
        noise: Tensor | None,  # (B, T, S) uniform, None for the mode
    ) -> tuple[Tensor, Tensor, Tensor]:  # deter (B,T,D), logits (B,T,S,K), stoch (B,T,S,K)
        """Posterior over a sequence; gradients flow through sampling by straight-through."""
        return ops.rssm_observe(
            self.weights(), deter, stoch, tokens.float(), prev_action, is_first, noise, self.unimix
        )

    @torch.no_grad()
    def step(
        self,
        deter: Tensor,  # (N, D)
        stoch: Tensor,  # (N, S, K)
        tokens: Tensor,  # (N, E)
        prev_action: Tensor,  # (N, A)
        is_first: Tensor,  # (N,) bool
        noise: Tensor | None,  # (N, S) uniform, None for the mode
    ) -> tuple[Tensor, Tensor]:  # (N, D), (N, S, K)
        """One step of `observe` without gradient, on packed weights where there is a kernel."""
        params = list(self.parameters())
        now = [ops.available(params[0]), params[0].data_ptr(), *(p._version for p in params)]
        if now != self._packed_from:  # a weight has changed
            self._packed = packed_posterior(self.weights(), self.stoch)
            self._packed_from = now
        if self._packed is not None and not torch.is_autocast_enabled(deter.device.type):
            args = (tokens.float(), prev_action, is_first, noise, self.unimix)
            return self._packed.step(deter, stoch, *args)
        rows = (x if x is None else x.unsqueeze(1) for x in (tokens, prev_action, is_first, noise))
        deter, _, stoch = self.observe(deter, stoch, *rows)
        return deter.squeeze(1), stoch.squeeze(1)

    def prior_logits(self, deter: Tensor) -> Tensor:  # (..., D) -> (..., S, K)
        return ops.rssm_prior(self.weights(), deter, self.stoch)

    @torch.no_grad()
    def imagine(
        self,
        deter: Tensor,  # (N, D)
        stoch: Tensor,  # (N, S, K)
        policy: Callable[[Tensor], Tensor],  # (N, F) -> (N, A)
        length: int,
        noise: Tensor | None,  # (I, N, S) uniform
    ) -> tuple[Tensor, Tensor]:  # (N, I+1, F), (N, I+1, A)
        """Roll the prior forward under a policy, without gradients; features as `feat` has them."""
        features = deter.new_empty(len(deter), length + 1, self.feat_size)
        steps = iter(features.unbind(1))
        *_, actions = ops.rssm_imagine(
            self.weights(),
            deter,
            stoch,
            lambda deter, stoch: policy(next(steps)),
            length,
            noise,
            self.unimix,
            out=self.split(features),
        )
        return features, actions

    def split(self, features: Tensor) -> tuple[Tensor, Tensor]:  # (..., F)
        """Views of deter (..., D) and stoch (..., S, K)."""
        deter, stoch = features.split([self.deter, self.latent_size], -1)
        return deter, stoch.unflatten(-1, (self.stoch, self.classes))


def feat(deter: Tensor, stoch: Tensor) -> Tensor:  # (..., D), (..., S, K) -> (..., F)
    """What every head reads."""
    return torch.cat([deter, stoch.flatten(-2)], -1)
