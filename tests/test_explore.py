"""Exploration: the ensemble, what it rewards, who acts when, and that the task's policy stays."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_dreamer_2023 import batch_of
from trees import same

from fastwm import config
from fastwm.agents.dreamer import DreamerAgent
from fastwm.agents.dreamer_2023 import DreamerAgent2023
from fastwm.config_common import Expl
from fastwm.explore import Disagreement
from fastwm.rssm_2023 import RSSM
from fastwm.spaces import Space
from fastwm.worldmodels.dreamer import Posterior

VECTOR, DISCRETE = {"vector": Space("vector", (3,))}, Space("discrete", (), (4,))
CONTINUOUS = Space("continuous", (2,))
SMALL = "--expl.disag_models 3 --expl.disag_layers 2 --expl.disag_units 8".split()
AGENTS = {"dreamerv3": DreamerAgent, "dreamerv3_2023": DreamerAgent2023}


def make(algorithm, behavior="plan2explore", *flags, act=DISCRETE):
    argv = [algorithm, "debug", "--expl.behavior", behavior, *SMALL, *flags]
    return AGENTS[algorithm](VECTOR, act, config.load(argv)[0])


def rows_of(agent, batch=4, length=8):
    rows = batch_of(agent, batch, length)
    if "deter" in agent.replay_spec():
        rows["deter"] = torch.randn(batch, agent.config.rssm.deter).bfloat16()
        rows["stoch"] = torch.randint(4, (batch, 4), dtype=torch.uint8)
    return rows


def ensemble(**options):
    torch.manual_seed(0)
    rssm = RSSM(
        7, 3, deter=8, hidden=6, stoch=5, classes=4, latent="onehot", obslayers=1, imglayers=1,
        unimix=0.01, initial="learned", mean="none", std="sigmoid2", min_std=0.1,
    )  # fmt: skip
    small = dict(disag_models=4, disag_layers=2, disag_units=16)
    return Disagreement(rssm, 3, replace(Expl(), **{**small, **options}))


def posterior(batch=3, time=6):
    stoch = F.one_hot(torch.randint(4, (batch, time, 5)), 4).float()
    return Posterior(torch.randn(batch, time, 8), torch.randn(batch, time, 5, 4), stoch)


# ---- the ensemble


def test_heads_as_one_product_equal_heads_one_by_one(close):
    heads, x = ensemble(), torch.randn(9, 31)
    for k, together in enumerate(heads(x)):
        one = x
        for i, (weight, bias) in enumerate(zip(heads.weights, heads.biases, strict=True)):
            one = one @ weight[k] + bias[k]
            if i < 2:
                one = F.silu(F.layer_norm(one, one.shape[-1:], eps=1e-3))
        close(together, one)
    assert not torch.allclose(heads(x)[0], heads(x)[1])


@pytest.mark.parametrize("target, width", [("stoch", 20), ("deter", 8), ("feat", 28)])
@pytest.mark.parametrize("offset", [1, 2])
@pytest.mark.parametrize("cond", [True, False])
def test_what_a_head_sees_and_predicts(target, width, offset, cond, close):
    heads = ensemble(disag_target=target, disag_offset=offset, disag_action_cond=cond)
    post, action = posterior(), torch.randn(3, 6, 3)
    first = torch.zeros(3, 6, dtype=torch.bool)
    loss = heads.losses(post, action, first)
    assert loss.shape == (3, 6 - offset)
    stoch = post.stoch.flatten(-2)
    features = torch.cat([post.deter, stoch], -1)
    goal = {"stoch": stoch, "deter": post.deter, "feat": features}[target]
    assert goal.shape[-1] == width
    b, t = 1, 2  # at row t the action that led to row t + 1 was taken
    seen = torch.cat([features[b, t], action[b, t + 1]] if cond else [features[b, t]])
    error = heads(seen.unsqueeze(0))[:, 0] - goal[b, t + offset]
    close(loss[b, t], 0.5 * error.square().sum(-1).mean())


def test_nothing_is_predicted_across_an_episode_s_end():
    heads, post, action = ensemble(disag_offset=2), posterior(), torch.randn(3, 6, 3)
    first = torch.zeros(3, 6, dtype=torch.bool)
    first[0, 3] = first[1, 0] = True
    loss = heads.losses(post, action, first)
    assert (loss[0, [1, 2]] == 0).all() and (loss[0, [0, 3]] > 0).all()
    assert (loss[1:] > 0).all()  # an episode that begins with the window is whole


@pytest.mark.parametrize("log", [True, False])
def test_the_reward_is_the_disagreement_about_what_was_done(log, close):
    heads = ensemble(disag_log=log)
    features, action = torch.randn(2, 4, 28), torch.randn(2, 4, 3)
    reward = heads.reward(features, action)
    assert reward.shape == (2, 4) and (reward[:, 0] == 0).all()
    means = heads(torch.cat([features[1, 2], action[1, 2]]).unsqueeze(0))[:, 0]
    wanted = means.std(0).mean()
    close(reward[1, 3], wanted.log() if log else wanted)
    with torch.no_grad():  # heads that agree
        for parameter in heads.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    assert heads.reward(features, action).isfinite().all()


def test_it_falls_where_the_ensemble_has_learned():
    heads = ensemble(disag_log=False)
    post, action = posterior(16, 6), torch.randn(16, 6, 3)
    first = torch.zeros(16, 6, dtype=torch.bool)
    features = torch.cat([post.deter, post.stoch.flatten(-2)], -1)
    strange = (3 * torch.randn(16, 6, 28), 3 * torch.randn(16, 6, 3))
    taken = action.roll(-1, 1)  # row t holds what is done there
    before = heads.reward(features, taken)[:, 1:].mean()
    adam = torch.optim.Adam(heads.parameters(), 3e-3)
    for _ in range(150):
        adam.zero_grad()
        heads.losses(post, action, first).mean().backward()
        adam.step()
    known = heads.reward(features, taken)[:, 1:].mean()
    assert known < 0.5 * before and known < 0.5 * heads.reward(*strange)[:, 1:].mean()


def test_rewards_mix_by_their_scales(close):
    heads = ensemble(intr_scale=0.5, extr_scale=2.0)
    features, action, extrinsic = torch.randn(2, 4, 28), torch.randn(2, 4, 3), torch.randn(2, 4)
    own = heads.reward(features, action)
    close(heads.mixed(features, action, extrinsic), 0.5 * own + 2.0 * extrinsic)


# ---- the agents


@pytest.mark.parametrize("algorithm", AGENTS)
@pytest.mark.parametrize("act", [DISCRETE, CONTINUOUS], ids=lambda s: s.kind)
def test_an_update_trains_ensemble_and_explorer(algorithm, act):
    agent = make(algorithm, act=act)
    before = {n: p.detach().clone() for n, p in agent.model.named_parameters()}
    for _ in range(3):
        metrics, _ = agent.update(rows_of(agent))
        assert metrics["opt/finite"]
    names = {f"loss/expl/{name}" for name in ("disag", "policy", "value")} | {"expl/rew"}
    assert names <= set(metrics)
    new = {n for n, p in agent.model.named_parameters() if not torch.equal(p, before[n])}
    for part in ("explorer.actor", "explorer.critic.net") if algorithm == "dreamerv3" else (
        "explorer.actor", "explorer.critic.net", "disagreement"
    ):  # fmt: skip
        assert any(name.startswith(part) for name in new), part


def test_the_explorer_does_not_touch_world_and_task_2023():
    """The same draws, with and without an explorer: the same world model, actor and critic."""
    one, two = make("dreamerv3_2023"), make("dreamerv3_2023", "greedy")
    state = {k: v for k, v in one.model.state_dict().items() if k in two.model.state_dict()}
    two.model.load_state_dict(state)
    rows, noise = rows_of(one), one.draw_noise(4, 8)
    for agent in (one, two):
        agent.draw_noise = lambda *shape: noise
        agent.update(rows)
    same({k: one.model.state_dict()[k] for k in state}, dict(two.model.state_dict()))


def test_the_explorer_does_not_touch_world_and_task_2024():
    agent = make("dreamerv3")
    out = agent.losses(rows_of(agent), agent.draw_noise(4, 8))
    sum(term.mean() for name, term in out.terms.items() if name.startswith("expl/")).backward()
    touched = {n for n, p in agent.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched and all(name.startswith("explorer.") for name in touched)


@pytest.mark.parametrize("algorithm", AGENTS)
def test_who_acts(algorithm):
    agent = make(algorithm, "plan2explore", "--expl.until", "6")
    explorer, task = agent.model.explorer.actor, agent.model.actor
    assert agent.who_acts("greedy", 2) == ("greedy", task)  # evaluation, which does not count
    assert agent.who_acts("random", 2) == ("random", task)  # prefill, which does
    assert [agent.who_acts("train", 2)[1] for _ in range(4)] == [explorer, explorer, task, task]
    fresh = make(algorithm, "plan2explore", "--expl.until", "6")
    fresh.load_state_dict(copy.deepcopy(agent.state_dict()))
    assert fresh.who_acts("train", 2)[1] is fresh.model.actor
    assert make(algorithm, "random").who_acts("train", 2)[0] == "random"
    usual = make(algorithm, "greedy")
    assert usual.model.explorer is None and usual.who_acts("train", 2) == (
        "train",
        usual.model.actor,
    )


@pytest.mark.parametrize("algorithm", AGENTS)
def test_training_follows_the_explorer_and_evaluation_the_task(algorithm):
    agent = make(algorithm)
    for actor, choice in ((agent.model.actor, 1), (agent.model.explorer.actor, 2)):
        with torch.no_grad():
            actor.heads["logits"].weight.zero_()
            actor.heads["logits"].bias.zero_()[choice] = 100.0
    rows = {"vector": np.zeros((64, 3), np.float32), "is_first": np.ones(64, bool)}
    found = {}
    for mode in ("train", "greedy"):
        found[mode] = agent.act(rows, agent.initial_state(64), mode)[0]
    assert (found["train"] == 2).mean() > 0.9 and (found["greedy"] == 1).all()


def test_settings_that_cannot_be():
    with pytest.raises(config.ConfigError, match="expl.disag_offset: expected less than batch_len"):
        config.load(["dreamerv3", "debug", "--expl.disag_offset", "8"])


def test_the_measurement_counts_what_was_seen(monkeypatch):
    """benchmarks/explore_minigrid.py, for a few steps and without an update."""
    pytest.importorskip("minigrid")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import explore_minigrid as bench

    argv = ["dreamerv3", "cartpole", *bench.SMALL, "--task", "explore_minigrid:make"]
    found = bench.measure([*argv, "--expl.behavior", "random"], 160, 80)
    (first, second), updates = found["curve"], found["updates"]
    assert updates == 0 and first["env_steps"] == 80 and second["env_steps"] == 160
    assert 1 < first["cells"] <= second["cells"] <= second["states"] <= 160
    env = bench.make()
    rows = [env.reset(seed=seed)[0] for seed in (1, 2)]  # one world, whatever the seed
    assert all(np.array_equal(rows[0][key], rows[1][key]) for key in rows[0])
