"""How well each part of the modular recipe is learning: 0-d tensors by name, on the device.

docs/metrics.md has the meaning of each, docs/guide_modular.md and `fastwm.diagnose` what to do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastwm.worldmodels.losses import weighted_mean
from fastwm.worldmodels.modular import ModularWorldModel, Predicted, Seen, Steps

HORIZONS = (1, 5, 15, 50)  # steps of the open-loop error


class Running(nn.Module):
    """Sums that outlive a batch, because few batches hold the end of an episode.

    confusion (4,): ends called ends, ends called going on, going on called ends, going on called
    so. moments (6,): weight, sums of p, r, p p, r r, p r for predicted and true rewards. Both
    forget with `decay` per update.
    """

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("confusion", torch.zeros(4))
        self.register_buffer("moments", torch.zeros(6))

    @torch.no_grad()
    def add(self, going: Tensor, cont: Tensor, reward: Tensor, true: Tensor, w: Tensor) -> None:
        """Predictions and targets (B, T) of one batch: going bool, the others float."""
        ends, called = (1.0 - cont) * w, going.float()
        stays = cont * w
        cells = [ends * (1 - called), ends * called, stays * (1 - called), stays * called]
        pairs = [w, w * reward, w * true, w * reward**2, w * true**2, w * reward * true]
        for sums, new in ((self.confusion, cells), (self.moments, pairs)):
            found = torch.stack([x.sum() for x in new])
            good = torch.isfinite(found).all()  # a bad batch would stay for ever
            sums.copy_(torch.where(good, sums * self.decay + found, sums))

    def read(self) -> dict[str, Tensor]:
        """Shares and correlation; not a number where nothing was seen yet that they speak of."""
        end_end, end_go, go_end, go_go = self.confusion
        n, p, r, pp, rr, pr = self.moments
        var_p, var_r = pp * n - p * p, rr * n - r * r
        known = (var_p > 1e-6 * pp * n) & (var_r > 1e-6 * rr * n)  # rounding alone is no spread
        corr = torch.where(known, (pr * n - p * r) / (var_p * var_r).sqrt(), float("nan"))
        return {
            "continue_accuracy": (end_end + go_go) / self.confusion.sum(),
            "continue_precision": go_go / (go_go + end_go),
            "continue_recall": go_go / (go_go + go_end),
            "continue_precision_0": end_end / (end_end + go_end),
            "continue_recall_0": end_end / (end_end + end_go),
            "reward_corr": corr,
        }


@torch.no_grad()
def world_metrics(
    seen: Seen, step: Steps, predicted: Predicted, running: Running
) -> dict[str, Tensor]:
    """What the world model's predictions were worth on one batch."""
    dist, w = predicted.next_state, step.valid
    error = (dist.mean - predicted.target).square().mean(-1)
    reward = predicted.reward.mean
    running.add(predicted.cont.probs > 0.5, step.cont, reward, step.reward, w)
    states = seen.states.flatten(0, 1)
    spread = states.std(0, correction=0)
    mse, variance = weighted_mean(error, w), states.var(0, correction=0).mean()
    nll = -predicted.reward.log_prob(step.reward)
    return {
        "dynamics_mse": mse,
        "dynamics_mse_relative": mse / variance,
        "dynamics_nll": weighted_mean(-dist.log_prob(predicted.target).mean(-1), w),
        "dynamics_mean_std": dist.stddev.mean(),
        "reward_nll": weighted_mean(nll, w),
        "reward_mae": weighted_mean((reward - step.reward).abs(), w),
        "reward_mean_std": predicted.reward.stddev.mean(),
        "reward_abs_max": step.reward.abs().max(),
        "state_mean": states.mean(),
        "state_std": spread.mean(),
        "state_std_min": spread.min(),
        "state_finite": torch.isfinite(states).float().mean(),
        **running.read(),
    }


@torch.no_grad()
def open_loop_error(world: ModularWorldModel, seen: Seen, step: Steps) -> dict[str, Tensor]:
    """Mean squared error of predicting k steps from one state, over the variance of the states.

    1 is no better than always predicting the mean state.
    """
    length = step.action.shape[1]
    path = world.open_loop(seen.states, step.action, 1)
    error = (path - seen.states).square().mean(-1)[:, 1:]  # (B, T-1)
    reached = torch.cat([step.valid[:, :1], step.ongoing[:, :-1]], 1).cumprod(1)
    variance = seen.states.flatten(0, 1).var(0, correction=0).mean()
    return {
        f"openloop_error_{k}": torch.where(
            reached[:, k - 1].sum() > 0,
            weighted_mean(error[:, k - 1], reached[:, k - 1]) / variance,
            float("nan"),
        )
        for k in HORIZONS
        if k <= length
    }


@torch.no_grad()
def critic_metrics(value: Tensor, target: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """value, target, weight (N, H) of the critic's regression."""

    def variance(x: Tensor) -> Tensor:
        return weighted_mean((x - weighted_mean(x, weight)).square(), weight)

    error = value - target
    return {
        "critic_td_error_mean": weighted_mean(error, weight),
        "critic_td_error_abs_mean": weighted_mean(error.abs(), weight),
        "critic_value_mean": weighted_mean(value, weight),
        "critic_value_std": variance(value).sqrt(),
        "critic_target_mean": weighted_mean(target, weight),
        "critic_target_std": variance(target).sqrt(),
        "critic_explained_variance": 1.0 - variance(error) / variance(target).clamp(min=1e-8),
    }
