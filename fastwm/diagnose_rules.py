"""What the numbers of a run say about each part, and what to try: the rules of `fastwm.diagnose`.

A rule looks at the newest values of metrics.jsonl, and where a course matters at the first and last
third of them. It fires, is content, or cannot tell because the run does not log what it needs.
Limits are those of docs/guide_modular.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RECENT = 3  # rows that the newest value is a mean of
YOUNG = 300  # updates below which being bad is no news


class Unknown(Exception):
    """The run does not log what a rule needs."""


class History:
    """Rows of metrics.jsonl and the settings of the run."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> None:
        self.rows, self.config = rows, config
        self.updates = int(max((row.get("updates", 0) for row in rows), default=0))

    def course(self, *names: str) -> list[float]:
        """All numbers of the first of the names that was ever logged as a number."""
        for name in names:
            values = [row[name] for row in self.rows if row.get(name) is not None]
            if values:
                return values
        raise Unknown(names[0])

    def newest(self, *names: str) -> float:
        values = self.course(*names)[-RECENT:]
        return sum(values) / len(values)

    def thirds(self, *names: str) -> tuple[float, float]:
        """Means of the first and the last third."""
        values = self.course(*names)
        count = len(values) // 3
        if count < 1:
            raise Unknown(f"more rows of {names[0]}")
        return sum(values[:count]) / count, sum(values[-count:]) / count

    def grown(self) -> None:
        """Only a run that had time to learn can be blamed."""
        if self.updates < YOUNG:
            raise Unknown(f"{YOUNG} updates, there are {self.updates}")

    def setting(self, *keys: str) -> Any:
        for key in keys:
            if key in self.config:
                return self.config[key]
        raise Unknown(f"the setting {keys[0]}")


@dataclass(frozen=True)
class Rule:
    name: str
    healthy: str
    advice: str
    look: Callable[[History], tuple[bool, str]]  # fires, what it saw


@dataclass(frozen=True)
class Finding:
    """state: fires, fine or unknown."""

    rule: Rule
    state: str
    seen: str


def findings(history: History) -> list[Finding]:
    """Every rule's verdict, those that fire first."""
    found = []
    for rule in RULES:
        try:
            fires, seen = rule.look(history)
            found.append(Finding(rule, "fires" if fires else "fine", seen))
        except Unknown as missing:
            found.append(Finding(rule, "unknown", f"needs {missing}"))
    order = ("fires", "fine", "unknown")
    return sorted(found, key=lambda finding: order.index(finding.state))


RULES: list[Rule] = []


def rule(name: str, healthy: str, advice: str) -> Callable:
    def register(look: Callable[[History], tuple[bool, str]]) -> Callable:
        RULES.append(Rule(name, healthy, advice, look))
        return look

    return register


# ---- world model


@rule(
    "numbers",
    "all finite, no update skipped",
    "clip gradients (max_grad_norm), learning rates 10 times smaller, look at the scale of rewards "
    "and observations; nan_dump.pt names the first bad tensor",
)
def _(h: History) -> tuple[bool, str]:
    skipped = h.course("train/opt/skipped")[-1]
    finite = [v for row in h.rows for k, v in row.items() if k == "train/state_finite"]
    bad = any(value is None or value < 1 for value in finite)
    return skipped > 0 or bad, f"{skipped:g} updates skipped" + (", states not finite" * bad)


@rule(
    "dynamics",
    "dynamics_mse below 0.1",
    "more capacity (dynamics.options.hidden), states of scale N(0, 1) (see state_std), "
    "world_model_lr 1e-3",
)
def _(h: History) -> tuple[bool, str]:
    mse = h.newest("train/dynamics_mse")
    h.grown()
    return mse > 0.1, f"dynamics_mse {mse:.3g}"


@rule(
    "dynamics_relative",
    "dynamics_mse_relative below 0.25: the error is small beside the states' own variance",
    "a small error of small states says little: more capacity, dynamics.options.residual true, "
    "world_model_lr 1e-3",
)
def _(h: History) -> tuple[bool, str]:
    share = h.newest("train/dynamics_mse_relative")
    h.grown()
    return share > 0.25, f"dynamics_mse_relative {share:.3g}"


@rule(
    "open_loop",
    "openloop_error_5 below 0.5: five steps ahead is better than guessing",
    "a better dynamics model, multi_step_loss_weight 0.5, a shorter imagination_horizon meanwhile",
)
def _(h: History) -> tuple[bool, str]:
    error = h.newest("train/openloop_error_5")
    h.grown()
    return error > 0.5, f"openloop_error_5 {error:.3g}"


