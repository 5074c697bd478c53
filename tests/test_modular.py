"""The modular agent: schedule, groups, masks, metrics, components, and what survives a restart."""

import copy
import math

import numpy as np
import pytest
import torch
from modular_cases import CONTINUOUS, DISCRETE, OBS, make_agent, make_batch
from trees import same

import fastwm
from fastwm.agents.modular import GROUPS
from fastwm.spaces import Space
from fastwm.worldmodels.modular import Steps
from fastwm.worldmodels.modular_metrics import Running, open_loop_error

SPACES = pytest.mark.parametrize("space", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])


def count_calls(module) -> list[bool]:
    """Grows by one entry per forward call: whether a graph was wanted."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


def steps_taken(agent) -> list[int]:
    return [int(optimizer.step_count) for optimizer in agent.optimizers.values()]


# ---- schedule


def test_warm_up_trains_the_world_model_alone_and_imagines_nothing():
    agent = make_agent(world_model_warmup_steps=100)
    before = copy.deepcopy(agent.model.state_dict())
    calls = count_calls(agent.model.world.dynamics)
    metrics, _ = agent.update(make_batch())
    assert calls == [True] and metrics["warmup_phase"] == 1.0
    moved = {k.split(".")[0] for k, v in agent.model.state_dict().items() if not v.equal(before[k])}
    assert moved == {"world", "running"}
    assert "actor_loss" not in metrics and "critic_loss" not in metrics
    agent.env_steps = 100
    calls.clear()
    metrics, _ = agent.update(make_batch())
    assert len(calls) == 1 + agent.config.imagination_horizon and metrics["warmup_phase"] == 0.0
    assert steps_taken(agent) == [2, 1, 1]


def test_acting_ends_the_warm_up_and_evaluating_does_not():
    agent = make_agent(world_model_warmup_steps=6)
    rows = {"vector": np.zeros((3, 4), np.float32), "mode": np.zeros(3, np.int32)}
    rows["is_first"] = np.ones(3, bool)
    state = agent.initial_state(3)
    agent.act(rows, state, "greedy", torch.Generator())
    assert agent.env_steps == 0 and agent.warming_up
    agent.act(rows, state, "random")
    agent.act(rows, state)
    assert agent.env_steps == 6 and not agent.warming_up


@pytest.mark.parametrize(
    "counts, dynamics", [((1, 1, 1), 6), ((3, 1, 0), 8), ((1, 2, 1), 11), ((0, 0, 2), 10)]
)
def test_updates_per_batch(counts, dynamics):
    """Nothing is computed for a group whose turn it is not."""
    names = [f"{name}_updates_per_batch" for name in GROUPS]
    agent = make_agent(**dict(zip(names, counts, strict=True)))
    calls = count_calls(agent.model.world.dynamics)
    encoded = count_calls(agent.model.world.encoder)
    agent.update(make_batch())
    assert steps_taken(agent) == list(counts) and len(calls) == dynamics
    assert any(calls) == bool(counts[0] or counts[1])  # the critic alone needs no graph
    stale = counts[0] and max(counts[1:]) > counts[0]  # states changed, and are needed once more
    assert len(encoded) == max(counts[0], 1) + bool(stale)


def test_multi_step_loss_costs_nothing_unless_wanted():
    for weight, calls_wanted in ((0.0, 1), (0.5, 1 + 6)):
        agent = make_agent(multi_step_loss_weight=weight, world_model_warmup_steps=1)
        calls = count_calls(agent.model.world.dynamics)
        metrics, _ = agent.update(make_batch())
        assert len(calls) == calls_wanted and ("multi_step_loss" in metrics) == (weight > 0)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"imagination_horizon": 1}, "imagination_horizon is 1"),
        ({"imagination_horizon": 4}, "imagination_horizon is 4"),
        ({"entropy_coef": 9e-6}, "entropy_coef is 9e-06"),
    ],
)
def test_rarely_meant_settings_warn(settings, words, recwarn):
    make_agent(**settings)
    assert [words in str(w.message) for w in recwarn] == [True]
    recwarn.clear()
    make_agent(imagination_horizon=5, entropy_coef=1e-5)
    assert not recwarn.list


# ---- optimizers


def test_groups_are_disjoint_and_complete_and_have_their_rates():
    agent = make_agent(world_model_lr=1e-2, actor_lr=2e-2, critic_lr=3e-2)
    params = [p for optimizer in agent.optimizers.values() for p in optimizer.params]
    assert len({id(p) for p in params}) == len(params) == len(list(agent.model.parameters()))
    world = {id(p) for p in agent.optimizers["world_model"].params}
    assert all(id(p) in world for p in agent.model.world.decoder.parameters())
    assert [o.lr for o in agent.optimizers.values()] == [1e-2, 2e-2, 3e-2]


def test_each_group_is_clipped_by_its_own_norm():
    agent = make_agent(max_grad_norm=1e-3)
    metrics, _ = agent.update(make_batch())
    for name, optimizer in agent.optimizers.items():
        assert metrics[f"{name}_grad_norm"] > 1e-3  # logged before clipping
        moment = torch.nn.utils.get_total_norm(optimizer.mu)  # a tenth of the clipped gradient
        torch.testing.assert_close(moment, torch.tensor(1e-4), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bad", ["reward", "vector"])
def test_an_update_that_is_not_finite_changes_nothing(bad):
    agent, batch = make_agent(), make_batch()
    agent.update(batch)
    names = ("model", "optimizers")
    before = copy.deepcopy({name: agent.state_dict()[name] for name in names})
    batch[bad][2, 3] = float("inf")
    metrics, _ = agent.update(batch)
    assert not metrics["opt/finite"]
    after = agent.state_dict()
    for tree in (before, after):
        tree["model"] = {k: v for k, v in tree["model"].items() if "running" not in k}
    same(before, {name: after[name] for name in names})
    assert agent.first_nonfinite(batch) == f"batch/{bad}"
    agent.update(make_batch())  # and training goes on
    assert all(torch.isfinite(p).all() for p in agent.model.parameters())


# ---- masks


def test_steps_of_a_window():
    agent, batch = make_agent(), make_batch()
    step: Steps = agent.model.world.steps(batch)
    assert step.valid[0].tolist() == [1, 1, 0, 1, 1, 1]  # the row 2 is the last of its episode
    assert step.cont[0].tolist() == [1, 0, 1, 1, 1, 1]  # the step into it ends the episode
    assert step.cont[1].tolist() == [1, 1, 1, 1, 1, 1]  # a cut is no end
    assert step.ongoing[1].tolist() == [1, 1, 1, 0, 1, 1]
    assert step.reward.equal(batch["reward"][:, 1:])
    assert step.action[..., 1].equal(batch["prev_action"][:, 1:].float())


def test_what_crosses_an_episodes_end_trains_nothing():
    """The reward and action of the row after an end, and what is imagined from a terminal row."""
    agent, batch = make_agent(actor_lr=0.1), make_batch()
    other = {key: value.clone() for key, value in batch.items()}
    other["reward"][0, 3] += 100.0
    other["prev_action"][0, 3] = 1 - other["prev_action"][0, 3]
    one, two = agent.model.world, copy.deepcopy(agent.model.world)
    first = one.losses(one.observe(batch), one.steps(batch))[0]
    second = two.losses(two.observe(other), two.steps(other))[0]
    assert first.equal(second)
    states = one.observe(batch).states.detach()
    alive = 1.0 - batch["is_terminal"].float()
    agent.generator.manual_seed(1)
    loss, _ = agent.actor_step(agent.imagine(states, alive, False))
    states[0, 2] += 10.0  # the terminal row
    agent.generator.manual_seed(1)
    again, _ = agent.actor_step(agent.imagine(states, alive, False))
    assert loss.equal(again)


@pytest.mark.parametrize("where, loss", [("reward", "reward_loss"), ("cont", "continue_loss")])
def test_heads_read_the_state_they_are_told_to(where, loss):
    """Changing the last row changes a head's loss only where it reads the state after the step."""
    key = {"reward": "reward_input", "cont": "continue_input"}[where]
    for setting in ("state", "next_state"):
        world, batch = make_agent(**{key: setting}).model.world, make_batch()
        before = world.losses(world.observe(batch), world.steps(batch))[1][loss]
        batch["vector"][:, -1] += 1.0
        after = world.losses(world.observe(batch), world.steps(batch))[1][loss]
        assert before.equal(after) == (setting == "state")


