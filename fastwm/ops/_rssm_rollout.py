"""Single steps of the RSSM without gradient: the rollout of imagination, and acting.

A rollout in float32 on the CPU packs the weights once and takes groups of rows through a whole step
while they are in cache (csrc/cpu/rssm.cpp). On CUDA the library's products and the kernels between
them are one call a step, in float32 or bfloat16 (csrc/rssm_library_step.h). Elsewhere the weights
are regrouped once: the three branches that all blocks share become one product instead of a
concatenation per block, and products go to the library in the dtype that autocast asks for (on a
CPU only if bfloat16 pays there, see fastwm/ops/_products.py). A single step reads every weight once
anyway, so it takes them as they are. Everything but the products is float32.
"""

import torch
from torch import Tensor

from fastwm.ops._backend import available, raw, register_fake
from fastwm.ops._products import low_pays
from fastwm.ops._rssm_fused import wants_low
from fastwm.ops._rssm_sequence import flatten, gru_gates
from fastwm.ops.latent import latent_sample, straight_through
from fastwm.ops.norm import rms_silu


class Stepper:
    """Steps with fixed weights. Use under `torch.no_grad()`; make a new one when they change."""

    def __init__(self, weights, head: str, rollout: bool):
        """head: "prior" or "post", the layers that `logits` runs. rollout: many steps follow."""
        units, deter = weights.deter_in[0].shape
        self.blocks = weights.gru[0].shape[0]
        self.low = _product_dtype(weights.deter_in[0]) if rollout else None
        block = deter // self.blocks
        first, self.hidden_bias, scale = weights.hidden[0]
        self.shared = None
        self.own = [self._as(w) for w in (first[:, :block] if rollout else first)]
        if rollout:
            shared = first[:, block:].transpose(0, 1).reshape(3 * units, deter)
            self.shared = self._as(shared)
        self.scales = [scale] + [layer[2] for layer in weights.hidden[1:]]
        self.hidden = [(list(map(self._as, w)), b) for w, b, _ in weights.hidden[1:]]
        self.gru, self.gru_bias = [self._as(w) for w in weights.gru[0]], weights.gru[1]
        self.inputs = [weights.deter_in, weights.stoch_in, weights.action_in]
        self.input_weights = [self._as(layer[0]).t() for layer in self.inputs]
        layers, (weight, self.logit_bias) = (
            (weights.prior, weights.prior_logit) if head == "prior"
            else (weights.post, weights.post_logit))  # fmt: skip
        self.head = [(self._as(w).t(), b, s) for w, b, s in layers]
        self.logit = self._as(weight).t()

    def _as(self, weight: Tensor) -> Tensor:
        return weight if self.low is None else weight.to(self.low)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.low is None:
            return torch.addmm(bias, x, weight)
        return (x.to(self.low) @ weight).float() + bias

    def _blocks(self, x: Tensor, weights: list[Tensor], add: Tensor | None) -> Tensor:
        """Block by block into one (N, G*out) result, on top of `add` where given."""
        width = weights[0].shape[1]
        if self.low is not None:
            parts = x.to(self.low).unflatten(-1, (self.blocks, -1)).unbind(1)
            out = torch.cat([p @ w for p, w in zip(parts, weights, strict=True)], 1).float()
            return out if add is None else add + out
        out = x.new_empty(len(x), width * self.blocks) if add is None else add
        for part, weight, to in zip(
            x.chunk(self.blocks, 1), weights, out.split(width, 1), strict=True
        ):
            if add is None:
                torch.mm(part, weight, out=to)
            else:
                to.addmm_(part, weight)
        return out

    def _first(self, deter: Tensor, branches: Tensor) -> Tensor:
        """The first hidden layer before its norm."""
        if self.shared is not None:
            return self._blocks(deter, self.own, self._product(branches, self.shared,
                                                               self.hidden_bias))  # fmt: skip
        parts = [torch.cat([x, branches], 1) for x in deter.chunk(self.blocks, 1)]
        return self._blocks(torch.cat(parts, 1), self.own, None) + self.hidden_bias

    def core(self, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
        """(N, D), (N, S*K), (N, A) -> (N, D)."""
        action = action / action.abs().clamp_(min=1)
        branches = [
            rms_silu(self._product(x, weight, bias), scale)
            for x, weight, (_, bias, scale) in zip(
                (deter, stoch, action), self.input_weights, self.inputs, strict=True
            )
        ]
        hidden = rms_silu(self._first(deter, torch.cat(branches, 1)), self.scales[0])
        for (weights, bias), scale in zip(self.hidden, self.scales[1:], strict=True):
            hidden = rms_silu(self._blocks(hidden, weights, None) + bias, scale)
        gates = self._blocks(hidden, self.gru, None)
        if available(gates, "gru_gates") and gates.dtype == torch.float32:
            return raw.gru_gates(gates, self.gru_bias, deter, self.blocks)
        return gru_gates(gates + self.gru_bias, deter, self.blocks)

    def logits(self, x: Tensor, groups: int) -> Tensor:
        """(N, D) of the prior, (N, D+E) of the posterior -> (N, S, K)."""
        for weight, bias, scale in self.head:
            x = rms_silu(self._product(x, weight, bias), scale)
        return self._product(x, self.logit, self.logit_bias).unflatten(-1, (groups, -1))


def _product_dtype(weight: Tensor) -> torch.dtype | None:
    """What autocast asks for, but on a CPU only what it multiplies faster than float32."""
    kind = weight.device.type
    if weight.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return None
    dtype = torch.get_autocast_dtype(kind)
    return None if kind == "cpu" and not (dtype == torch.bfloat16 and low_pays()) else dtype


def sample(logits: Tensor, noise: Tensor | None, unimix: float) -> Tensor:
    """One-hot (N, S, K) without gradient."""
    index, _ = latent_sample(logits, noise, unimix)
    return straight_through(index, logits, unimix)


def observe_one(weights, deter, stoch, tokens, prev_action, is_first, noise, unimix):
    """`rssm_observe` of T = 1 without gradient: the acting path."""
    stepper = Stepper(weights, "post", rollout=False)
    groups = stoch.shape[1]
    deter = deter.masked_fill(is_first, 0.0)
    stoch = stoch.flatten(1).masked_fill(is_first, 0.0)
    deter = stepper.core(deter, stoch, prev_action[:, 0].masked_fill(is_first, 0.0))
    logits = stepper.logits(torch.cat([deter, tokens[:, 0]], 1), groups)
    stoch = sample(logits, None if noise is None else noise[:, 0], unimix)
    return deter.unsqueeze(1), logits.unsqueeze(1), stoch.unsqueeze(1)


class PackedPosterior:
    """Posterior steps without gradient, many of them with the same weights: acting.

    The compiled step on the CPU, on weights that were packed once. None of it sees later changes of
    the weights: make a new one.
    """

    def __init__(self, weights, groups: int):
        self.weights, self.hidden = [x.detach() for x in flatten(weights)], len(weights.hidden)
        self.packed = raw.rssm_pack(self.weights, self.hidden, groups, False)
        self.groups = groups
        weight, self.bias, _ = weights.post[0]
        self.from_tokens = weight.detach()[:, weights.deter_in[0].shape[1] :].t()

    def step(self, deter, stoch, tokens, prev_action, is_first, noise, unimix):
        """As `rssm_observe` without its time axis: deter (N, D), stoch (N, S, K)."""
        tokens = torch.addmm(self.bias.detach(), tokens, self.from_tokens)
        return self.advance(deter, stoch, tokens, prev_action, is_first, noise, unimix)

    def advance(self, deter, stoch, product, prev_action, is_first, noise, unimix):
        """`step` where the first layer's product with the tokens, its bias inside, is known."""
        if is_first.any():
            first = is_first[:, None]
            deter, prev_action = deter.masked_fill(first, 0.0), prev_action.masked_fill(first, 0.0)
            stoch = stoch.masked_fill(first[:, :, None], 0.0)
        deters, stochs = torch.stack((deter, deter), 1), torch.stack((stoch, stoch), 1)
        raw.rssm_step_(self.packed, self.weights, self.hidden, deters, stochs, prev_action, product,
                       noise, 0, unimix)  # fmt: skip
        return deters[:, 1], stochs[:, 1]


def packed_posterior(weights, groups: int) -> PackedPosterior | None:
    """None where the compiled step does not run; then `rssm_observe` with T = 1 is the step."""
    like = weights.deter_in[0]
    fits = available(like, "rssm_step_") and like.dtype == torch.float32 and not like.is_cuda
    return PackedPosterior(weights, groups) if fits and _product_dtype(like) is None else None


class LibraryRollout:
    """Steps through trajectories (N, I+1, …) with the library's products."""

    def __init__(self, weights, deters: Tensor, stochs: Tensor, unimix: float):
        self.stepper = Stepper(weights, "prior", rollout=True)
        self.deters, self.stochs, self.unimix = deters, stochs, unimix

    def step(self, t: int, action: Tensor, noise: Tensor | None) -> None:
        """Writes state t + 1 from state t."""
        stoch = self.stochs[:, t]
        deter = self.stepper.core(self.deters[:, t], stoch.flatten(1), action)
        logits = self.stepper.logits(deter, stoch.shape[1])
        self.deters[:, t + 1] = deter
        self.stochs[:, t + 1] = sample(logits, noise, self.unimix)


class FusedRollout:
    """The same by the compiled step: a group of rows goes through all layers in cache."""

    def __init__(self, weights, deters: Tensor, stochs: Tensor, unimix: float):
        heads = weights._replace(post=weights.prior, post_logit=weights.prior_logit)
        self.weights, self.hidden = [x.detach() for x in flatten(heads)], len(weights.hidden)
        low = wants_low(deters)
        self.packed = raw.rssm_pack(self.weights, self.hidden, stochs.shape[2], low)
        self.deters, self.stochs, self.unimix = deters, stochs, unimix

    def step(self, t: int, action: Tensor, noise: Tensor | None) -> None:
        raw.rssm_step_(self.packed, self.weights, self.hidden, self.deters, self.stochs, action,
                       None, noise, t, self.unimix)  # fmt: skip


def _rollout(weights, *args):
    """The compiled step, unless autocast asks for a precision that it does not have."""
    like = weights.deter_in[0]
    fused = available(like, "rssm_step_") and like.dtype == torch.float32
    fused = fused and (_product_dtype(like) is None or wants_low(like))
    return (FusedRollout if fused else LibraryRollout)(weights, *args)


def imagine(weights, deter, stoch, policy, length, noise, unimix, out):
    """`rssm_imagine` on checked inputs."""
    count, groups, classes = stoch.shape
    if out is None:
        deters = deter.new_empty(count, length + 1, deter.shape[1])
        out = deters, deter.new_empty(count, length + 1, groups, classes)
    deters, stochs = out
    deters[:, 0], stochs[:, 0] = deter, stoch
    action = policy(deters[:, 0], stochs[:, 0])
    actions = action.new_empty(count, length + 1, action.shape[1])
    actions[:, 0] = action
    rollout = _rollout(weights, deters, stochs, unimix)
    for t in range(length):
        with torch.autocast(deter.device.type, enabled=False):
            rollout.step(t, action.to(deter.dtype), None if noise is None else noise[t])
        action = policy(deters[:, t + 1], stochs[:, t + 1])
        actions[:, t + 1] = action
    return deters, stochs, actions


@register_fake("rssm_pack")
def _(weights, hidden, groups, low):
    (units, deter), (blocks, block) = weights[0].shape, weights[9 + 3 * hidden].shape[:2]
    width, actions = weights[3].shape[1], weights[6].shape[1]
    post = (len(weights) - 13 - 3 * hidden) // 3

    def panels(count, out, depth):
        return count * ((out + 31) // 32 * 32) * depth + 16

    if weights[0].is_cuda:  # every weight that a step multiplies with, and nothing else
        size = 4 * units * deter + (3 + hidden) * deter * block + 2 * width * units
        size += units * deter + (post - 1) * units * units
        return weights[0].new_empty(size, dtype=torch.bfloat16 if low else None)
    size = panels(blocks, block, block + 3 * units) + (hidden - 1) * panels(blocks, block, block)
    size += panels(3 * blocks, block, block) + panels(2, units, deter)
    size += (post - 1) * panels(1, units, units) + panels(1, width, units)
    return weights[0].new_empty(size + (width + actions) * units + 64)


@register_fake("rssm_step_")
def _(packed, weights, hidden, deters, stochs, action, tokens, noise, t, unimix):
    return None


@register_fake("gru_gates")
def _(gates, bias, deter, blocks):
    return torch.empty_like(deter, memory_format=torch.contiguous_format)