@rule(
    "kl",
    "the KL moves above its floor: the latents carry something",
    "a KL that never leaves free_nats means empty latents: smaller rssm.free_nats, or a longer run",
)
def _(h: History) -> tuple[bool, str]:
    floor, kl = h.setting("rssm.free_nats"), h.newest("train/loss/dyn")
    h.grown()
    return kl <= floor * 1.001, f"KL {kl:.3g}, floor {floor:g}"


@rule(
    "states",
    "state_std above 0.01 and below 10",
    "near 0: the representation collapsed (decoder_loss_weight, dynamics_detach_target true); "
    "large: clip gradients, smaller world_model_lr",
)
def _(h: History) -> tuple[bool, str]:
    std = h.newest("train/state_std")
    return not 0.01 < std < 10, f"state_std {std:.3g}"


@rule(
    "decoder",
    "the reconstruction loss falls",
    "the encoder does not keep what is needed: wider encoder, larger representation, "
    "world_model_lr 1e-3",
)
def _(h: History) -> tuple[bool, str]:
    names = ("train/decoder_reconstruction_loss", "train/loss/recon/vector")
    early, late = h.thirds(*names)
    h.grown()
    return late > 0.95 * early and late > 1e-3, f"from {early:.3g} to {late:.3g}"


@rule(
    "reward_spread_wide",
    "the predicted spread fits the error",
    "large error with a good likelihood: the head hides behind a large spread; more capacity, "
    "reward.options.learn_std false",
)
def _(h: History) -> tuple[bool, str]:
    mae, std = h.newest("train/reward_mae"), h.newest("train/reward_mean_std")
    large = mae > 0.1 * max(h.newest("train/reward_abs_max"), 1e-8)
    return large and std > 3 * 1.25 * mae, f"reward_mae {mae:.3g}, reward_mean_std {std:.3g}"


@rule(
    "reward_spread_narrow",
    "the predicted spread fits the error",
    "small spread beside the error, bad likelihood: overconfident; raise reward.options.min_std",
)
def _(h: History) -> tuple[bool, str]:
    mae, std = h.newest("train/reward_mae"), h.newest("train/reward_mean_std")
    h.grown()
    return 1.25 * mae > 3 * std, f"reward_mae {mae:.3g}, reward_mean_std {std:.3g}"


@rule(
    "reward_corr",
    "predicted and true rewards correlate above 0.8",
    "states do not tell rewards apart: a larger representation, reward_input next_state",
)
def _(h: History) -> tuple[bool, str]:
    corr = h.newest("train/reward_corr")
    h.grown()
    return corr < 0.8, f"reward_corr {corr:.3g}"


@rule(
    "reward_scale",
    "rewards within [-10, 10]",
    "scale rewards in the environment, or learning rates 10 times smaller and a longer warm-up",
)
def _(h: History) -> tuple[bool, str]:
    largest = max(h.course("train/reward_abs_max"))
    return largest > 10, f"reward_abs_max {largest:.3g}"


@rule(
    "continue",
    "continue_accuracy above 0.8",
    "states do not show the end: continue_input next_state, larger representation",
)
def _(h: History) -> tuple[bool, str]:
    accuracy = h.newest("train/continue_accuracy")
    h.grown()
    return accuracy < 0.8, f"continue_accuracy {accuracy:.3g}"


@rule(
    "continue_ends",
    "continue_recall_0 above 0.5: ends are seen, not only survival",
    "class imbalance, ends are missed and the actor never fears them: continue_input next_state, "
    "more capacity, more data near ends",
)
def _(h: History) -> tuple[bool, str]:
    accuracy = h.newest("train/continue_accuracy")
    recall = h.newest("train/continue_recall_0")
    h.grown()
    return recall < 0.5, f"continue_accuracy {accuracy:.3g}, continue_recall_0 {recall:.3g}"


# ---- behavior


@rule(
    "warm_up",
    "the warm-up ends within the run",
    "a smaller world_model_warmup_steps, or a longer run",
)
def _(h: History) -> tuple[bool, str]:
    share = h.course("train/warmup_phase")[-1]
    until = h.setting("world_model_warmup_steps")
    return share == 1.0, "still warming up" if share == 1.0 else f"ended at env_steps {until}"


@rule(
    "imagined_return",
    "mean_imagined_return rises",
    "look at the world model first (dynamics, continue), then actor_grad_norm > 0, then a longer "
    "warm-up, then actor_lr 1e-4",
)
def _(h: History) -> tuple[bool, str]:
    early, late = h.thirds("train/mean_imagined_return")
    h.grown()
    return late <= early + 0.01 * abs(early), f"from {early:.3g} to {late:.3g}"


