"""The posterior sequence as one autograd node, with everything that can leave the time loop.

Out of the loop, exactly: the token part of the posterior, the action branch up to its share of
the hidden layer, all weight gradients and all input gradients, each one product over B*T rows.
In the loop stays what depends on the previous state. The loop itself is a pair of functions
(`scan`, `scan_backward`), here in PyTorch operations for any device and dtype; the compiled
pair of `fastwm.ops._rssm_fused` has the same interface.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastwm.ops._backend import wants_grad
from fastwm.ops._products import times
from fastwm.ops.latent import latent_sample_ref

EPS = 1e-4


class Weights(NamedTuple):
    """What the posterior sequence reads of RSSMWeights, regrouped. d is D/G."""

    deter_in: tuple
    stoch_in: tuple
    action_in: tuple
    hidden: tuple
    gru: tuple
    post: tuple
    post_logit: tuple

    @property
    def units(self) -> int:
        return self.deter_in[0].shape[0]

    @property
    def deter(self) -> int:
        return self.deter_in[0].shape[1]

    @property
    def blocks(self) -> int:
        return self.gru[0].shape[0]

    def rows(self, first: int, last: int) -> Tensor:
        """Rows of the first hidden layer that all blocks share, as one matrix (last-first, D)."""
        part = self.hidden[0][0][:, first:last]
        return part.transpose(0, 1).reshape(last - first, self.deter)


class Scan(NamedTuple):
    """What the loop returns: the outputs and the activations its backward reads."""

    deter: Tensor  # (B, T, D)
    logits: Tensor  # (B, T, S*K)
    index: Tensor  # (B, T, S) integer
    inner: Tensor  # (B, T, 2U) deter and stoch branch before their norms
    hidden: tuple  # dynlayers x (B, T, D) before the norm
    gates: Tensor  # (B, T, 3D)
    post: tuple  # obslayers x (B, T, U) before the norm


class ScanGrad(NamedTuple):
    """What the backward loop returns: gradients of the same pre-activations, and activations."""

    deter: Tensor  # (B, D) of the initial state
    stoch: Tensor  # (B, S*K)
    logits: Tensor  # (B, T, S*K) total
    inner: Tensor  # (B, T, 2U)
    hidden: tuple
    gates: Tensor
    post: tuple
    scales: tuple  # deter_in, stoch_in, hidden..., post...
    act_inner: Tensor  # (B, T, 2U) after norm and silu
    act_hidden: tuple
    act_post: tuple


def flatten(weights) -> list[Tensor]:
    """The tensors of the sequence in a fixed order; `unflatten` is the inverse."""
    layers = [weights.deter_in, weights.stoch_in, weights.action_in, *weights.hidden, weights.gru]
    return [x for layer in [*layers, *weights.post, weights.post_logit] for x in layer]


def unflatten(tensors, dynlayers: int) -> Weights:
    triples = [tuple(tensors[i : i + 3]) for i in range(0, 9 + 3 * dynlayers, 3)]
    rest = tensors[9 + 3 * dynlayers :]
    post = tuple(tuple(rest[i : i + 3]) for i in range(2, len(rest) - 2, 3))
    return Weights(*triples[:3], tuple(triples[3:]), tuple(rest[:2]), post, tuple(rest[-2:]))


def activate(x: Tensor, scale: Tensor) -> Tensor:
    return F.silu(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * scale)


def activate_backward(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `activate` with respect to x and scale (summed over the leading axes)."""
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    normed = x * rstd
    gate = torch.sigmoid(normed * scale)
    grad = grad * gate * (1 + normed * scale * (1 - gate))
    grad_scale = (grad * normed).flatten(0, -2).sum(0)
    grad = grad * scale
    return rstd * (grad - normed * (grad * normed).mean(-1, keepdim=True)), grad_scale


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in the dtype of a; autocast decides what the product itself reads."""
    return times(a, b).to(a.dtype)


def hoisted(like: Tensor, low: bool):
    """Around the products outside of the loop: in bfloat16 if `low`, else as they come."""
    return torch.autocast(like.device.type, torch.bfloat16, enabled=low)


def blocks_times(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, G*in) times weight (G, in, out) -> (B, G*out), block by block."""
    out = torch.bmm(x.unflatten(-1, (len(weight), -1)).transpose(0, 1), weight)
    return out.transpose(0, 1).flatten(1)