def test_discount_weights_count_steps_as_often_as_they_are_reached():
    agent = make_agent(imagination_discount_weights=True, gamma=0.9)
    states = torch.randn(3, 7, agent.model.world.state_size)
    rollout = agent.imagine(states, torch.ones(3, 7), False)
    expected = torch.ones(21)
    for t in range(5):
        torch.testing.assert_close(rollout.weight[:, t], expected)
        expected = expected * 0.9 * rollout.cont[:, t]


# ---- optional extras


def test_extras_are_off_by_default_and_do_what_they_say():
    plain, _ = make_agent().update(make_batch())
    assert plain["actor_return_scale"] == 1.0 and plain["critic_real_mix"] == 0.0
    clipped, _ = make_agent(critic_target_clip=0.01).update(make_batch())
    assert clipped["critic_target_std"] <= 0.01 < plain["critic_target_std"]
    standard, _ = make_agent(critic_target_standardize=True).update(make_batch())
    torch.testing.assert_close(standard["critic_target_std"], torch.tensor(1.0), rtol=0.2, atol=0)
    scaled, _ = make_agent(actor_normalize_returns=True).update(make_batch())
    assert scaled["actor_return_scale"] != 1.0
    assert scaled["actor_loss"] != plain["actor_loss"]


def test_the_real_mix_is_a_one_step_target_on_replayed_rows():
    agent, batch = make_agent(critic_real_return_mix=1.0), make_batch()
    states = agent.model.world.observe(batch).states.detach()
    step, alive = agent.model.world.steps(batch), torch.ones(3, 7)
    loss, metrics = agent.critic_step(agent.imagine(states, alive, False), states, step)
    value = agent.model.value(states).detach()
    target = step.reward + 0.99 * step.cont * value[:, 1:]
    error = (value[:, :-1] - target).square()[step.valid.bool()]
    torch.testing.assert_close(loss.detach(), error.mean())
    assert metrics["critic_real_mix"] == 1.0


