"""The recurrent state-space model of DreamerV3: one step, the posterior sequence, the rollout.

Letters: B batch, T time, N rollouts, D deter, S latent groups, K classes, U hidden units,
A action, E token width, G blocks (docs/conventions.md). Without compiled kernels for their device,
tensors take the same hoisted sequence written in PyTorch operations.

One step, with ``a = action / max(1, |action|)`` (denominator detached)::

    x0, x1, x2 = silu(rms(Linear(deter))), silu(rms(Linear(stoch))), silu(rms(Linear(a)))
    h = [deter_g, x0, x1, x2] for every block g
    h = silu(rms_D(BlockLinear(h)))                      # dynlayers times
    r, c, u = BlockLinear(h), three parts inside every block
    deter' = sigmoid(u - 1) * tanh(sigmoid(r) * c) + (1 - sigmoid(u - 1)) * deter

Source: Hafner et al., "Mastering Diverse Domains through World Models" (the 2024 revision).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastwm.ops import _backend
from fastwm.ops import _rssm_fused as fused
from fastwm.ops import _rssm_rollout as rollout
from fastwm.ops import _rssm_sequence as sequence
from fastwm.ops._check import check_dim, check_dtype, check_same_device, check_shape
from fastwm.ops._rssm_rollout import packed_posterior  # noqa: F401  (for fastwm.rssm)
from fastwm.ops.latent import latent_sample_ref, straight_through_ref
from fastwm.ops.norm import rms_silu

EPS = sequence.EPS  # inside the root of every RMS norm


class RSSMWeights(NamedTuple):
    """All tensors of the model. A dense layer is ``(weight (out, in), bias, scale)``.

    Block layers hold weights of shape ``(G, in/G, out/G)`` and a bias that is added after the
    blocks are concatenated. ``scale`` is the gain of the RMS norm that follows; the two logit
    layers and ``gru`` have none.
    """

    deter_in: tuple  # weight (U, D), bias (U), scale (U)
    stoch_in: tuple  # weight (U, S*K), bias (U), scale (U)
    action_in: tuple  # weight (U, A), bias (U), scale (U)
    hidden: tuple  # dynlayers x (weight (G, D/G+3U), then (G, D/G, D/G); bias (D); scale (D))
    gru: tuple  # weight (G, D/G, 3D/G), bias (3D)
    post: tuple  # obslayers x (weight (U, D+E) then (U, U), bias (U), scale (U))
    post_logit: tuple  # weight (S*K, U), bias (S*K)
    prior: tuple  # imglayers x (weight (U, D) then (U, U), bias (U), scale (U))
    prior_logit: tuple  # weight (S*K, U), bias (S*K)


def _dense(x: Tensor, layer: tuple) -> Tensor:
    weight, bias, scale = layer
    return _activate(F.linear(x, weight, bias), scale)


def _activate(x: Tensor, scale: Tensor) -> Tensor:
    return F.silu(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * scale)


def _blocks(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Block-diagonal layer. x (B, G, in/G), weight (G, in/G, out/G) -> (B, G*out/G)."""
    return torch.einsum("bgi,gio->bgo", x, weight).flatten(-2) + bias


def _sample(logits: Tensor, noise: Tensor | None, unimix: float) -> Tensor:
    """Straight-through one-hot of logits (…, S, K); noise (…, S) uniform or None for the mode."""
    index, _ = latent_sample_ref(logits, noise, unimix)
    return straight_through_ref(index, logits, unimix)


def _mlp_logits(x: Tensor, layers: tuple, logit: tuple) -> Tensor:
    for layer in layers:
        x = _dense(x, layer)
    return F.linear(x, *logit)