def scan(weights, deter, stoch, action_part, token_part, is_first, noise, unimix, groups,
         save=True):  # fmt: skip
    """The forward loop. action_part (B, T, D), token_part (B, T, U), biases inside -> Scan."""
    units, classes = weights.units, stoch.shape[-1] // groups
    block = weights.deter // weights.blocks
    both = torch.cat([weights.post[0][0][:, : weights.deter], weights.deter_in[0]]).t()
    from_deter = weights.hidden[0][0][:, :block]
    from_inner = weights.rows(block, block + 2 * units)
    steps = []
    raw = deter @ both[:, units:]
    for t in range(is_first.shape[1]):
        first = is_first[:, t, None]
        deter = torch.where(first, 0.0, deter)
        stoch = torch.where(first, 0.0, stoch)
        inner = [torch.where(first, 0.0, raw) + weights.deter_in[1]]
        inner.append(F.linear(stoch, *weights.stoch_in[:2]))
        x = [activate(inner[0], weights.deter_in[2]), activate(inner[1], weights.stoch_in[2])]
        hidden = [action_part[:, t] + torch.cat(x, -1) @ from_inner]
        hidden[0] = hidden[0] + blocks_times(deter, from_deter)
        h = activate(hidden[0], weights.hidden[0][2])
        for weight, bias, scale in weights.hidden[1:]:
            hidden.append(blocks_times(h, weight) + bias)
            h = activate(hidden[-1], scale)
        gates = blocks_times(h, weights.gru[0]) + weights.gru[1]
        deter = gru_gates(gates, deter, weights.blocks)
        raw = deter @ both
        post, raw = [raw[:, :units] + token_part[:, t]], raw[:, units:]
        h = activate(post[0], weights.post[0][2])
        for weight, bias, scale in weights.post[1:]:
            post.append(F.linear(h, weight, bias))
            h = activate(post[-1], scale)
        logits = F.linear(h, *weights.post_logit)
        by_group = logits.unflatten(-1, (groups, classes))
        index, _ = latent_sample_ref(by_group, None if noise is None else noise[:, t], unimix)
        stoch = one_hot(index, classes, logits.dtype)
        steps.append((deter, logits, index, torch.cat(inner, -1), gates, *hidden, *post))
    out = [torch.stack(x, 1) for x in zip(*steps, strict=True)]
    count = len(weights.hidden)
    return Scan(*out[:4], tuple(out[5 : 5 + count]), out[4], tuple(out[5 + count :]))


def gru_gates(gates: Tensor, deter: Tensor, blocks: int) -> Tensor:
    reset, cand, update = gates.unflatten(-1, (blocks, 3, -1)).unbind(-2)
    update = torch.sigmoid(update - 1).flatten(-2)
    return update * torch.tanh(torch.sigmoid(reset) * cand).flatten(-2) + (1 - update) * deter


def gru_gates_backward(grad, gates, deter, blocks):
    """grad (B, D) of deter' -> gradient of the gates (B, 3D) and of deter (B, D)."""
    raw_reset, raw_cand, update = gates.unflatten(-1, (blocks, 3, -1)).unbind(-2)
    grad, deter = grad.unflatten(-1, (blocks, -1)), deter.unflatten(-1, (blocks, -1))
    reset, update = torch.sigmoid(raw_reset), torch.sigmoid(update - 1)
    cand = torch.tanh(reset * raw_cand)
    grad_cand = grad * update * (1 - cand * cand)
    grad_update = grad * (cand - deter) * update * (1 - update)
    grad_reset = grad_cand * raw_cand * reset * (1 - reset)
    parts = torch.stack([grad_reset, grad_cand * reset, grad_update], -2)
    return parts.flatten(1), (grad * (1 - update)).flatten(1)


