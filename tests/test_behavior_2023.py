"""Actor and critic of 2023: goldens, the three gradient estimators, what gradients reach."""

import pytest
import torch
from torch import nn

from fastwm import ops
from fastwm.behavior import ReturnNorm
from fastwm.behavior_2023 import (
    Actor,
    Behavior,
    ClippedNormal,
    Critic,
    StraightThrough,
    actor_loss,
    frozen,
    reach_weights,
)
from fastwm.nets_2023 import Head
from fastwm.rssm_2023 import RSSM
from fastwm.spaces import Space

DISCRETE, CONTINUOUS = Space("discrete", (), (3,)), Space("continuous", (2,))


# ---- goldens


def test_pieces_golden(golden, variant, close, near):
    g = golden("dreamerv3_2023_pieces")
    bins = ops.symlog_bins(255)
    close(bins, g["disc/buckets"], atol=2e-6)
    logits = g["disc/logits"].clone().requires_grad_()
    log_prob = -ops.twohot_loss(logits, g["disc/x"][..., 0], bins, squash=True)
    close(log_prob, g["disc/logp"], atol=2e-5)
    (grad,) = torch.autograd.grad(log_prob.sum(), logits)
    near(grad, g["disc/g"], 2e-5)
    mean = ops.twohot_mean(logits, bins, squash=True)
    assert ((mean - g["disc/mean"][..., 0]).abs() / (1 + mean.abs())).max() < 1e-4
    reward, value, discount = (g[f"lam/{k}"][..., 0].t() for k in ("r", "v", "disc"))
    close(reach_weights(discount), g["lam/weights"][..., 0].t())


def test_gru_of_pieces_golden(golden, variant, near):
    g = golden("dreamerv3_2023_pieces")
    names = ("GRU_linear.weight", "GRU_norm.weight", "GRU_norm.bias")
    args = [g["gru/inp"], g["gru/h"], *(g[f"gru/w/layers.{name}"] for name in names)]
    args = [x.clone().requires_grad_() for x in args]
    out = ops.gru_step_layernorm(*args)
    near(out, g["gru/out"], 2e-6)
    wanted = [g["gru/g_inp"], g["gru/g_h"], *(g[f"gru/g/layers.{name}"] for name in names)]
    for ours, theirs in zip(
        torch.autograd.grad((out * g["gru/cot"]).sum(), args), wanted, strict=True
    ):
        near(ours, theirs, 1e-5)


@pytest.mark.parametrize("which", ["lambda_return_2023", "dreamerv3_2023_pieces"])
def test_lambda_return_golden(which, golden, variant, close):
    """There rewards and discounts of the first row count; ours begin with the second."""
    g = golden(which)
    if which == "lambda_return_2023":
        reward, value, discount = (g[k][..., 0].t() for k in ("reward", "value", "pcont"))
        following = torch.cat([value[:, 1:], g["bootstrap"]], 1)
        want = g["ret"][..., 0].t()
    else:
        reward, value, discount = (g[f"lam/{k}"][..., 0].t() for k in ("r", "v", "disc"))
        following, want = value[:, 1:], g["lam/target"][..., 0].t()
        reward, discount = reward[:, 1:], discount[:, 1:]
    pad = torch.zeros_like(reward[:, :1])
    reward, discount = (torch.cat([pad, x], 1) for x in (reward, discount))
    ours = ops.lambda_return(reward, torch.cat([pad, following], 1), discount, 0.95)
    close(ours, want, rtol=2e-5, atol=2e-5)


# ---- distributions


def test_samples_are_differentiable(near):
    logits = torch.randn(5, 3, requires_grad=True)
    policy = StraightThrough(logits, (3,), 0.01)
    sample = policy.sample(torch.rand(5, 1))
    assert ((sample - sample.round()).abs() < 1e-6).all() and (
        sample.sum(-1) - 1
    ).abs().max() < 1e-6
    weight = torch.randn(5, 3)
    (ours,) = torch.autograd.grad((sample * weight).sum(), logits, retain_graph=True)
    probs = 0.99 * logits.softmax(-1) + 0.01 / 3
    (theirs,) = torch.autograd.grad((probs * weight).sum(), logits)
    near(ours, theirs, 1e-5)