def gru_step_ref(
    weights: RSSMWeights,
    deter: Tensor,  # (B, D)
    stoch: Tensor,  # (B, S*K)
    action: Tensor,  # (B, A)
) -> Tensor:  # (B, D)
    """Plain PyTorch form of `gru_step`."""
    blocks = weights.gru[0].shape[0]
    action = action / action.abs().clamp(min=1).detach()
    parts = (
        _dense(deter, weights.deter_in),
        _dense(stoch, weights.stoch_in),
        _dense(action, weights.action_in),
    )
    shared = torch.cat(parts, -1).unsqueeze(1).expand(-1, blocks, -1)
    hidden = torch.cat([deter.unflatten(-1, (blocks, -1)), shared], -1)
    for weight, bias, scale in weights.hidden:
        hidden = _activate(_blocks(hidden, weight, bias), scale).unflatten(-1, (blocks, -1))
    gates = _blocks(hidden, *weights.gru).unflatten(-1, (blocks, -1))
    reset, cand, update = (part.flatten(-2) for part in gates.chunk(3, -1))
    cand = torch.tanh(torch.sigmoid(reset) * cand)
    update = torch.sigmoid(update - 1)
    return update * cand + (1 - update) * deter


def rssm_observe_ref(
    weights: RSSMWeights,
    deter: Tensor,  # (B, D)
    stoch: Tensor,  # (B, S, K)
    tokens: Tensor,  # (B, T, E)
    prev_action: Tensor,  # (B, T, A)
    is_first: Tensor,  # (B, T) bool
    noise: Tensor | None = None,  # (B, T, S) uniform in [0, 1), or None for the mode
    unimix: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, T, D), (B, T, S, K), (B, T, S, K)
    """Plain PyTorch form of `rssm_observe`: a loop over T, gradients by autograd."""
    groups, classes = stoch.shape[-2:]
    deters, logits, stochs = [], [], []
    for t in range(tokens.shape[1]):
        first = is_first[:, t, None]
        deter = torch.where(first, 0.0, deter)
        stoch = torch.where(first, 0.0, stoch.flatten(-2))
        action = torch.where(first, 0.0, prev_action[:, t])
        deter = gru_step_ref(weights, deter, stoch, action)
        inputs = torch.cat([deter, tokens[:, t]], -1)
        logit = _mlp_logits(inputs, weights.post, weights.post_logit)
        logit = logit.unflatten(-1, (groups, classes))
        stoch = _sample(logit, None if noise is None else noise[:, t], unimix)
        deters.append(deter)
        logits.append(logit)
        stochs.append(stoch)
    if not deters:
        empty = tokens.new_zeros(len(tokens), 0, groups, classes)
        return deter.new_zeros(len(tokens), 0, deter.shape[-1]), empty, empty.clone()
    return torch.stack(deters, 1), torch.stack(logits, 1), torch.stack(stochs, 1)


def rssm_prior_ref(weights: RSSMWeights, deter: Tensor, groups: int) -> Tensor:
    """Plain PyTorch form of `rssm_prior`."""
    return _mlp_logits(deter, weights.prior, weights.prior_logit).unflatten(-1, (groups, -1))