def scan_backward(weights, saved: Scan, deter, is_first, unimix, groups, grads) -> ScanGrad:
    """The backward loop. grads: of deter (B, T, D), logits and stoch (B, T, S*K)."""
    units, block = weights.units, weights.deter // weights.blocks
    from_deter = weights.hidden[0][0][:, :block].transpose(1, 2)
    from_inner = weights.rows(block, block + 2 * units).t()
    post_deter = weights.post[0][0][:, : weights.deter]
    before = previous(deter, saved.deter, is_first)
    norms = [weights.deter_in, weights.stoch_in, *weights.hidden, *weights.post]
    scales = [torch.zeros_like(layer[2]) for layer in norms]
    count = len(weights.hidden)
    carry, carry_stoch = torch.zeros_like(deter), torch.zeros_like(saved.logits[:, 0])
    steps = []

    def through(grad, x, norm):
        grad, grad_scale = activate_backward(grad, x, norms[norm][2])
        scales[norm] += grad_scale
        return grad

    for t in reversed(range(is_first.shape[1])):
        probs = saved.logits[:, t].unflatten(-1, (groups, -1)).softmax(-1)
        grad = (carry_stoch + grads[2][:, t]).view_as(probs)
        grad = (1.0 - unimix) * probs * (grad - (probs * grad).sum(-1, keepdim=True))
        logits = grads[1][:, t] + grad.flatten(1)
        grad, post = logits @ weights.post_logit[0], []
        for i in reversed(range(len(weights.post))):
            post.insert(0, through(grad, saved.post[i][:, t], 2 + count + i))
            grad = post[0] @ (weights.post[i][0] if i else post_deter)
        grad = grad + carry + grads[0][:, t]
        gates, carry = gru_gates_backward(grad, saved.gates[:, t], before[:, t], weights.blocks)
        grad, hidden = blocks_times(gates, weights.gru[0].transpose(1, 2)), []
        for i in reversed(range(count)):
            hidden.insert(0, through(grad, saved.hidden[i][:, t], 2 + i))
            if i:
                grad = blocks_times(hidden[0], weights.hidden[i][0].transpose(1, 2))
        grad = hidden[0] @ from_inner
        inner = [
            through(grad[:, :units], saved.inner[:, t, :units], 0),
            through(grad[:, units:], saved.inner[:, t, units:], 1),
        ]
        carry = carry + blocks_times(hidden[0], from_deter) + inner[0] @ weights.deter_in[0]
        carry = torch.where(is_first[:, t, None], 0.0, carry)
        carry_stoch = torch.where(is_first[:, t, None], 0.0, inner[1] @ weights.stoch_in[0])
        steps.append((logits, torch.cat(inner, -1), gates, *hidden, *post))
    out = [torch.stack(x[::-1], 1) for x in zip(*steps, strict=True)]
    acts = [activate(saved.inner[..., :units], norms[0][2])]
    acts.append(activate(saved.inner[..., units:], norms[1][2]))
    return ScanGrad(
        carry, carry_stoch, out[0], out[1], tuple(out[3 : 3 + count]), out[2],
        tuple(out[3 + count :]), tuple(scales), torch.cat(acts, -1),
        tuple(activate(x, w[2]) for x, w in zip(saved.hidden, weights.hidden, strict=True)),
        tuple(activate(x, w[2]) for x, w in zip(saved.post, weights.post, strict=True)),
    )  # fmt: skip


def previous(start: Tensor, sequence: Tensor, is_first: Tensor) -> Tensor:
    """What every step of a sequence (B, T, X) starts from: one step earlier, zero at resets."""
    before = torch.cat([start.unsqueeze(1), sequence[:, :-1]], 1)
    return before.masked_fill_(is_first.unsqueeze(-1), 0.0)


