"""Whose parameters each loss moves: the modular recipe's seven equivalences, T1 to T7."""

import copy
import weakref

import pytest
import torch
from modular_cases import CONTINUOUS, DISCRETE, grads, group_of, make_agent, make_batch

from fastwm.agents.modular import frozen
from fastwm.worldmodels import losses

SPACES = pytest.mark.parametrize("space", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
ALL = {"world_model", "actor", "critic"}


def gradients_of_an_update(agent, batch, due=ALL) -> dict[str, dict]:
    """Gradients by group as `iterate` leaves them before clipping; nothing is applied."""
    found = {}

    def note(due, terms):
        found.update({name: grads(module) for name, module in group_of(agent).items()})
        return torch.tensor(True), {}

    agent.apply = note
    agent.iterate(batch, agent.model.world.steps(batch), set(due), None)
    return found


def same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] is None) == (two[name] is None), name
        assert one[name] is None or torch.equal(one[name], two[name]), name


def actor_loss_plain(agent, batch, noise):
    """The actor's loss with nothing frozen, written out once more."""
    world, config, policy = agent.model.world, agent.config, agent.model.policy
    start = world.observe(batch).states.detach().flatten(0, 1)
    path, _, reward, cont = world.imagine(start, policy, noise, config.imagination_gumbel_tau, True)
    value = agent.model.value(path)
    returns = losses.imagined_returns(reward, value, cont, config.gamma, config.lambda_return)
    entropy = policy(path[:, :-1].detach()).entropy()
    weight = (1.0 - batch["is_terminal"].float()).reshape(-1, 1).expand_as(returns)
    mean = (returns * weight).sum() / weight.sum()
    return -mean - config.entropy_coef * (entropy * weight).sum() / weight.sum(), path, returns


def drawn_noise(agent, batch):
    """The noise that the agent's next imagination will draw."""
    generator = torch.Generator().set_state(agent.generator.get_state())
    rows = batch["is_first"].numel()
    return agent.model.policy.noise((agent.config.imagination_horizon, rows), generator)


@SPACES
def test_t1_freezing_equals_asking_for_the_policys_gradient_alone(space):
    agent, batch = make_agent(space, imagination_gumbel_tau=0.7), make_batch(space)
    loss, path, returns = actor_loss_plain(agent, batch, drawn_noise(agent, batch))
    policy = dict(agent.model.policy.named_parameters())
    expected = torch.autograd.grad(loss, list(policy.values()), retain_graph=True)
    value = agent.model.value(path[:, :-1].detach())
    weight = (1.0 - batch["is_terminal"].float()).reshape(-1, 1).expand_as(returns)
    critic = losses.critic_loss(value, returns, weight)
    critic = torch.autograd.grad(critic, list(agent.model.value.parameters()))
    found = gradients_of_an_update(agent, batch)
    assert any(grad.abs().max() > 1e-6 for grad in expected)
    for grad, other in zip(found["actor"].values(), expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-8)
    for grad, other in zip(found["critic"].values(), critic, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-8)


@SPACES
def test_t2_the_critics_loss_leaves_the_policys_gradient_alone(space):
    batch = make_batch(space)
    both = gradients_of_an_update(make_agent(space), batch, {"actor", "critic"})
    alone = gradients_of_an_update(make_agent(space), batch, {"actor"})
    same(both["actor"], alone["actor"])
    assert all(grad is None for grad in alone["critic"].values())
    assert any(grad.abs().max() > 0 for grad in both["critic"].values())


@SPACES
def test_t3_the_actors_loss_leaves_no_gradient_elsewhere(space):
    agent = make_agent(space)
    found = gradients_of_an_update(agent, make_batch(space), {"actor"})
    assert all(grad is None for grad in found["world_model"].values())
    assert all(grad is None for grad in found["critic"].values())
    assert all(grad is not None for grad in found["actor"].values())
    assert all(p.requires_grad for p in agent.model.parameters())  # thawed again


@SPACES
def test_t4_the_world_models_gradient_is_its_own(space):
    batch = make_batch(space)
    every = gradients_of_an_update(make_agent(space, multi_step_loss_weight=0.5), batch)
    alone = gradients_of_an_update(
        make_agent(space, multi_step_loss_weight=0.5), batch, {"world_model"}
    )
    same(every["world_model"], alone["world_model"])
    assert all(grad is not None for grad in alone["world_model"].values())


