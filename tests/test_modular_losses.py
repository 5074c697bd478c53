"""The losses of the modular recipe against hand-computed numbers and plain loops."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal

from fastwm.worldmodels import losses


def normal(mean, std):
    return Normal(torch.tensor(mean), torch.tensor(std), validate_args=False)


# ---- one step


def test_dynamics_loss_by_hand():
    dist, target = normal([[0.0, 1.0]], [[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    assert losses.dynamics_loss(dist, target, "mse").tolist() == [4.5]  # (9 + 0) / 2
    nll = ((0.5 * math.log(2 * math.pi) + 4.5) + (math.log(2) + 0.5 * math.log(2 * math.pi))) / 2
    torch.testing.assert_close(losses.dynamics_loss(dist, target, "nll"), torch.tensor([nll]))


def test_an_unknown_kind_of_dynamics_is_named():
    with pytest.raises(ValueError, match="'mse', 'nll'.*got 'huber'"):
        losses.dynamics_loss(normal([0.0], [1.0]), torch.zeros(1), "huber")


def test_reward_loss_pays_for_too_much_and_too_little_spread():
    reward = torch.tensor([1.0, -1.0, 1.0, -1.0])
    by_spread = {
        std: losses.reward_loss(normal([0.0] * 4, [std] * 4), reward).mean()
        for std in (0.3, 1.0, 3.0)
    }
    assert by_spread[1.0] < by_spread[0.3] and by_spread[1.0] < by_spread[3.0]
    torch.testing.assert_close(by_spread[1.0], torch.tensor(0.5 * math.log(2 * math.pi) + 0.5))


def test_continue_loss_is_binary_cross_entropy():
    dist = Bernoulli(torch.tensor([0.7, 0.7]), validate_args=False)
    found = losses.continue_loss(dist, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([-math.log(0.7), -math.log(0.3)]))


def test_reconstruction_loss_is_a_mean_over_elements():
    recon, target = torch.zeros(2, 3, 4, 5), torch.full((2, 3, 4, 5), 2.0)
    found = losses.reconstruction_loss(recon, target, 2)
    assert found.shape == (2, 3) and found.eq(4.0).all()
    scalar = losses.reconstruction_loss(torch.zeros(2, 3), torch.ones(2, 3), 2)
    assert scalar.shape == (2, 3) and scalar.eq(1.0).all()


def test_weighted_mean_ignores_what_has_no_weight():
    value = torch.tensor([1.0, float("nan"), 3.0], requires_grad=True)
    mean = losses.weighted_mean(value, torch.tensor([1.0, 0.0, 3.0]))
    assert mean == 2.5
    mean.backward()
    assert value.grad.tolist() == [0.25, 0.0, 0.75]
    assert losses.weighted_mean(torch.ones(2), torch.zeros(2)) == 0.0


# ---- several steps


def loop_rollout_mse(predict, start, action, target, cont, valid):
    """Row by row, step by step, with breaks."""
    total, count = 0.0, 0
    for b in range(action.shape[0]):
        if not valid[b]:
            continue
        state = start[b : b + 1]
        for t in range(action.shape[1]):
            state = predict(state, action[b : b + 1, t])
            total = total + (state - target[b : b + 1, t]).square().mean()
            count += 1
            if cont[b, t] == 0:
                break
    return total / count if count else torch.zeros(())


def rollout_inputs(cont):
    cont = torch.tensor(cont)
    batch, length = cont.shape
    weight = torch.randn(3, 5) * 0.5
    weight.requires_grad_()

    def predict(state, action):
        return torch.tanh(torch.cat([state, action], -1) @ weight.T)

    start, target = torch.randn(batch, 3), torch.randn(batch, length, 3)
    return weight, predict, start, torch.randn(batch, length, 2), target, cont


CONTS = {
    "no end": [[1.0, 1.0, 1.0, 1.0]] * 3,
    "all end at once": [[0.0, 0.0, 0.0, 0.0]] * 3,
    "mixed": [[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]],
}


@pytest.mark.parametrize("valid", [[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("cont", CONTS.values(), ids=CONTS)
def test_rollout_equals_a_loop(cont, valid):
    weight, predict, *rest = rollout_inputs(cont)
    valid = torch.tensor(valid)
    found = losses.masked_rollout_mse(predict, *rest, valid)
    expected = loop_rollout_mse(predict, *rest, valid)
    torch.testing.assert_close(found, expected)
    (one,) = torch.autograd.grad(found, weight)
    two = torch.zeros_like(one)
    if valid.any():
        (two,) = torch.autograd.grad(expected, weight)
    torch.testing.assert_close(one, two)


def test_rollout_counts_the_step_that_ends_and_none_after():
    start, action = torch.zeros(1, 1), torch.zeros(1, 3, 1)
    target, cont = torch.tensor([[[1.0], [2.0], [100.0]]]), torch.tensor([[1.0, 0.0, 1.0]])
    found = losses.masked_rollout_mse(lambda s, a: s + 0, start, action, target, cont)
    assert found == (1.0 + 4.0) / 2


def test_rollout_predicts_from_its_own_predictions():
    seen = []

    def predict(state, action):
        seen.append(state.item())
        return state + 1

    target = torch.full((1, 3, 1), 50.0)
    args = (torch.zeros(1, 1), torch.zeros(1, 3, 1), target)
    losses.masked_rollout_mse(predict, *args, torch.tensor([[1.0, 0.0, 1.0]]))
    assert seen == [0.0, 1.0, 50.0]  # after the end it starts over from the truth


# ---- behavior


def test_returns_by_hand():
    """gamma 0.5, lambda 0.5, the episode may end with the second step (c = 0.5).

    G_2 = 3 + 0.5 * 8 = 7
    G_1 = 2 + 0.25 * (0.5 * 6 + 0.5 * 7) = 3.625
    G_0 = 1 + 0.5 * (0.5 * 4 + 0.5 * 3.625) = 2.90625

    With V(s_t) in place of V(s_{t+1}), and V(s_{H-1}) at the end, it would be 6, 3.25 and 2.3125.
    """
    reward, cont = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 0.5, 1.0]])
    value = torch.tensor([[2.0, 4.0, 6.0, 8.0]])
    found = losses.imagined_returns(reward, value, cont, 0.5, 0.5)
    assert found.tolist() == [[2.90625, 3.625, 7.0]]


@pytest.mark.parametrize("lam, expected", [(0.0, [5.0, 8.0]), (1.0, [1 + 8.0, 8.0])])
def test_returns_at_the_ends_of_lambda(lam, expected):
    reward, value = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0, 6.0]])
    found = losses.imagined_returns(reward, value, torch.ones(1, 2), 1.0, lam)
    assert found.tolist() == [expected]


def test_returns_are_differentiable_in_all_three():
    tensors = [torch.rand(2, n, requires_grad=True, dtype=torch.float64) for n in (3, 4, 3)]
    assert torch.autograd.gradcheck(lambda *x: losses.imagined_returns(*x, 0.9, 0.8), tensors)


def test_returns_say_what_shapes_they_take():
    with pytest.raises(ValueError, match=r"value \(N, H \+ 1\).*got \(2, 3\), \(2, 3\)"):
        losses.imagined_returns(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), 0.9, 0.9)


def test_actor_loss_by_hand():
    returns, entropy = torch.tensor([[2.0, 4.0]]), torch.tensor([[1.0, 0.5]])
    weight = torch.tensor([[1.0, 3.0]])
    found = losses.actor_loss(returns, entropy, weight, 0.1)
    torch.testing.assert_close(found, torch.tensor(-3.5 - 0.1 * 0.625))


def test_critic_loss_never_reaches_the_target():
    value = torch.tensor([[1.0]], requires_grad=True)
    target = torch.tensor([[3.0]], requires_grad=True)
    loss = losses.critic_loss(value, target, torch.ones(1, 1))
    loss.backward()
    assert loss == 4.0 and value.grad.item() == -4.0 and target.grad is None


def test_critic_targets():
    returns = torch.tensor([[-10.0, 0.0, 10.0, 4.0]], requires_grad=True)
    assert losses.critic_targets(returns, None, False).equal(returns.detach())
    assert losses.critic_targets(returns, 5.0, False).tolist() == [[-5.0, 0.0, 5.0, 4.0]]
    standard = losses.critic_targets(returns, None, True)
    torch.testing.assert_close(standard.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(standard.std(correction=0), torch.tensor(1.0))
    assert not standard.requires_grad