def one_hot(index: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """index (…, S) -> (…, S*K)."""
    hot = torch.zeros(*index.shape, classes, dtype=dtype, device=index.device)
    return hot.scatter_(-1, index.long().unsqueeze(-1), 1.0).flatten(-2)


def bounded(action: Tensor, is_first: Tensor) -> tuple[Tensor, Tensor]:
    """The action a step sees (zero at resets, divided by max(1, |a|)) and that divisor."""
    action = action.masked_fill(is_first.unsqueeze(-1), 0.0)
    divisor = action.abs().clamp_(min=1)
    return action / divisor, divisor


def forward(weights, deter, stoch, tokens, prev_action, is_first, noise, unimix, scan=scan,
            save=True, low=False):  # fmt: skip
    """Hoisted products, then the loop -> Scan."""
    units, block = weights.units, weights.deter // weights.blocks
    action, _ = bounded(prev_action, is_first)
    rows = weights.rows(block + 2 * units, block + 3 * units)
    with hoisted(deter, low):
        branch = product(action, weights.action_in[0].t()) + weights.action_in[1]
        action_part = product(activate(branch, weights.action_in[2]), rows) + weights.hidden[0][1]
        token_part = product(tokens, weights.post[0][0][:, weights.deter :].t())
    return scan(
        weights, deter, stoch.flatten(1), action_part, token_part + weights.post[0][1], is_first,
        noise, unimix, stoch.shape[1], save=save,
    )  # fmt: skip


def outer(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of a dense weight (out, in) from (B, T, out) and (B, T, in)."""
    return product(grad.flatten(0, -2).t(), x.flatten(0, -2))


def outer_blocks(x: Tensor, grad: Tensor, blocks: int) -> Tensor:
    """Gradient of a block weight (G, in/G, out/G) from (B, T, in) and (B, T, out)."""
    x = x.flatten(0, -2).unflatten(-1, (blocks, -1)).permute(1, 2, 0)
    return product(x, grad.flatten(0, -2).unflatten(-1, (blocks, -1)).transpose(0, 1))


def total(grad: Tensor) -> Tensor:
    return grad.flatten(0, -2).sum(0)


def weight_gradients(weights, saved, loop, action, before, before_stoch, tokens):
    """Gradients in the order of `flatten`, and that of the action the steps saw."""
    units, block, blocks = weights.units, weights.deter // weights.blocks, weights.blocks
    pre_action = product(action, weights.action_in[0].t()) + weights.action_in[1]
    act_action = activate(pre_action, weights.action_in[2])
    rows = weights.rows(block + 2 * units, block + 3 * units)
    grad_action = product(loop.hidden[0], rows.t())
    grad_action, scale_action = activate_backward(grad_action, pre_action, weights.action_in[2])
    shared = outer(torch.cat([loop.act_inner, act_action], -1), loop.hidden[0])
    shared = shared.unflatten(-1, (blocks, block)).transpose(0, 1)
    first = torch.cat([outer_blocks(before, loop.hidden[0], blocks), shared], 1)
    inner = loop.inner.split(units, -1)
    count = len(weights.hidden)
    layers = [
        [outer(inner[0], before), total(inner[0]), loop.scales[0]],
        [outer(inner[1], before_stoch), total(inner[1]), loop.scales[1]],
        [outer(grad_action, action), total(grad_action), scale_action],
        [first, total(loop.hidden[0]), loop.scales[2]],
    ]
    for i in range(1, count):
        weight = outer_blocks(loop.act_hidden[i - 1], loop.hidden[i], blocks)
        layers.append([weight, total(loop.hidden[i]), loop.scales[2 + i]])
    layers.append([outer_blocks(loop.act_hidden[-1], loop.gates, blocks), total(loop.gates)])
    for i, grad in enumerate(loop.post):
        parts = [loop.act_post[i - 1]] if i else [saved.deter, tokens]
        weight = torch.cat([outer(grad, x) for x in parts], 1)
        layers.append([weight, total(grad), loop.scales[2 + count + i]])
    layers.append([outer(loop.logits, loop.act_post[-1]), total(loop.logits)])
    return [x for layer in layers for x in layer], product(grad_action, weights.action_in[0])


class Sequence(torch.autograd.Function):
    """rssm_observe as one node: (deter, logits, stoch) of everything, by name in `forward`."""

    @staticmethod
    def forward(ctx, loops, low, dynlayers, unimix, deter, stoch, tokens, prev_action, is_first,
                noise, *tensors):  # fmt: skip
        weights = unflatten(tensors, dynlayers)
        saved = forward(
            weights,
            deter,
            stoch,
            tokens,
            prev_action,
            is_first,
            noise,
            unimix,
            loops[0],
            low=low,
        )
        groups, classes = stoch.shape[1:]
        ctx.loops, ctx.low, ctx.dynlayers, ctx.unimix = loops, low, dynlayers, unimix
        ctx.shape = (groups, classes)
        ctx.counts = (len(tensors), len(saved.hidden))
        ctx.save_for_backward(
            deter, stoch, tokens, prev_action, is_first, *tensors, saved.deter, saved.logits,
            saved.index, saved.inner, saved.gates, *saved.hidden, *saved.post,
        )  # fmt: skip
        hot = one_hot(saved.index, classes, saved.logits.dtype).unflatten(-1, (groups, classes))
        return saved.deter, saved.logits.unflatten(-1, (groups, classes)), hot

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_deter, grad_logits, grad_stoch):
        deter, stoch, tokens, prev_action, is_first, *rest = ctx.saved_tensors
        count, hidden = ctx.counts
        weights, rest = unflatten(rest[:count], ctx.dynlayers), rest[count:]
        saved = Scan(*rest[:4], tuple(rest[5 : 5 + hidden]), rest[4], tuple(rest[5 + hidden :]))
        groups, classes = ctx.shape
        grads = (grad_deter, grad_logits.flatten(2), grad_stoch.flatten(2))
        loop = ctx.loops[1](weights, saved, deter, is_first, ctx.unimix, groups, grads)
        hot = one_hot(saved.index, classes, deter.dtype)
        before = previous(deter, saved.deter, is_first)
        before_stoch = previous(stoch.flatten(1), hot, is_first)
        action, divisor = bounded(prev_action, is_first)
        with hoisted(deter, ctx.low):
            out, grad_action = weight_gradients(
                weights, saved, loop, action, before, before_stoch, tokens
            )
            grad_tokens = product(loop.post[0], weights.post[0][0][:, weights.deter :])
        grad_action = (grad_action / divisor).masked_fill(is_first.unsqueeze(-1), 0.0)
        grad_stoch = loop.stoch.unflatten(-1, (groups, classes))
        return (None, None, None, None, loop.deter, grad_stoch, grad_tokens, grad_action, None,
                None, *out)  # fmt: skip


LOOPS = (scan, scan_backward)


def observe(weights, deter, stoch, tokens, prev_action, is_first, noise, unimix, loops=LOOPS,
            low=False):  # fmt: skip
    """`rssm_observe` on checked, float inputs of one dtype; low: products outside of the loop."""
    tensors = flatten(weights)
    states = (deter, stoch, tokens, prev_action)
    if not wants_grad(*states, *tensors):
        out = forward(
            unflatten(tensors, len(weights.hidden)), *states, is_first, noise, unimix, loops[0],
            save=False, low=low,
        )  # fmt: skip
        shape = stoch.shape[1:]
        hot = one_hot(out.index, shape[1], out.logits.dtype)
        return out.deter, out.logits.unflatten(-1, shape), hot.unflatten(-1, shape)
    return Sequence.apply(
        loops, low, len(weights.hidden), unimix, deter, stoch, tokens, prev_action, is_first, noise,
        *tensors,
    )  # fmt: skip
