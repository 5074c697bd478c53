"""What the Dreamer agent promises beyond the goldens: sizes, semantics, safety."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastwm import config as configs
from fastwm import ops
from fastwm.agents.dreamer import DreamerAgent, DreamerModel
from fastwm.agents.policy import load_policy
from fastwm.optim import LossScale
from fastwm.rssm import feat
from fastwm.spaces import Space

IMAGE, PROPRIO = {"image": Space("image", (64, 64, 3))}, {"vector": Space("vector", (24,))}
DISCRETE, CONTINUOUS = Space("discrete", (), (6,)), Space("continuous", (6,))
MULTI = Space("discrete", (2,), (3, 5))


def tiny_config(**values):
    flat = {
        "rssm.deter": 16,
        "rssm.hidden": 12,
        "rssm.stoch": 4,
        "rssm.classes": 4,
        "rssm.blocks": 4,
        "encoder.depth": 2,
        "decoder.depth": 2,
        "decoder.bspace": 4,
        "imag_horizon": 4,
        "optim.warmup": 2,
        "rssm.free_nats": 0.0,  # tiny latents stay below one nat, which would stop the prior
    }
    flat |= {f"{part}.units": 10 for part in "encoder decoder reward cont actor critic".split()}
    return configs.resolve("dreamerv3", [], flat | values)[0]


def tiny_agent(obs_space=None, act_space=DISCRETE, **values) -> DreamerAgent:
    return DreamerAgent(obs_space or PROPRIO, act_space, tiny_config(**values), seed=3)


def random_batch(agent: DreamerAgent, rows: int = 3, length: int = 6) -> dict[str, torch.Tensor]:
    lead, rssm = (rows, length), agent.model.world.rssm
    batch = {}
    for key, space in agent.obs_space.items():
        if space.kind == "image":
            batch[key] = torch.randint(0, 256, (*lead, *space.shape), dtype=torch.uint8)
        elif space.kind == "discrete":
            batch[key] = torch.randint(0, min(space.classes), (*lead, *space.shape))
        else:
            batch[key] = torch.randn(*lead, *space.shape)
    action = agent.act_space
    if action.kind == "discrete":
        batch["prev_action"] = torch.randint(0, min(action.classes), (*lead, *action.shape))
    else:
        batch["prev_action"] = torch.randn(*lead, *action.shape)
    batch["reward"] = torch.randn(lead)
    for key in ("is_first", "is_last", "is_terminal"):
        batch[key] = torch.zeros(lead, dtype=torch.bool)
    batch["is_first"][1, 2] = batch["is_last"][1, 1] = batch["is_terminal"][1, 1] = True
    batch["deter"] = torch.randn(rows, rssm.deter).to(torch.bfloat16)
    batch["stoch"] = torch.randint(0, rssm.classes, (rows, rssm.stoch), dtype=agent.index_dtype)
    return batch


SIZES = {
    "size1m": (686_456, 640_867),
    "size12m": (10_492_616, 9_738_019),
    "size25m": (23_487_016, 21_782_947),
    "size50m": (41_646_984, 38_612_003),
    "size100m": (93_463_624, 86_622_499),
    "size200m": (165_942_536, 153_769_507),
    "size400m": (372_887_176, 345_473_059),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    config, _ = configs.resolve("dreamerv3", [size])
    counts = []
    for obs_space, act_space in ((IMAGE, DISCRETE), (PROPRIO, CONTINUOUS)):
        with torch.device("meta"):
            model = DreamerModel(obs_space, act_space, config)
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    assert tuple(counts) == SIZES[size]


def test_parameter_counts_by_part():
    config, _ = configs.resolve("dreamerv3", ["size1m"])
    counts = DreamerAgent(IMAGE, DISCRETE, config).parameter_counts()
    assert list(counts.values()) == [376704, 14304, 80595, 57663, 41153, 49926, 66111, 686456]


def test_losses_at_initialisation():
    agent = tiny_agent()
    batch = random_batch(agent)
    terms = agent.losses(batch, agent.draw_noise(3, 6)).terms
    torch.testing.assert_close(terms["rew"], torch.full((3, 6), math.log(255)))
    alive = ~batch["is_last"][:, :-1]
    torch.testing.assert_close(terms["repval"], 2 * math.log(255) * alive.float())


@pytest.mark.parametrize("act_space", [DISCRETE, MULTI, CONTINUOUS])
@pytest.mark.parametrize("kind", ["vector", "image", "both", "discrete"])
def test_update_moves_every_parameter_from_the_second_on(act_space, kind):
    small = {"image": Space("image", (48, 48, 1))}
    spaces = {
        "vector": PROPRIO,
        "image": small,
        "both": PROPRIO | small,
        "discrete": {"level": Space("discrete", (2,), (3, 4))} | PROPRIO,
    }
    agent = tiny_agent(spaces[kind], act_space)
    batch = random_batch(agent)
    before = {name: p.detach().clone() for name, p in agent.trainable()}
    metrics, latents = agent.update(batch)
    assert bool(metrics["opt/finite"])
    assert latents["stoch"].dtype == torch.uint8 and latents["deter"].dtype == torch.bfloat16
    for name, param in agent.trainable():
        assert torch.equal(param, before[name]), f"{name} moved in the first update"
    for _ in range(2):
        agent.update(batch)
    still = [name for name, param in agent.trainable() if torch.equal(param, before[name])]
    assert not still


def test_sequence_equals_steps_equals_acting():
    agent = tiny_agent()
    world, batch = agent.model.world, random_batch(agent)
    noise = torch.rand(3, 6, world.rssm.stoch)
    tokens, post = world.observe(batch, noise)
    actions = world.encode_action(batch["prev_action"])
    deter, stoch = batch["deter"].float(), world.rssm.one_hot(batch["stoch"])
    for t in range(6):
        now = slice(t, t + 1)
        d, _, s = world.rssm.observe(
            deter, stoch, tokens[:, now], actions[:, now], batch["is_first"][:, now], noise[:, now]
        )
        deter, stoch = d.squeeze(1), s.squeeze(1)
        torch.testing.assert_close(deter, post.deter[:, t], rtol=1e-4, atol=1e-5)
        assert torch.equal(stoch.argmax(-1), post.stoch[:, t].argmax(-1))
    # The acting path draws its own noise: feed it the same by replaying the generator.
    state = agent.initial_state(3)
    first = torch.ones(3, dtype=torch.bool)
    source = torch.Generator().manual_seed(7)
    rows = {"vector": batch["vector"][:, 0].numpy(), "is_first": first.numpy()}
    _, state, latents = agent.act(rows, state, "greedy", source)
    same = torch.rand(3, 1, world.rssm.stoch, generator=torch.Generator().manual_seed(7))
    d, _, s = world.rssm.observe(
        *world.rssm.initial(3), tokens[:, :1], actions[:, :1], first[:, None], same
    )
    torch.testing.assert_close(state["deter"], d[:, 0])
    assert torch.equal(latents["stoch"].long(), s[:, 0].argmax(-1))


@pytest.mark.parametrize("act_space", [DISCRETE, MULTI, CONTINUOUS])
def test_acting_equals_the_sequence_that_replay_stores(act_space):
    """Rows and actions as the loop stores them give the states that acting went through."""
    agent = tiny_agent(act_space=act_space)
    world, batch = agent.model.world, random_batch(agent)
    batch["is_first"][:, 0] = True
    source, again = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    state, deters, actions, noise = agent.initial_state(3), [], [], []
    for t in range(6):
        rows = {key: batch[key][:, t].numpy() for key in ("vector", "is_first")}
        action, state, latents = agent.act(rows, state, "sample", source)
        noise.append(torch.rand(3, 1, world.rssm.stoch, generator=again))
        agent.model.actor.noise((3,), again)
        deters.append(state["deter"])
        actions.append(torch.from_numpy(action))
        assert torch.equal(latents["stoch"].long(), state["stoch"].argmax(-1))
    batch["prev_action"] = torch.stack([torch.zeros_like(actions[0]), *actions[:-1]], 1)
    _, post = world.observe(batch, torch.cat(noise, 1))
    torch.testing.assert_close(torch.stack(deters, 1), post.deter, rtol=1e-4, atol=1e-5)


def test_reset_forgets_state_and_previous_action():
    agent = tiny_agent()
    world, batch = agent.model.world, random_batch(agent)
    batch["is_first"][:, 3] = True
    noise = torch.rand(3, 6, world.rssm.stoch)
    _, post = world.observe(batch, noise)
    other = {key: value.clone() for key, value in batch.items()}
    other["vector"][:, :3] += 1.0
    other["prev_action"][:, :4] = (other["prev_action"][:, :4] + 1) % 6
    other["deter"] += 1.0
    _, changed = world.observe(other, noise)
    assert not torch.equal(post.deter[:, :3], changed.deter[:, :3])
    assert torch.equal(post.deter[:, 3:], changed.deter[:, 3:])
    assert torch.equal(post.stoch[:, 3:], changed.stoch[:, 3:])


def test_behavior_gives_the_world_model_no_gradient():
    agent = tiny_agent()
    out = agent.losses(random_batch(agent), agent.draw_noise(3, 6))
    for name, reached in (("policy", "actor"), ("value", "critic.net")):
        agent.optimizer.zero_grad()
        out.terms[name].mean().backward(retain_graph=True)
        # A head that starts at zero passes no gradient on, so ask which parts are connected.
        parts = {n for n, p in agent.model.named_parameters() if p.grad is not None}
        assert parts and all(n.startswith(reached) for n in parts), name
    agent.optimizer.zero_grad()
    out.terms["repval"].mean().backward(retain_graph=True)
    assert agent.model.world.encoder.mlp[0].weight.grad is not None


def test_imagination_has_the_configured_length():
    agent = tiny_agent()
    batch = random_batch(agent)
    noise = agent.draw_noise(3, 6)
    _, post = agent.model.world.observe(batch, noise.posterior)
    features, action, products = agent.imagine(post, 6, noise)
    assert features.shape[:2] == action.shape[:2] == (18, 5)
    expected = feat(post.deter, post.stoch).reshape(18, -1)
    torch.testing.assert_close(features[:, 0], expected)
    for name, mlp in (("actor", agent.model.actor.mlp), ("critic", agent.model.critic.net.mlp)):
        wanted = torch.nn.functional.linear(features, mlp[0].weight, mlp[0].bias)
        torch.testing.assert_close(products[name], wanted)


@pytest.mark.parametrize(
    ("where", "value"), [("reward", math.nan), ("vector", math.nan), ("vector", math.inf)]
)
def test_nonfinite_update_changes_nothing_and_names_the_tensor(where, value):
    agent = tiny_agent()
    good = random_batch(agent)
    for _ in range(3):
        agent.update(good)
    before = agent.state_dict()
    copy = {k: v.clone() for k, v in before["model"].items()}
    moments = [m.clone() for m in agent.optimizer.mu + agent.optimizer.nu]
    bad = {key: tensor.clone() for key, tensor in good.items()}
    bad[where][0, 0] = value
    metrics, _ = agent.update(bad)
    assert not bool(metrics["opt/finite"])
    assert all(torch.equal(copy[k], v) for k, v in agent.model.state_dict().items())
    assert all(
        torch.equal(a, b)
        for a, b in zip(moments, agent.optimizer.mu + agent.optimizer.nu, strict=True)
    )
    assert float(agent.optimizer.step_count) == 3.0
    assert agent.first_nonfinite(bad) == f"batch/{where}"
    metrics, _ = agent.update(good)
    assert bool(metrics["opt/finite"])


def test_same_seed_same_bytes():
    states = []
    for _ in range(2):
        agent = tiny_agent()
        torch.manual_seed(11)
        batch = random_batch(agent)
        for _ in range(3):
            agent.update(batch)
        states.append(agent.model.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_saved_policy_acts_alike(tmp_path):
    agent = tiny_agent()
    agent.save_policy(tmp_path / "policy.pt")
    policy = load_policy(tmp_path / "policy.pt", seed=5)
    obs = {"vector": np.random.default_rng(0).normal(size=(2, 24)).astype(np.float32)}
    rows = obs | {"is_first": np.ones(2, bool)}
    source, state, theirs = torch.Generator().manual_seed(5), agent.initial_state(2), None
    for _ in range(3):
        action, state, _ = agent.act(rows, state, "greedy", source)
        loaded, theirs = policy(obs, theirs)
        np.testing.assert_array_equal(action, loaded)
        torch.testing.assert_close(state["deter"], theirs["deter"])
        rows["is_first"] = np.zeros(2, bool)


def test_policy_refuses_wrong_observations(tmp_path):
    tiny_agent().save_policy(tmp_path / "policy.pt")
    policy = load_policy(tmp_path / "policy.pt")
    with pytest.raises(ValueError, match=r"expected observations \['vector'\], got \['image'\]"):
        policy({"image": np.zeros((1, 4))})
    with pytest.raises(ValueError, match=r"of shape \(N, \*\(24,\)\), got \(1, 23\)"):
        policy({"vector": np.zeros((1, 23))})


def test_policy_refuses_images_that_are_no_bytes(tmp_path):
    tiny_agent(IMAGE).save_policy(tmp_path / "policy.pt")
    policy = load_policy(tmp_path / "policy.pt")
    with pytest.raises(
        TypeError, match=r"obs\['image'\] as uint8 from 0 to 255, got torch.float32"
    ):
        policy({"image": np.zeros((1, 64, 64, 3), np.float32)})


def test_a_damaged_policy_is_one_clear_error(tmp_path):
    path = tmp_path / "policy.pt"
    tiny_agent().save_policy(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut off or damaged .1000 bytes"):
        load_policy(path)
    torch.save({"weights": {}}, path)
    with pytest.raises(ValueError, match="got something else"):
        load_policy(path)
    with pytest.raises(FileNotFoundError, match="run folder with checkpoint/policy.pt"):
        load_policy(tmp_path)


def test_more_classes_than_a_byte_holds():
    agent = tiny_agent(**{"rssm.classes": 300})
    assert agent.replay_spec()["stoch"] == ((4,), "int32")
    state = agent.initial_state(2)
    rows = {"vector": np.zeros((2, 24), np.float32), "is_first": np.ones(2, bool)}
    for _ in range(20):  # until a class beyond 255 is drawn
        _, state, latents = agent.act(rows, state)
        assert torch.equal(latents["stoch"].long(), state["stoch"].argmax(-1))
        if latents["stoch"].max() > 255:
            break
    else:
        pytest.fail("no class beyond 255 was drawn")
    batch = random_batch(agent)
    metrics, latents = agent.update(batch)
    assert bool(metrics["opt/finite"]) and latents["stoch"].dtype == torch.int32


@pytest.mark.parametrize("name", ["reward", "deter", "action", "is_last"])
def test_observations_do_not_take_the_names_of_the_replay(name):
    agent = tiny_agent(PROPRIO | {name: Space("vector", (2,))})
    with pytest.raises(ValueError, match=rf"expected other observation names .*got \['{name}'\]"):
        agent.replay_spec()


def test_open_loop_video(tmp_path):
    agent = tiny_agent(IMAGE | PROPRIO)
    videos = agent.report(random_batch(agent, rows=2, length=5))
    assert list(videos) == ["openloop/image"]
    assert videos["openloop/image"].shape == (5, 3 * 64 + 4, 2 * 68, 3)
    assert videos["openloop/image"].dtype == np.uint8


def test_open_loop_follows_the_recorded_actions():
    """After `context` rows only the actions are read, each one for the row that it led to."""
    agent = tiny_agent(IMAGE)
    world, batch = agent.model.world, random_batch(agent, rows=2, length=6)
    noise, imag_noise = torch.rand(2, 2, 4), torch.rand(4, 2, 4)
    recon = world.open_loop(batch, 2, noise, imag_noise)["image"]
    latents = {"deter": batch["deter"], "stoch": batch["stoch"]}
    head = {key: value[:, :2] for key, value in batch.items()} | latents
    _, post = world.observe(head, noise)
    deter, stoch = post.deter[:, -1], post.stoch[:, -1]
    expected = [world.decoder(post.deter, post.stoch.flatten(-2))["image"]]
    actions = world.encode_action(batch["prev_action"])
    for t in range(2, 6):
        deter = ops.gru_step(world.rssm.weights(), deter, stoch.flatten(1), actions[:, t])
        logits = world.rssm.prior_logits(deter)
        index, _ = ops.latent_sample(logits, imag_noise[t - 2], world.rssm.unimix)
        stoch = world.rssm.one_hot(index)
        expected.append(world.decoder(deter, stoch.flatten(-2))["image"].unsqueeze(1))
    torch.testing.assert_close(recon, torch.cat(expected, 1), rtol=1e-4, atol=1e-5)


def test_imagining_from_the_last_rows_only():
    agent = tiny_agent(imag_last=2)
    batch = random_batch(agent)
    terms = agent.losses(batch, agent.draw_noise(3, 6)).terms
    assert terms["policy"].shape == terms["value"].shape == (3, 2)
    assert terms["repval"].shape == (3, 1)
    metrics, latents = agent.update(batch)
    assert bool(metrics["opt/finite"]) and latents["deter"].shape == (3, 6, 16)


@pytest.mark.parametrize("every", [1, 2])
def test_the_slow_critic_follows_at_its_own_pace(every):
    agent = tiny_agent(**{"critic.slow_every": every, "critic.slow_rate": 0.25})
    batch, critic = random_batch(agent), agent.model.critic
    for update in range(1, 5):
        before = [p.clone() for p in critic.slow.parameters()]
        agent.update(batch)
        for old, slow, fast in zip(
            before, critic.slow.parameters(), critic.net.parameters(), strict=True
        ):
            wanted = old if update % every else 0.75 * old + 0.25 * fast
            torch.testing.assert_close(slow, wanted)
    assert not torch.equal(critic.slow.out.weight, critic.net.out.weight)


def test_image_of_unusable_size_is_refused():
    with pytest.raises(ValueError, match="divisible by 16 and between 48 and 256"):
        tiny_agent({"image": Space("image", (50, 50, 3))})


def test_bf16_loss_is_close_to_fp32():
    totals, actors = [], []
    for precision in ("fp32", "bf16"):
        agent = tiny_agent(precision=precision)
        torch.manual_seed(0)
        batch = random_batch(agent)
        total = agent.losses(batch, agent.draw_noise(3, 6)).total
        totals.append(total.item())
        total.backward()
        # Acting without gradient first must not leave a cast copy of the weights in the way.
        actors.append(agent.model.actor.mlp[0].weight.grad.norm().item())
    assert totals[1] == pytest.approx(totals[0], rel=0.02)
    assert actors[1] == pytest.approx(actors[0], rel=0.1)


def test_fp16_scales_the_loss_and_survives_overflows():
    plain, agent = (tiny_agent(precision=precision) for precision in ("fp32", "fp16"))
    torch.manual_seed(0)
    batch = random_batch(agent)
    for _ in range(20):  # the first ones may overflow
        agent.generator.manual_seed(5)
        metrics, _ = agent.update(batch)
        assert bool(metrics["opt/finite"])
    assert 0 < float(metrics["opt/updates"]) <= 20
    plain.load_state_dict(agent.state_dict())
    for each in (plain, agent):
        each.generator.manual_seed(5)
    norms = [float(each.update(batch)[0]["opt/grad_norm"]) for each in (plain, agent)]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)  # the scale is divided out again
    updates = float(agent.optimizer.step_count)
    agent.loss_scale.LIMITS = (1e-4, 1e38)
    agent.loss_scale.value.fill_(1e38)  # overflows for sure
    before = [p.clone() for _, p in agent.trainable()]
    metrics, _ = agent.update(batch)
    assert bool(metrics["opt/finite"]) and float(metrics["opt/updates"]) == updates
    assert all(torch.equal(a, p) for a, (_, p) in zip(before, agent.trainable(), strict=True))
    assert float(agent.loss_scale.value) == pytest.approx(5e37)
    batch["reward"][0, 0] = math.nan  # no scale cures this
    assert not bool(agent.update(batch)[0]["opt/finite"])
    other = tiny_agent(precision="fp16")
    other.load_state_dict(agent.state_dict())
    assert torch.equal(other.loss_scale.value, agent.loss_scale.value)


def test_loss_scale_grows_with_patience():
    scale = LossScale(torch.device("cpu"), initial=8.0, patience=2)
    seen = []
    for finite in (True, True, True, False, True, True):
        scale.follow(torch.tensor(finite))
        seen.append(float(scale.value))
    assert seen == [8, 16, 16, 8, 8, 16]


def test_value_at_initialisation_is_exactly_zero():
    agent = tiny_agent()
    features = torch.randn(5, agent.model.world.rssm.feat_size)
    assert torch.equal(agent.model.critic.mean(agent.model.critic(features)), torch.zeros(5))
    reward = agent.model.world.reward(features)
    assert torch.equal(ops.twohot_mean(reward, agent.model.world.reward_bins), torch.zeros(5))


def test_config_without_continuation_discount():
    agent = tiny_agent(contdisc=False)
    out = agent.losses(random_batch(agent), agent.draw_noise(3, 6))
    assert torch.isfinite(out.total)


def test_what_the_decoder_leaves_out_has_no_loss(tmp_path):
    """The encoder reads one observation, the decoder predicts the other; the policy needs both."""
    obs_space = {"position": Space("vector", (2,)), "velocity": Space("vector", (3,))}
    keys = {"encoder.mlp_keys": "pos", "decoder.mlp_keys": "vel"}
    agent = tiny_agent(obs_space, **keys)
    batch = random_batch(agent)
    metrics, _ = agent.update(batch)
    losses = {name for name in metrics if name.startswith("loss/recon")}
    assert losses == {"loss/recon/velocity"}
    first = agent.model.world.encoder(batch)
    batch["velocity"] = batch["velocity"] + 1
    assert torch.equal(first, agent.model.world.encoder(batch))
    agent.save_policy(tmp_path / "policy.pt")
    policy = load_policy(tmp_path / "policy.pt")
    obs = {"position": np.zeros((1, 2), np.float32), "velocity": np.zeros((1, 3), np.float32)}
    assert policy(obs)[0].shape == (1,)
    nothing = tiny_agent(obs_space, **{"decoder.mlp_keys": "$^"})
    metrics, _ = nothing.update(random_batch(nothing))
    assert not [name for name in metrics if name.startswith("loss/recon")]
    assert bool(metrics["opt/finite"])