@pytest.mark.parametrize("mode, parts", [("accumulate", 2), ("replace", 1), ("none", 0)])
def test_what_the_representation_loss_shows(mode, parts):
    agent = make_agent(decoder_mode=mode, representation__options__reconstruct=True)
    found, _ = agent.update(make_batch())
    own, decoder = found["representation_own_loss"], found["decoder_reconstruction_loss"]
    expected = {2: own + decoder, 1: decoder, 0: own}[parts]
    assert own > 0 and found["representation_loss"].equal(expected)
    total = sum(found[n] for n in ("dynamics_loss", "reward_loss", "continue_loss")) + own + decoder
    torch.testing.assert_close(found["world_model_loss"], total)


# ---- metrics


def test_running_shares_and_correlation():
    running = Running(decay=1.0)
    cont = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0]])
    going = torch.tensor([[True, False, False, True, True]])
    true = torch.tensor([[0.0, 1.0, 2.0, 3.0, 100.0]])
    weight = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]])  # the last row does not exist
    running.add(going, cont, -2.0 * true + 1.0, true, weight)
    found = {name: float(value) for name, value in running.read().items()}
    assert found["continue_accuracy"] == 0.5
    assert found["continue_precision"] == found["continue_recall"] == 0.5
    assert found["continue_precision_0"] == found["continue_recall_0"] == 0.5
    assert math.isclose(found["reward_corr"], -1.0, rel_tol=1e-5)


def test_a_bad_batch_does_not_stay_in_the_shares():
    agent, batch = make_agent(), make_batch()
    agent.update(batch | {"reward": batch["reward"] * float("inf")})
    metrics, _ = agent.update(batch)
    assert torch.isfinite(metrics["reward_corr"]) and torch.isfinite(metrics["continue_accuracy"])


