"""The 2023 agent: shapes, what an update does, precision, resuming, loading."""

import copy

import numpy as np
import pytest
import torch
from trees import same

import fastwm
from fastwm import assemble, config, train
from fastwm.agents.dreamer_2023 import DreamerAgent2023
from fastwm.spaces import Space

VECTOR = {"vector": Space("vector", (3,))}
DISCRETE, CONTINUOUS = Space("discrete", (), (4,)), Space("continuous", (2,))
QUIET = "--log.tensorboard false --log.every_s 0 --threads 1 --log.video_every 0".split()


def make(*flags, obs=None, act=DISCRETE):
    settings = config.load(["dreamerv3_2023_debug", *flags])[0]
    return DreamerAgent2023(VECTOR if obs is None else obs, act, settings)


def batch_of(agent, batch=4, length=8):
    act = agent.act_space
    shape = (batch, length, *act.shape)
    action = (
        torch.randint(4, shape, dtype=torch.int32) if act.classes else 2 * torch.rand(shape) - 1
    )
    out = {"prev_action": action, "reward": torch.randn(batch, length)}
    for key in ("is_first", "is_last", "is_terminal"):
        out[key] = torch.rand(batch, length) < 0.1
    for key, space in agent.obs_space.items():
        image = space.kind == "image"
        shape = (batch, length, *space.shape)
        out[key] = torch.randint(256, shape, dtype=torch.uint8) if image else torch.randn(shape)
    return out


def snapshot(module):
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def changed(module, before):
    return {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}


def test_the_published_shapes():
    """512 + 32 x 32 from 4096: the default, and the preset that says so."""
    image = {"image": Space("image", (64, 64, 3))}
    for preset in ("v3_512", "dreamerv3_2023_debug"):
        settings = config.load([preset, "--task", "x"])[0]
        if preset == "dreamerv3_2023_debug":
            settings = config.DreamerConfig2023()
        model = DreamerAgent2023(image, Space("discrete", (), (7,)), settings).model
        rssm = model.world.rssm
        assert (rssm.deter, *rssm.latent.shape) == (512, 32, 32)
        assert model.world.encoder.out_features == 4096 and rssm.feat_size == 1536
        assert [tuple(c.weight.shape[:2]) for c in model.world.encoder.convs] == [
            (32, 3), (64, 32), (128, 64), (256, 128)
        ]  # fmt: skip
        assert model.world.decoder.grid == (4, 4, 256)
        assert [tuple(c.weight.shape[:2]) for c in model.world.decoder.convs] == [
            (256, 128), (128, 64), (64, 32), (32, 3)
        ]  # fmt: skip
        assert rssm.cell.shape == (1536, 1024)
        layers = 3 if preset == "v3_512" else 2
        for head in (model.actor, model.critic.net, model.world.reward, model.world.cont):
            assert [tuple(x.weight.shape) for x in head.mlp] == [(512, 1536)] + [(512, 512)] * (
                layers - 1
            )


def test_the_first_losses():
    agent = make()
    batch = batch_of(agent)
    _, terms, _, _ = agent.world_losses(batch, agent.draw_noise(4, 8))
    assert set(terms) == {"dyn", "rep", "rew", "con", "recon/vector"}
    assert all(term.shape == (4, 8) for term in terms.values())
    assert torch.allclose(terms["rew"], torch.full((4, 8), np.log(5.0)))  # zero output weights


def test_an_update_trains_every_part():
    agent = make("--rssm.free_nats", "0")
    before = snapshot(agent.model)
    metrics, latents = agent.update(batch_of(agent))
    assert latents == {} and metrics["opt/finite"]
    still = set(before) - changed(agent.model, before)
    # Zero output weights: nothing flows through them at first.
    assert all(name.startswith(("world.reward.mlp", "task.critic")) for name in still), still
    agent.update(batch_of(agent))
    assert changed(agent.model, before) == set(before)


@pytest.mark.parametrize("act", [DISCRETE, CONTINUOUS], ids=lambda s: s.kind)
@pytest.mark.parametrize("latent", ["onehot", "normal"])
@pytest.mark.parametrize("grad", ["reinforce", "dynamics", "both"])
def test_updates_of_every_kind_are_finite(act, latent, grad):
    agent = make("--rssm.latent", latent, "--actor.grad", grad, "--actor.mix", "0.1", act=act)
    for _ in range(2):
        metrics, _ = agent.update(batch_of(agent))
        assert metrics["opt/finite"]
        assert all(torch.isfinite(value).all() for value in metrics.values())


@pytest.mark.parametrize("head", ["decoder", "reward", "cont"])
def test_heads_outside_of_grad_heads_do_not_shape_the_state(head):
    term = {"decoder": "recon/vector", "reward": "rew", "cont": "con"}[head]
    others = [name for name in ("decoder", "reward", "cont") if name != head]
    for heads, reaches in ((others, False), ([head], True)):
        agent = make("--grad_heads", ",".join(heads))
        torch.nn.init.normal_(agent.model.world.reward.out.weight)
        _, terms, _, _ = agent.world_losses(batch_of(agent), agent.draw_noise(4, 8))
        terms[term].mean().backward()
        world = agent.model.world
        own = {"decoder": world.decoder, "reward": world.reward, "cont": world.cont}[head]
        assert all(p.grad is not None for p in own.parameters())
        state = [*world.rssm.parameters(), *world.encoder.parameters()]
        assert any(p.grad is not None and p.grad.any() for p in state) == reaches