@torch.no_grad()
def rssm_imagine_ref(
    weights: RSSMWeights,
    deter: Tensor,  # (N, D)
    stoch: Tensor,  # (N, S, K)
    policy,
    length: int,
    noise: Tensor | None = None,  # (length, N, S)
    unimix: float = 0.01,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch form of `rssm_imagine`."""
    groups, states, actions = stoch.shape[-2], [], []
    for step in range(length + 1):
        if step:
            deter = gru_step_ref(weights, deter, stoch.flatten(-2), actions[-1])
            logits = rssm_prior_ref(weights, deter, groups)
            stoch = _sample(logits, None if noise is None else noise[step - 1], unimix)
        if out is not None:
            deter, stoch = out[0][:, step].copy_(deter), out[1][:, step].copy_(stoch)
        states.append((deter, stoch))
        actions.append(policy(deter, stoch))
    deters, stochs = out or (torch.stack(parts, 1) for parts in zip(*states, strict=True))
    return deters, stochs, torch.stack(actions, 1)


def gru_step(
    weights: RSSMWeights,
    deter: Tensor,  # (B, D) float
    stoch: Tensor,  # (B, S*K) float
    action: Tensor,  # (B, A) float
) -> Tensor:  # (B, D)
    """One block-diagonal GRU step; resets are the caller's.

    Formula: at the top of this module. Differentiable with respect to the state, the action and
    the weights.

    Raises:
        ValueError: shapes; TypeError: dtypes or devices.
    Equivalent to:
        hidden = silu(rms(BlockLinear([deter_g, x0, x1, x2]))); reset, cand, update = gru(hidden)
        u = sigmoid(update - 1); u * tanh(sigmoid(reset) * cand) + (1 - u) * deter
    """
    op = "gru_step"
    check_dim(op, "stoch", stoch, "(B, S*K)", 2)
    size, actions = weights.deter_in[0].shape[-1], weights.action_in[0].shape[-1]
    _check_weights(op, weights, size, stoch.shape[1])
    check_shape(op, "deter", deter, "(B, D)", (len(stoch), size))
    check_shape(op, "action", action, "(B, A)", (len(stoch), actions))
    deter, stoch, action = _as_weights(op, weights, deter=deter, stoch=stoch, action=action)
    with torch.autocast(deter.device.type, enabled=False):
        if not _backend.fused_wanted() or _backend.wants_grad(
            deter, stoch, action, *sequence.flatten(weights)
        ):
            return gru_step_ref(weights, deter, stoch, action)
        return rollout.Stepper(weights, "prior", rollout=False).core(deter, stoch, action)


def rssm_observe(
    weights: RSSMWeights,
    deter: Tensor,  # (B, D) float
    stoch: Tensor,  # (B, S, K) float
    tokens: Tensor,  # (B, T, E) float
    prev_action: Tensor,  # (B, T, A) float
    is_first: Tensor,  # (B, T) bool
    noise: Tensor | None = None,  # (B, T, S) float in [0, 1), or None
    unimix: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, T, D), (B, T, S, K), (B, T, S, K)
    """The whole posterior sequence, resets and samples inside, as one autograd node.

    For every t: where ``is_first`` the deter, stoch and previous action become zero; one GRU step
    (top of this module); ``logits = MLP([deter, tokens])``; a straight-through sample of
    ``(1 - unimix) softmax(logits) + unimix / K``.

    Args:
        weights: see RSSMWeights; ``prior`` and ``prior_logit`` are not read.
        deter, stoch: the state before the first row. tokens: the encoder's output.
        prev_action: (B, T, A), the action that led to row t.
        noise: uniform numbers, the inverse CDF gives the class; None takes the mode.
        unimix: share of the uniform distribution in what is sampled, in [0, 1].
    Returns:
        deter (B, T, D); logits (B, T, S, K) raw, before the mixing; stoch (B, T, S, K) one-hot
        with the gradient of the mixed probabilities. Differentiable once, with respect to the
        weights, deter, stoch, tokens and prev_action.
    Raises:
        ValueError: a shape or unimix; TypeError: a dtype or device.
    Equivalent to:
        for t in range(T): deter = gru_step(...); logits = post(cat([deter, tokens[:, t]], -1))
        index, _ = latent_sample(logits, noise[:, t], unimix); stoch = straight_through(...)
    Numerics: float32 inside and in the carry, float64 stays. Autocast changes nothing, but on CUDA,
        where products then read bfloat16.
    """
    deter, stoch, tokens, prev_action, noise = _check_observe(
        weights, deter, stoch, tokens, prev_action, is_first, noise, unimix
    )
    args = (deter, stoch, tokens, prev_action, is_first, noise, unimix)
    loops = fused.loops(weights.deter_in[0])
    with torch.autocast(deter.device.type, enabled=False):
        if not _backend.fused_wanted() or not is_first.numel():
            return rssm_observe_ref(weights, *args)
        wanted = _backend.wants_grad(*args[:4], *sequence.flatten(weights))
        on_device = deter.is_cuda and loops is not None  # a few launches, not one a layer
        if is_first.shape[1] == 1 and not wanted and not on_device:
            return rollout.observe_one(weights, *args)
        low = loops is fused.LOW_LOOPS
        return sequence.observe(weights, *args, loops=loops or sequence.LOOPS, low=low)


def _check_weights(op: str, weights: RSSMWeights, deter: int, stoch: int) -> None:
    """The sizes that every product below relies on; D and S*K are given by the state."""
    units, blocks = weights.deter_in[0].shape[0], weights.gru[0].shape[0]
    if blocks < 1 or deter % blocks:
        raise ValueError(f"{op}: expected D to be a multiple of the G = {blocks} blocks of "
                         f"weights.gru, got D = {deter}")  # fmt: skip
    if not (weights.hidden and weights.post and weights.prior):
        raise ValueError(f"{op}: expected at least one layer in weights.hidden, post and prior")
    block, actions = deter // blocks, weights.action_in[0].shape[-1]
    wide = weights.post[0][0].shape[-1]
    rows = [block + 3 * units] + [block] * (len(weights.hidden) - 1)
    layers = [
        ("deter_in", weights.deter_in, (units, deter)),
        ("stoch_in", weights.stoch_in, (units, stoch)),
        ("action_in", weights.action_in, (units, actions)),
        *((f"hidden[{i}]", layer, (blocks, rows[i], block))
          for i, layer in enumerate(weights.hidden)),
        ("gru", weights.gru, (blocks, block, 3 * block)),
        *((f"post[{i}]", layer, (units, units if i else wide))
          for i, layer in enumerate(weights.post)),
        ("post_logit", weights.post_logit, (stoch, units)),
        *((f"prior[{i}]", layer, (units, units if i else deter))
          for i, layer in enumerate(weights.prior)),
        ("prior_logit", weights.prior_logit, (stoch, units)),
    ]  # fmt: skip
    for name, layer, sizes in layers:
        check_shape(op, f"weights.{name}[0]", layer[0], "(out, in)", sizes)
        width = sizes[0] if len(sizes) == 2 else sizes[0] * sizes[2]
        for i, vector in enumerate(layer[1:], 1):
            check_shape(op, f"weights.{name}[{i}]", vector, "(out,)", (width,))


def _check_observe(weights, deter, stoch, tokens, prev_action, is_first, noise, unimix):
    op = "rssm_observe"
    check_dim(op, "is_first", is_first, "(B, T)", 2)
    check_dim(op, "stoch", stoch, "(B, S, K)", 3)
    batch, time = is_first.shape
    size, groups, classes = weights.deter_in[0].shape[-1], *stoch.shape[1:]
    embed = weights.post[0][0].shape[-1] - size if weights.post else 0
    _check_weights(op, weights, size, groups * classes)
    check_shape(op, "deter", deter, "(B, D)", (batch, size))
    check_shape(op, "stoch", stoch, "(B, S, K)", (batch, groups, classes))
    check_shape(op, "tokens", tokens, "(B, T, E)", (batch, time, embed))
    actions = weights.action_in[0].shape[-1]
    check_shape(op, "prev_action", prev_action, "(B, T, A)", (batch, time, actions))
    check_dtype(op, "is_first", is_first, torch.bool)
    if not 0.0 <= unimix <= 1.0:
        raise ValueError(f"{op}: expected unimix in [0, 1], got {unimix}")
    if noise is not None:
        check_shape(op, "noise", noise, "(B, T, S)", (batch, time, groups))
    check_same_device(op, weights=weights.deter_in[0], is_first=is_first)
    return _as_weights(op, weights, deter=deter, stoch=stoch, tokens=tokens,
                       prev_action=prev_action, noise=noise)  # fmt: skip


def _as_weights(op: str, weights: RSSMWeights, **tensors: Tensor | None) -> list[Tensor | None]:
    """Checks dtypes and devices; returns the tensors in the dtype of the weights."""
    like = weights.deter_in[0]
    for name, tensor in tensors.items():
        if tensor is not None:
            check_dtype(op, name, tensor)
            check_same_device(op, weights=like, **{name: tensor})
    return [None if x is None else x.to(like.dtype) for x in tensors.values()]


def rssm_prior(
    weights: RSSMWeights,
    deter: Tensor,  # (…, D) float
    groups: int,
) -> Tensor:  # (…, S, K)
    """Logits of the prior for S = ``groups``, raw (no unimix).

    Differentiable with respect to deter, ``weights.prior`` and ``weights.prior_logit``.

    Raises:
        ValueError: shapes; TypeError: dtypes or devices.
    Equivalent to:
        for w, b, scale in weights.prior: x = silu(rms_norm(linear(x, w, b)) * scale)
        linear(x, *weights.prior_logit).unflatten(-1, (groups, -1))
    """
    op, size = "rssm_prior", weights.deter_in[0].shape[-1]
    if groups < 1 or weights.prior_logit[0].shape[0] % groups:
        raise ValueError(f"{op}: expected groups to divide S*K = {weights.prior_logit[0].shape[0]} "
                         f"of weights.prior_logit, got {groups}")  # fmt: skip
    _check_weights(op, weights, size, weights.prior_logit[0].shape[0])
    check_shape(op, "deter", deter, "(..., D)", (*deter.shape[:-1], size))
    (deter,) = _as_weights(op, weights, deter=deter)
    if not _backend.fused_wanted():
        return rssm_prior_ref(weights, deter, groups)
    for weight, bias, scale in weights.prior:
        deter = rms_silu(F.linear(deter, weight, bias), scale)
    return F.linear(deter, *weights.prior_logit).unflatten(-1, (groups, -1))


@torch.no_grad()
def rssm_imagine(
    weights: RSSMWeights,
    deter: Tensor,  # (N, D) float
    stoch: Tensor,  # (N, S, K) float
    policy: Callable[[Tensor, Tensor], Tensor],
    length: int,
    noise: Tensor | None = None,  # (length, N, S) float in [0, 1), or None for the mode
    unimix: float = 0.01,
    out: tuple[Tensor, Tensor] | None = None,  # (N, length+1, D), (N, length+1, S, K) float32
) -> tuple[Tensor, Tensor, Tensor]:  # (N, length+1, D), (N, length+1, S, K), (N, length+1, A)
    """Roll the prior forward under a policy, without gradient.

    Args:
        policy: ``policy(deter (N, D), stoch (N, S, K)) -> action (N, A)``, called at every state,
            the last one included.
        length: number of steps I.
        noise: uniform numbers, the inverse CDF gives the class; None takes the mode.
        out: where the states go, and what the policy is then given slices of. The numbers of one
            state must be adjacent; two slices of one (N, length+1, D+S*K) tensor lay the states
            out as the features that heads read.
    Returns:
        deter, stoch (one-hot) and action at the I+1 states; state 0 is the start.
    Raises:
        ValueError: shapes, unimix or length; TypeError: dtypes or devices.
    Equivalent to:
        for i in range(length): deter = gru_step(weights, deter, stoch.flatten(1), action)
        stoch = one_hot(latent_sample(rssm_prior(weights, deter), noise[i])); action = policy(...)
    Numerics: states are float32. Under autocast the products run in its dtype, on a CPU only in
        bfloat16 and if that is faster there.
    """
    op = "rssm_imagine"
    check_dim(op, "stoch", stoch, "(N, S, K)", 3)
    count, groups, classes = stoch.shape
    _check_weights(op, weights, weights.deter_in[0].shape[-1], groups * classes)
    check_shape(op, "deter", deter, "(N, D)", (count, weights.deter_in[0].shape[-1]))
    if noise is not None:
        check_shape(op, "noise", noise, "(length, N, S)", (length, count, groups))
    if not 0.0 <= unimix <= 1.0 or length < 0:
        raise ValueError(f"{op}: expected unimix in [0, 1] and length >= 0, got {unimix}, {length}")
    if out is not None:
        check_shape(op, "out[0]", out[0], "(N, length+1, D)", (count, length + 1, deter.shape[1]))
        shape = (count, length + 1, groups, classes)
        check_shape(op, "out[1]", out[1], "(N, length+1, S, K)", shape)
    deter, stoch, noise = _as_weights(op, weights, deter=deter, stoch=stoch, noise=noise)
    roll = rollout.imagine if _backend.fused_wanted() else rssm_imagine_ref
    return roll(weights, deter, stoch, policy, length, noise, unimix, out)