def test_a_reward_that_never_changes_has_no_correlation():
    running = Running()
    for _ in range(50):
        ones = torch.ones(4, 8)
        running.add(ones > 0, ones, torch.randn(4, 8), ones, ones)
    found = running.read()
    assert torch.isnan(found["reward_corr"]) and torch.isnan(found["continue_recall_0"])
    assert found["continue_accuracy"] == 1.0


def test_open_loop_error_of_a_perfect_and_a_lazy_model():
    world, batch = make_agent(dynamics__options__residual=True).model.world, make_batch(length=6)
    step = world.steps(batch)
    seen = world.observe(batch)
    path = world.open_loop(seen.states, step.action, 1)
    perfect = open_loop_error(world, seen._replace(states=path), step)
    assert set(perfect) == {"openloop_error_1", "openloop_error_5"}
    assert all(value < 1e-10 for value in perfect.values())
    lazy = open_loop_error(world, seen, step)
    expected = (path - seen.states).square().mean(-1)[:, 1].mean()
    expected = expected / seen.states.flatten(0, 1).var(0, correction=0).mean()
    torch.testing.assert_close(lazy["openloop_error_1"], expected)


@SPACES
def test_every_metric_is_a_number_on_the_device(space):
    agent = make_agent(space, openloop_every=1)
    metrics, latents = agent.update(make_batch(space))
    assert latents == {} and len(metrics) > 40
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    assert ("entropy_share" in metrics) == (space is DISCRETE)


# ---- what survives


@SPACES
def test_state_round_trip(space):
    agent, batch = make_agent(space, openloop_every=2), make_batch(space)
    for _ in range(3):
        agent.update(batch)
    other = make_agent(space, openloop_every=2)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    for seed in range(2):
        one = agent.update(make_batch(space, seed=seed))[0]
        same(one, other.update(make_batch(space, seed=seed))[0])
    same(agent.state_dict(), other.state_dict())


def test_a_checkpoint_of_other_components_is_refused():
    agent = make_agent()
    other = make_agent(policy__options__hidden=[8, 8])
    with pytest.raises((ValueError, RuntimeError)):
        other.load_state_dict(agent.state_dict())


def test_a_changed_rate_applies_after_loading():
    agent, other = make_agent(), make_agent(actor_lr=0.5)
    agent.update(make_batch())
    other.load_state_dict(agent.state_dict())
    assert other.optimizers["actor"].lr == 0.5


@SPACES
def test_the_saved_policy_acts_like_the_agent(space, tmp_path):
    agent = make_agent(
        space, observation_scale="normalize", representation__name="gru", representation__options={}
    )
    agent.update(make_batch(space))  # which moves what observations are normalized with
    agent.save_policy(tmp_path / "policy.pt")
    policy, state, mine = fastwm.load_policy(tmp_path / "policy.pt"), None, agent.initial_state(3)
    for t in range(3):
        obs = {"vector": np.random.randn(3, 4).astype(np.float32), "mode": np.full(3, t, np.int32)}
        first = np.array([t == 0, t == 0, t != 1])
        action, state = policy(obs, state, first)
        expected, mine, _ = agent.act(obs | {"is_first": first}, mine, "greedy", torch.Generator())
        np.testing.assert_array_equal(action, expected)
        same(state, mine)


def test_random_actions_cover_the_space_evenly():
    for space in (Space("discrete", (2,), (3, 2)), CONTINUOUS):
        agent = make_agent(space)
        rows = {"vector": np.zeros((900, 4), np.float32), "mode": np.zeros(900, np.int32)}
        rows["is_first"] = np.ones(900, bool)
        action, _, _ = agent.act(rows, agent.initial_state(900), "random")
        assert action.shape == (900, 2)
        if space is CONTINUOUS:
            assert action.min() < -0.95 and action.max() > 0.95 and abs(action.mean()) < 0.1
        else:
            counts = np.bincount(action[:, 0], minlength=3)
            assert (counts > 250).all() and abs(action[:, 1].mean() - 0.5) < 0.06


def test_observations_named_like_replay_columns_are_refused():
    with pytest.raises(ValueError, match=r"got \['reward'\]; rename"):
        make_agent(obs_space=OBS | {"reward": Space("vector", ())}).replay_spec()