@SPACES
def test_t5_finite_differences_of_the_actors_loss(space):
    """float64; soft actions where they are discrete, because a one-hot has no derivative."""
    # The entropy is taken at detached states, so that its path through them is not in the gradient.
    soft = {"imagination_gumbel_hard": False, "entropy_coef": 1e-5}
    agent = make_agent(space, **soft, policy__options__activation="tanh")
    agent.model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in make_batch(space).items()}
    world = agent.model.world
    states = torch.randn(3, 7, world.state_size, dtype=torch.float64)
    alive = torch.ones(3, 7, dtype=torch.float64)
    noise = drawn_noise(agent, batch).double()
    agent.model.policy.noise = lambda lead, generator: noise

    def loss() -> torch.Tensor:
        with frozen(world, agent.model.value):
            return agent.actor_step(agent.imagine(states, alive, True))[0]

    loss().backward()
    weight = list(agent.model.policy.parameters())[0]
    for index in ((0, 0), (1, 2), (3, 1)):
        with torch.no_grad():
            weight[index] += 1e-6
            above = loss()
            weight[index] -= 2e-6
            below = loss()
            weight[index] += 1e-6
        difference = (above - below) / 2e-6
        torch.testing.assert_close(weight.grad[index], difference, rtol=1e-4, atol=1e-7)


@SPACES
def test_t6_one_update_equals_three_separate_ones(space):
    """Three copies, each with its own forward and backward, clipped and stepped by torch."""
    agent, batch = make_agent(space, entropy_coef=0.05), make_batch(space)
    copies = [copy.deepcopy(agent) for _ in ALL]
    noise = drawn_noise(agent, batch)
    agent.update(batch)
    for naive, name in zip(copies, sorted(ALL), strict=True):
        world = naive.model.world
        if name == "world_model":
            loss = world.losses(world.observe(batch), world.steps(batch))[0]
        else:
            loss, path, returns = actor_loss_plain(naive, batch, noise)
        if name == "critic":
            value = naive.model.value(path[:, :-1].detach())
            weight = (1.0 - batch["is_terminal"].float()).reshape(-1, 1).expand_as(returns)
            loss = losses.critic_loss(value, returns, weight)
        part = group_of(naive)[name]
        lr = getattr(naive.config, f"{name}_lr")
        adam = torch.optim.Adam(part.parameters(), lr)
        naive.model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(part.parameters(), naive.config.max_grad_norm)
        adam.step()
        moved = dict(group_of(agent)[name].named_parameters())
        for key, p in part.named_parameters():
            torch.testing.assert_close(moved[key], p, rtol=1e-5, atol=1e-7)


class Kept:
    """Counts the bytes that autograd graphs hold, now and at most."""

    def __init__(self) -> None:
        self.uses: dict[int, int] = {}
        self.bytes = self.peak = 0

    def pack(self, x):
        holder = Holder(x)
        storage = x.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        self.uses[pointer] = self.uses.get(pointer, 0) + 1
        if self.uses[pointer] == 1:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        weakref.finalize(holder, self.release, pointer, size)
        return holder

    def release(self, pointer: int, size: int) -> None:
        self.uses[pointer] -= 1
        if self.uses[pointer] == 0:
            self.bytes -= size


class Holder:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def peak_bytes(run) -> int:
    kept = Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda holder: holder.tensor):
        run()
    return kept.peak


def test_t7_graphs_hold_less_than_with_one_retained_graph():
    """Retaining keeps world model, imagination and critic alive together, weights included."""
    agent, batch = make_agent(), make_batch(size=8, length=16)
    world, step = agent.model.world, agent.model.world.steps(batch)
    noise = drawn_noise(agent, batch)

    def retained() -> None:
        total = world.losses(world.observe(batch), step)[0]
        loss, path, returns = actor_loss_plain(agent, batch, noise)
        critic = (agent.model.value(path[:, :-1]) - returns.detach()).square().mean()
        total.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        critic.backward()

    naive = peak_bytes(retained)
    clean = peak_bytes(lambda: agent.iterate(batch, step, ALL, None))
    assert 0 < clean < 0.7 * naive, (clean, naive)
