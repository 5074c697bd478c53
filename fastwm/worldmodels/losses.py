"""The losses of the modular recipe as plain functions of tensors.

World model: dynamics, reward, continue, reconstruction, and an open-loop error over several steps.
Behavior: returns of imagined trajectories, actor and critic. Every function takes the mask or the
weights of its elements; nothing here draws random numbers or waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastwm import ops

DYNAMICS_LOSSES = ("mse", "nll")


def weighted_mean(value: Tensor, weight: Tensor) -> Tensor:  # (...), (...) -> ()
    """sum(w x) / sum(w); 0 where all weights are 0. Elements of weight 0 never count."""
    kept = torch.where(weight > 0, value, 0.0)
    return (kept * weight).sum() / weight.sum().clamp(min=1e-8)


def dynamics_loss(dist: Any, target: Tensor, kind: str) -> Tensor:  # (..., S) -> (...)
    """Loss 1: how wrong a predicted next state is, mean over the elements of the state.

    dist: a distribution over states with `mean` and `log_prob` (..., S).
    kind: "mse" for (f(s, a) - s')^2, "nll" for -log p(s' | s, a).
    """
    if kind == "mse":
        return (dist.mean - target).square().mean(-1)
    if kind == "nll":
        return -dist.log_prob(target).mean(-1)
    raise ValueError(
        f"dynamics_loss: expected the dynamics component's `loss` to be one of {DYNAMICS_LOSSES}, "
        f"got {kind!r}"
    )


def reward_loss(dist: Any, reward: Tensor) -> Tensor:  # (...) -> (...)
    """Loss 2: -log p(r | s), with the spread that the component predicts."""
    return -dist.log_prob(reward)


def continue_loss(dist: Any, cont: Tensor) -> Tensor:  # (...) in {0, 1} -> (...)
    """Loss 3: binary cross entropy of going on."""
    return -dist.log_prob(cont)


def reconstruction_loss(recon: Tensor, target: Tensor, lead: int) -> Tensor:
    """Loss 4: squared error, mean over all but the first `lead` dimensions."""
    error = (recon - target).square()
    return error.flatten(lead).mean(-1) if error.dim() > lead else error


def masked_rollout_mse(
    predict: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,  # (B, S)
    action: Tensor,  # (B, T, A)
    target: Tensor,  # (B, T, S)
    cont: Tensor,  # (B, T)
    valid: Tensor | None = None,  # (B,)
) -> Tensor:  # ()
    """Loss 5: the error of predicting several steps from one's own predictions.

        s_0 = start,  s_{t+1} = predict(s_t, a_t),  loss = sum_t m_t mean((s_{t+1} - y_t)^2) / sum m
        m_0 = valid,  m_{t+1} = m_t c_t

    Args:
        predict: (B, S), (B, A) -> (B, S), one step of the dynamics.
        start: (B, S) the state before the first action.
        action: (B, T, A) taken at each step. target: (B, T, S) what each step led to.
        cont: (B, T) 1 where the episode goes on after the step, 0 where it ends with it: the step
            that ends it counts, later ones do not, and prediction starts over from the target.
        valid: (B,) 1 where the first step exists at all; None for everywhere.
    Returns: () mean over the counted steps, 0 if there are none. No host sync.
    """
    first = torch.ones_like(cont[:, 0]) if valid is None else valid.to(cont.dtype)
    mask = torch.cat([first.unsqueeze(1), cont[:, :-1]], 1).cumprod(1)
    state, errors = start, []
    for t in range(action.shape[1]):
        predicted = predict(state, action[:, t])
        errors.append((predicted - target[:, t]).square().mean(-1))
        state = torch.where(cont[:, t, None] > 0, predicted, target[:, t])
    return weighted_mean(torch.stack(errors, 1), mask)


def imagined_returns(
    reward: Tensor,  # (N, H)
    value: Tensor,  # (N, H + 1)
    cont: Tensor,  # (N, H)
    gamma: float,
    lam: float,
) -> Tensor:  # (N, H)
    """G_t = r_t + gamma c_t ((1 - lam) V(s_{t+1}) + lam G_{t+1}),  G_H = V(s_H).

    reward and cont at t belong to the step from s_t to s_{t+1}. Differentiable in all three.
    """
    if value.shape != (reward.shape[0], reward.shape[1] + 1) or cont.shape != reward.shape:
        raise ValueError(
            "imagined_returns: expected reward (N, H), value (N, H + 1) and cont (N, H), got "
            f"{tuple(reward.shape)}, {tuple(value.shape)} and {tuple(cont.shape)}"
        )
    arrived = torch.nn.functional.pad(reward, (1, 0))  # lambda_return reads what came with t + 1
    discount = torch.nn.functional.pad(cont * gamma, (1, 0))
    return ops.lambda_return(arrived, value, discount, lam)


def actor_loss(
    returns: Tensor,  # (N, H)
    entropy: Tensor,  # (N, H)
    weight: Tensor,  # (N, H)
    entropy_coef: float,
) -> Tensor:  # ()
    """Loss 6: -mean(G) - alpha mean(H(pi)); the gradient reaches the policy through the model."""
    return -weighted_mean(returns, weight) - entropy_coef * weighted_mean(entropy, weight)


def critic_loss(value: Tensor, target: Tensor, weight: Tensor) -> Tensor:  # (N, H) x3 -> ()
    """Loss 7: mean((V(s) - G)^2); the target never gets a gradient."""
    return weighted_mean((value - target.detach()).square(), weight)


def critic_targets(returns: Tensor, clip: float | None, standardize: bool) -> Tensor:
    """What the critic regresses to: the returns, clipped to +-clip, standardized."""
    target = returns.detach()
    if clip is not None:
        target = target.clamp(-clip, clip)
    if standardize:
        target = (target - target.mean()) / target.std(correction=0).clamp(min=1e-5)
    return target