def test_normal_samples_are_clipped_with_the_gradient_of_the_sample():
    mean = torch.tensor([0.0, 3.0]).requires_grad_()
    policy = ClippedNormal(mean, torch.zeros(2), 0.1, 1.0)
    noise = torch.tensor([0.5, 5.0])
    sample = policy.sample(noise)
    free = (policy.mean + policy.std * noise).detach()
    assert sample[0] == free[0] and sample[1] == 1.0 and free[1] > 1.0
    (grad,) = torch.autograd.grad(sample.sum(), mean, retain_graph=True)
    (whole,) = torch.autograd.grad((policy.mean / free.clamp(min=1.0)).sum(), mean)
    assert torch.allclose(grad, whole) and grad[1] > 0


# ---- the loss


def inputs(n=4, horizon=3):
    logits = torch.randn(n, horizon, 3, requires_grad=True)
    policy = StraightThrough(logits, (3,), 0.01)
    action = torch.nn.functional.one_hot(torch.randint(3, (n, horizon)), 3).float()
    advantage = torch.randn(n, horizon, requires_grad=True)
    return logits, policy, action, advantage, torch.rand(n, horizon)


def test_reinforce_scores_actions(close):
    logits, policy, action, advantage, weight = inputs()
    score = torch.randn_like(advantage)
    options = dict(mix=0.3, actent=0.01)
    loss = actor_loss(policy, action, advantage, score, weight, estimator="reinforce", **options)
    chosen = policy.log_probs[0][action.bool()].view_as(score)
    close(loss, -weight * (chosen * score + 0.01 * policy.entropy()))
    grads = torch.autograd.grad(loss.sum(), (logits, advantage), allow_unused=True)
    assert grads[0].abs().sum() > 0 and grads[1] is None


def test_dynamics_differentiates_the_advantage(close):
    logits, policy, action, advantage, weight = inputs()
    options = dict(mix=0.3, actent=0.01)
    loss = actor_loss(policy, action, advantage, advantage, weight, estimator="dynamics", **options)
    close(loss, -weight * (advantage + 0.01 * policy.entropy()))
    grad = torch.autograd.grad(loss.sum(), advantage)[0]
    close(grad, -weight)


def test_both_mixes(close):
    _, policy, action, advantage, weight = inputs()
    one, two, both = (
        actor_loss(policy, action, advantage, advantage, weight, estimator=e, mix=0.3, actent=0.0)
        for e in ("dynamics", "reinforce", "both")
    )
    close(both, 0.3 * one + 0.7 * two)
    grad = torch.autograd.grad(both.sum(), advantage)[0]
    close(grad, -0.3 * weight)


# ---- imagination


class World(nn.Module):
    """A small random world model: rssm and heads."""

    def __init__(self, latent: str, actions: int) -> None:
        super().__init__()
        self.rssm = RSSM(
            7, actions, deter=8, hidden=6, stoch=5, classes=4, latent=latent, obslayers=1,
            imglayers=1, unimix=0.01, initial="learned", mean="none", std="sigmoid2", min_std=0.1,
        )  # fmt: skip
        self.reward = Head(self.rssm.feat_size, 1, units=6, layers=1, outscale=1.0)
        self.cont = Head(self.rssm.feat_size, 1, units=6, layers=1, outscale=1.0)

    def heads(self, features, action):
        return self.reward(features)[..., 0], torch.sigmoid(self.cont(features)[..., 0])


def make(grad, space=CONTINUOUS, latent="onehot", normalize=True):
    world = World(latent, space.encoded_size)
    size = world.rssm.feat_size
    actor = Actor(
        size, space, units=6, layers=1, outscale=1.0, unimix=0.01, min_std=0.1, max_std=1.0
    )
    critic = Critic(size, units=6, layers=1, bins=41, outscale=1.0, slow_rate=0.1,
                    slow_every=1)  # fmt: skip
    norm = ReturnNorm(rate=0.01, limit=1.0, low=5.0, high=95.0)
    options = dict(grad=grad, mix=0.3, normalize_reinforce=normalize, discount=0.9, lam=0.8)
    options |= dict(actent=1e-3, slow_reg=1.0)
    return world, Behavior(actor, critic, norm, options)


def roll(world, task, count=6, horizon=4):
    start = (torch.randn(count, 8), torch.randn(count, *world.rssm.latent.shape))
    source = torch.Generator().manual_seed(3)
    draws = (torch.rand(horizon, count, 5), task.actor.noise((horizon + 1, count), source))
    return task.imagine(world.rssm, start, world.heads, draws, horizon)