@rule(
    "entropy_gone",
    "entropy falls slowly",
    "the policy stopped exploring: a larger entropy_coef (actent), a smaller actor_lr",
)
def _(h: History) -> tuple[bool, str]:
    values = h.course("train/entropy_share", "train/rand")
    half = values[: max(1, len(values) // 2)]
    return min(half) < 0.02, f"share of the largest possible: {min(half):.3g} in the first half"


@rule(
    "entropy_stays",
    "entropy falls slowly",
    "the policy is not learning: a smaller entropy_coef (actent), or a larger actor_lr",
)
def _(h: History) -> tuple[bool, str]:
    share = h.newest("train/entropy_share", "train/rand")
    h.grown()
    return share > 0.97, f"share of the largest possible: {share:.3g}"


def _gradient(name: str, keys: tuple[str, ...], lr: str) -> None:
    @rule(
        f"{name}_gradient",
        "norm before clipping between 1e-6 and 100",
        f"below: the signal vanishes, check what leads to it; above: it explodes; {lr} 10 times "
        "smaller, max_grad_norm, actor_normalize_returns",
    )
    def _(h: History) -> tuple[bool, str]:
        norm = h.newest(*keys)
        return not 1e-6 < norm < 100, f"{keys[0].removeprefix('train/')} {norm:.3g}"


_gradient("world_model", ("train/world_model_grad_norm", "train/opt/grad_norm"), "world_model_lr")
_gradient("actor", ("train/actor_grad_norm",), "actor_lr")
_gradient("critic", ("train/critic_grad_norm",), "critic_lr")


@rule(
    "critic_collapsed",
    "values differ between states",
    "constant values: a larger critic_lr, more capacity (value.options.hidden)",
)
def _(h: History) -> tuple[bool, str]:
    std, target = h.newest("train/critic_value_std"), h.newest("train/critic_target_std")
    h.grown()
    return std < 0.05 * target, f"critic_value_std {std:.3g}, critic_target_std {target:.3g}"


@rule(
    "critic_explains",
    "critic_explained_variance above 0.7",
    "the critic lags behind: a larger critic_lr, critic_updates_per_batch 2; exploding values: a "
    "smaller one, critic_target_clip",
)
def _(h: History) -> tuple[bool, str]:
    share = h.newest("train/critic_explained_variance")
    h.grown()
    return share < 0.7, f"critic_explained_variance {share:.3g}"


@rule(
    "critic_error",
    "the critic's error falls towards 0",
    "the critic is not learning: look at critic_lr and critic_grad_norm",
)
def _(h: History) -> tuple[bool, str]:
    early, late = h.thirds("train/critic_td_error_abs_mean")
    scale = h.newest("train/critic_target_std")
    h.grown()
    fires = late > early and late > max(scale, 1e-3)
    return fires, f"critic_td_error_abs_mean from {early:.3g} to {late:.3g}"


@rule(
    "evaluation_flat",
    "evaluations rise",
    "look at what fires above; if nothing does: train longer, more exploration, a longer horizon",
)
def _(h: History) -> tuple[bool, str]:
    values = h.course("eval/return")
    if len(values) < 4:
        raise Unknown("four evaluations")
    early, late = h.thirds("eval/return")
    return late <= early + 0.02 * abs(early), f"from {early:.4g} to {late:.4g}"


@rule(
    "evaluation_fell",
    "evaluations do not fall back",
    "learning rates 10 times smaller, clip gradients; checkpoint/best.pt holds the best one",
)
def _(h: History) -> tuple[bool, str]:
    values = h.course("eval/return")
    low, best, last = min(values), max(values), h.newest("eval/return")
    fell = len(values) > RECENT and best - last > 0.5 * (best - low) > 0
    return fell and not math.isclose(best, low), f"best {best:.4g}, lately {last:.4g}"


# ---- settings


@rule("horizon", "imagination_horizon of 5 or more", "10 or more imagined steps; 15 is usual")
def _(h: History) -> tuple[bool, str]:
    horizon = h.setting("imagination_horizon", "imag_horizon")
    return horizon < 5, f"{horizon} imagined steps" + (": hardly any planning" * (horizon == 1))


@rule("entropy_weight", "entropy_coef of 1e-5 or more", "entropy_coef 0.01 (actent 3e-4)")
def _(h: History) -> tuple[bool, str]:
    weight = h.setting("entropy_coef", "actent")
    return weight < 1e-5, f"{weight:g}"