def test_windows_begin_at_the_learned_state():
    """What lies before a window, the action that led to it included, does not matter."""
    agent = make()
    batch, noise = batch_of(agent), agent.draw_noise(4, 8)
    other = {key: value.clone() for key, value in batch.items()}
    other["prev_action"][:, 0] = (other["prev_action"][:, 0] + 1) % 4
    other["is_first"][:, 0] = ~other["is_first"][:, 0]
    a, b = (agent.world_losses(x, noise)[1] for x in (batch, other))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_acting_equals_the_sequence(near):
    """Greedy acting, row by row, over a reset."""
    agent = make()
    rows = batch_of(agent, 3, 6)
    rows["is_first"][:] = False
    rows["is_first"][:, [0, 3]] = True
    state = agent.initial_state(3)
    source = torch.Generator()
    deters = []
    for t in range(6):
        step = {"vector": rows["vector"][:, t].numpy(), "is_first": rows["is_first"][:, t].numpy()}
        source.manual_seed(t)
        action, state, latents = agent.act(step, state, "greedy", source)
        assert latents == {} and action.shape == (3,)
        rows["prev_action"][:, t] = torch.as_tensor(action)
        deters.append(state["deter"])
    rows["prev_action"] = rows["prev_action"].roll(1, 1)
    noise = []
    for t in range(6):
        source.manual_seed(t)
        noise.append(torch.rand(3, 1, 4, generator=source))
    _, post = agent.model.world.observe(rows, torch.cat(noise, 1))
    near(post.deter, torch.stack(deters, 1), 1e-5)


# ---- mixed precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_the_same_thing(precision):
    agents = [make("--precision", p) for p in ("fp32", precision)]
    batch, noise = batch_of(agents[0]), agents[0].draw_noise(4, 8)
    exact, low = (agent.world_losses(batch, noise)[0] for agent in agents)
    exact, low = float(exact.detach()), float(low.detach())
    assert low == pytest.approx(exact, rel=3e-2) and low != exact
    metrics, _ = agents[1].update(batch)
    assert metrics["opt/finite"]
    assert ("opt/grad_scale" in metrics) == (precision == "fp16")  # bf16 needs no scale
    assert all(p.dtype == torch.float32 for p in agents[1].model.parameters())


def test_an_overflow_skips_its_part_only():
    agent = make("--precision", "fp16")
    agent.update(batch_of(agent))
    before, scale = (
        snapshot(agent.model),
        {k: o.scale.value.clone() for k, o in agent.optimizers.items()},
    )
    agent.optimizers["model"].scale.value.fill_(1e38)  # any gradient overflows
    metrics, _ = agent.update(batch_of(agent))
    assert (
        metrics["opt/finite"]
        and metrics["opt/grad_scale"] == agent.optimizers["model"].scale.LIMITS[1]
    )
    moved = changed(agent.model, before)
    assert moved and not any(name.startswith("world.") for name in moved)
    for name in ("actor", "critic"):
        assert agent.optimizers[name].scale.value == scale[name]


def test_infinite_data_change_nothing():
    agent = make()
    agent.update(batch_of(agent))
    before, norm = snapshot(agent.model), agent.model.task.return_norm.range.clone()
    batch = batch_of(agent)
    batch["reward"][1, 2] = float("inf")
    batch["vector"][1, 2] = float("nan")
    metrics, _ = agent.update(batch)
    assert not metrics["opt/finite"]
    assert changed(agent.model, before) == set()
    assert torch.equal(agent.model.task.return_norm.range, norm)
    assert agent.first_nonfinite(batch) == "batch/reward"


# ---- whole runs


def test_a_state_goes_on_exactly():
    one, two = make(), make("--seed", "1")
    one.update(batch_of(one))
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    batch = batch_of(one)
    same(one.update(batch)[0], two.update(batch)[0])
    same(one.state_dict(), two.state_dict())


@pytest.mark.parametrize("task", ["cartpole", "pendulum", "dummy_image"])
def test_training_resumes_exactly_and_the_policy_loads(task, tmp_path):
    flags = [
        "dreamerv3_2023_debug",
        *QUIET,
        "--task",
        task,
        "--eval.every",
        "0",
        "--deterministic",
        "true",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main([*flags, "--steps", "160", "--logdir", str(whole)]) == 0
    for steps in ("80", "160"):
        assert train.main([*flags, "--steps", steps, "--logdir", str(parts)]) == 0
    agents = [assemble.load_run(str(folder), "latest")[1] for folder in (whole, parts)]
    same(agents[0].state_dict(), agents[1].state_dict())
    policy = fastwm.load_policy(whole)
    obs = {k: np.zeros((2, *s.shape), s.dtype) for k, s in policy.obs_space.items()}
    action, state = policy(obs)
    rows = {**obs, "is_first": np.ones(2, bool)}
    wanted, _, _ = agents[0].act(rows, agents[0].initial_state(2), "greedy", torch.Generator())
    assert action.shape == wanted.shape and state["deter"].shape == (2, 16)


def test_open_loop_video():
    agent = make(obs={"image": Space("image", (64, 64, 3))})
    video = agent.report(batch_of(agent))["openloop/image"]
    assert video.dtype == np.uint8 and video.shape[0] == 8


def test_mistakes_are_named():
    with pytest.raises(config.ConfigError, match="grad_heads: expected some of decoder, reward, c"):
        make("--grad_heads", "decoder,policy")
    with pytest.raises(ValueError, match="minres = 4 times a power of 2, got 72"):
        make(obs={"image": Space("image", (72, 72, 3))})