@pytest.mark.parametrize("grad", ["reinforce", "dynamics", "both"])
@pytest.mark.parametrize("space", [DISCRETE, CONTINUOUS], ids=lambda s: s.kind)
@pytest.mark.parametrize("latent", ["onehot", "normal"])
def test_gradients_reach_the_actor_alone(grad, space, latent):
    world, task = make(grad, space, latent)
    with frozen(world, task.critic):
        assert not any(p.requires_grad for p in [*world.parameters(), *task.critic.parameters()])
        out = roll(world, task)
    out.policy_loss.mean().backward()
    for name, param in task.actor.named_parameters():
        assert param.grad is not None and param.grad.abs().sum() > 0, name
    others = [*world.parameters(), *task.critic.parameters()]
    assert all(p.grad is None for p in others)
    assert all(p.requires_grad for p in [*world.parameters(), *task.critic.net.parameters()])
    assert not any(p.requires_grad for p in task.critic.slow.parameters())
    loss, slow = task.critic_loss(out)
    assert loss.shape == (6, 4) and slow.shape == (6, 5)
    before = [p.grad.clone() for p in task.actor.parameters()]
    loss.mean().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, task.actor.parameters(), strict=True))
    assert all(p.grad is None for p in world.parameters())
    assert all(p.grad is not None for p in task.critic.net.parameters())


def test_dynamics_gradient_is_that_of_the_imagined_return():
    """Finite differences through actor, world model and critic; normal latents and actions.

    The policy reads detached features, so a horizon of one action is what differences of the whole
    can be compared with: later actions follow from the first one's states.
    """
    world, task = make("dynamics", CONTINUOUS, "normal")
    task.options["actent"] = 0.0
    start = (torch.randn(6, 8), torch.randn(6, 5, 1))
    draws = (torch.rand(1, 6, 5), None)  # no action beyond 1, where samples are clipped

    def loss() -> torch.Tensor:
        with frozen(world, task.critic):
            out = task.imagine(world.rssm, start, world.heads, draws, 1)
        return out.policy_loss.mean()

    params = list(task.actor.parameters())
    grads = torch.autograd.grad(loss(), params, materialize_grads=True)
    flat = torch.nn.utils.parameters_to_vector(params).detach()
    along = torch.cat([g.flatten() for g in grads])
    along /= along.norm()
    ends = []
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(flat + sign * 1e-3 * along, params)
        ends.append(float(loss().detach()))
    slope = (ends[0] - ends[1]) / 2e-3
    assert slope == pytest.approx(float(torch.cat([g.flatten() for g in grads]).norm()), rel=1e-2)


def test_auto_is_reinforce_for_discrete_actions_and_dynamics_for_others():
    assert make("auto", DISCRETE)[1].options["grad"] == "reinforce"
    assert make("auto", CONTINUOUS)[1].options["grad"] == "dynamics"


def test_reinforce_needs_no_graph_through_the_model():
    world, task = make("reinforce", DISCRETE)
    out = roll(world, task)  # nothing frozen: it must not matter
    out.policy_loss.mean().backward()
    assert all(p.grad is None for p in [*world.parameters(), *task.critic.parameters()])


@pytest.mark.parametrize("normalize", [True, False])
def test_reinforce_normalizes_on_request(normalize, close):
    world, task = make("reinforce", DISCRETE, normalize=normalize)
    task.return_norm.range.copy_(torch.tensor([-50.0, 50.0]))
    torch.manual_seed(1)
    out = roll(world, task)
    scale = float(task.return_norm.scale(out.limits))
    assert scale > 90
    values = task.critic.mean(task.critic(out.features))[:, :-1]
    raw = out.returns - values
    torch.manual_seed(1)
    policy = task.actor(out.features[:, :-1])
    assert (out.metrics["adv"] * scale - raw.mean()).abs() < 1e-4
    entropy = 1e-3 * policy.entropy()
    score = -out.policy_loss / out.weight - entropy
    ratio = (score / raw.detach()).detach()
    log_probs = torch.cat(policy.log_probs, -1).detach()
    wanted = ratio * scale if normalize else ratio
    assert ((wanted.unsqueeze(-1) - log_probs).abs().amin(-1) < 1e-2).all()
