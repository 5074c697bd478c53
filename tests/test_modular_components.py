"""Components by name, of the package and of one's own, and what is said about wrong ones."""

import pytest
import torch
from modular_cases import DISCRETE, OBS, make_agent, make_batch
from torch import nn
from torch.distributions import Normal

from fastwm import config as cfg
from fastwm.spaces import Space
from fastwm.worldmodels.modular_components import COMPONENTS, Prepare
from fastwm.worldmodels.modular_parts import GaussianDynamics, NormalReward, Recurrent, widths

GATED = "examples.custom_component:GatedDynamics"
IMAGES = {"image": Space("image", (16, 16, 3)), "vector": Space("vector", (4,))}


class Sized(nn.Module):
    """A reward head of the wrong shape."""

    def __init__(self, state_size: int) -> None:
        super().__init__()
        self.net = nn.Linear(state_size, 1)

    def forward(self, state):
        return Normal(self.net(state), 1.0, validate_args=False)


class Nameless(nn.Module):
    """A representation that offers nothing."""

    def __init__(self, feature_size: int, action_size: int) -> None:
        super().__init__()


def test_every_component_of_the_package_trains():
    spaces = {"encoder": IMAGES, "decoder": IMAGES}
    for slot, known in COMPONENTS.items():
        for name in known:
            settings = {f"{slot}__name": name, f"{slot}__options": {}}
            if name == "conv":
                settings = {"encoder__name": "conv", "decoder__name": "conv"}
                settings |= {"encoder__options": {"depths": [4, 8]}}
                settings |= {"decoder__options": {"depths": [8, 4]}}
            act = Space("continuous", (2,)) if name == "tanh_normal" else DISCRETE
            obs = spaces[slot] if name == "conv" else OBS
            agent = make_agent(act, obs, **settings)
            batch = make_batch(act) | {
                "image": torch.randint(0, 255, (3, 7, 16, 16, 3), dtype=torch.uint8)
            }
            before = {n: p.clone() for n, p in agent.model.named_parameters()}
            agent.update(batch)
            same = [n for n, p in agent.model.named_parameters() if p.equal(before[n])]
            assert not same, f"{slot} {name}: {same}"


def test_auto_follows_the_spaces():
    plain = make_agent()
    assert plain.model.chosen["encoder"][0] == plain.model.chosen["decoder"][0] == "mlp"
    assert plain.model.chosen["policy"][0] == "categorical"
    images = make_agent(
        Space("continuous", (1,)),
        {"image": Space("image", (16, 16, 3))},
        encoder__options={},
        decoder__options={},
    )
    assert images.model.chosen["encoder"][0] == images.model.chosen["decoder"][0] == "conv"
    assert images.model.chosen["policy"][0] == "tanh_normal"


def test_a_component_of_ones_own_trains_with_its_options():
    agent = make_agent(dynamics__name=GATED, dynamics__options={"hidden": 5})
    dynamics = agent.model.world.dynamics
    assert type(dynamics).__name__ == "GatedDynamics" and dynamics.gate.in_features == 5
    before = dynamics.gate.weight.detach().clone()
    metrics, _ = agent.update(make_batch())
    assert metrics["opt/finite"] and not dynamics.gate.weight.equal(before)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"dynamics__name": "mlp"}, "dynamics.name: expected one of mlp_det, mlp_gauss or package"),
        ({"dynamics__name": "nowhere:X"}, "dynamics.name: expected package.module:Class that can"),
        ({"dynamics__name": "examples.custom_component:X"}, "can be imported, got"),
        (
            {"dynamics__options": {"hiden": [8]}},
            "dynamics.options: expected options of .* among .'hidden', .*got .*hiden",
        ),
        ({"dynamics__options": {"hidden": "8,x"}}, "expected positive widths like 64,64, got"),
        ({"policy__name": "tanh_normal"}, "expected continuous actions, got discrete.*categorical"),
        (
            {"reward__name": "test_modular_components:Sized", "reward__options": {}},
            r"reward: expected an output of shape \(2, 2\) .* got \(2, 2, 1\)",
        ),
        (
            {
                "representation__name": "test_modular_components:Nameless",
                "representation__options": {},
            },
            "representation.name: expected a torch.nn.Module with .*without .'state_size'",
        ),
    ],
)
def test_wrong_components_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        make_agent(**settings)


def test_images_of_an_odd_size_are_refused():
    spaces = {"image": Space("image", (20, 16, 3))}
    with pytest.raises(ValueError, match="divisible by 16, got.*(20, 16, 3).*fewer depths"):
        make_agent(DISCRETE, spaces, encoder__options={}, decoder__options={})


def test_a_model_without_decoder_needs_another_anchor():
    with pytest.raises(cfg.ConfigError, match="decoder.name: expected a decoder, or"):
        cfg.load(["modular", "--decoder.name", "none"])
    agent = make_agent(
        decoder__name="none",
        representation__name="autoencoder",
        representation__options={"reconstruct": True},
    )
    metrics, _ = agent.update(make_batch())
    assert metrics["decoder_reconstruction_loss"] == 0 and metrics["representation_own_loss"] > 0
    assert "decoder" not in agent.parameter_counts()


# ---- in the configuration


def test_another_component_does_not_inherit_options():
    """The default preset has options for its own dynamics; a flag's order does not matter."""
    plain = cfg.load(["modular"])[0]
    assert plain.dynamics.options
    argv = ["modular", "--dynamics.options.hidden", "7", "--dynamics.name", GATED]
    config, origins = cfg.load(argv)
    assert config.dynamics.options == {"hidden": 7} and config.dynamics.name == GATED
    assert origins["dynamics.options"] == "command line"
    assert cfg.load(["modular", "--dynamics.name", GATED])[0].dynamics.options == {}
    more = cfg.load(["modular", "--dynamics.options.std", "0.1"])[0].dynamics.options
    assert more == plain.dynamics.options | {"std": 0.1}
    assert cfg.from_dict(cfg.flatten(config)) == config


def test_widths():
    assert widths(8) == [8] and widths("8, 16") == widths([8, 16]) == widths((8, 16)) == [8, 16]


# ---- the parts themselves


def test_prepare():
    spaces = {
        "image": Space("image", (2, 2, 1)),
        "number": Space("vector", ()),
        "pair": Space("discrete", (2,), (2, 3)),
    }
    obs = {
        "image": torch.full((1, 1, 2, 2, 1), 255, dtype=torch.uint8),
        "number": torch.tensor([[-3.0]]),
        "pair": torch.tensor([[[1, 2]]], dtype=torch.int32),
    }
    found = Prepare(spaces, "symlog")(obs)
    assert found["image"].eq(1.0).all() and found["pair"].tolist() == [[[0, 1, 0, 0, 1]]]
    torch.testing.assert_close(found["number"], -torch.log(torch.tensor([[4.0]])))
    assert Prepare(spaces, "none")(obs)["number"] == -3.0


def test_normalized_vectors():
    spaces = {"x.y": Space("vector", (2,)), "n": Space("vector", ())}
    part, random = Prepare(spaces, "normalize"), torch.Generator().manual_seed(0)
    assert part({"x.y": torch.ones(1, 2), "n": torch.ones(1)})["n"] == 1.0  # nothing seen yet
    scale = torch.tensor([0.01, 100.0])
    for _ in range(50):
        batch = {"x.y": torch.randn(8, 16, 2, generator=random) * scale + 3 * scale}
        batch["n"] = torch.zeros(8, 16)  # a constant stays one
        part.follow(batch)
    found = part(batch)
    assert (found["x.y"].mean((0, 1)).abs() < 0.3).all() and found["n"].eq(0).all()
    torch.testing.assert_close(found["x.y"].std((0, 1)), torch.ones(2), atol=0.2, rtol=0)
    before = {name: value.clone() for name, value in part.state_dict().items()}
    part.follow(batch | {"n": torch.full((8, 16), float("nan"))})
    assert all(value.equal(before[name]) for name, value in part.state_dict().items())
    assert part({"x.y": torch.full((1, 2), 1e9), "n": torch.zeros(1)})["x.y"].eq(10.0).all()


def test_gaussian_dynamics_keep_their_spread_in_range():
    dynamics = GaussianDynamics(2, 1, min_std=0.2, max_std=0.3)
    dist = dynamics(torch.randn(50, 2) * 100, torch.randn(50, 1))
    assert dist.stddev.min() >= 0.2 and dist.stddev.max() <= 0.3 + 1e-6


def test_reward_learns_its_spread_unless_told_otherwise():
    assert NormalReward(2)(torch.randn(9, 2)).stddev.std() > 0
    fixed = NormalReward(2, learn_std=False, fixed_std=2.0)(torch.randn(9, 2))
    assert fixed.stddev.eq(2.0).all()


def test_the_recurrent_representation_forgets_at_a_first_row():
    part, features, action = Recurrent(3, 2, size=4), torch.randn(1, 5, 3), torch.randn(1, 5, 2)
    is_first = torch.tensor([[False, False, True, False, False]])
    states, carry = part.encode(features, action, is_first, torch.randn(1, 4))
    tail, _ = part.encode(features[:, 2:], action[:, 2:], is_first[:, 2:], torch.randn(1, 4) * 9)
    torch.testing.assert_close(states[:, 2:], tail)
    assert carry.equal(states[:, -1])
    steps, kept = [], torch.zeros(1, 4)
    for t in range(5):  # acting, one row at a time
        row = (features[:, t : t + 1], action[:, t : t + 1], is_first[:, t : t + 1])
        state, kept = part.encode(*row, kept)
        steps.append(state)
    again, _ = part.encode(features, action, is_first, torch.zeros(1, 4))
    torch.testing.assert_close(torch.cat(steps, 1), again)


# ---- actions


def test_hard_samples_are_one_hot_with_the_gradient_of_soft_ones():
    policy = make_agent(Space("discrete", (2,), (3, 2))).model.policy
    states, noise = torch.randn(6, 6), torch.rand(6, 5)
    weight = torch.randn(6, 5)
    params = list(policy.parameters())
    hard = policy(states).rsample(noise, 0.5, True)
    soft = policy(states).rsample(noise, 0.5, False)
    assert hard.detach().round(decimals=5).unique().tolist() == [0.0, 1.0]
    torch.testing.assert_close(hard.split((3, 2), -1)[0].sum(-1), torch.ones(6))
    torch.testing.assert_close(soft.split((3, 2), -1)[1].sum(-1), torch.ones(6))
    one = torch.autograd.grad((hard * weight).sum(), params)
    two = torch.autograd.grad((soft * weight).sum(), params)
    assert two[0].abs().max() > 0
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)
    assert policy(states).sample(noise).equal(hard.detach().round())


def test_samples_follow_the_probabilities():
    policy = make_agent(Space("discrete", (), (3,))).model.policy
    nn.init.zeros_(policy.net[-1].weight)
    with torch.no_grad():
        policy.net[-1].bias.copy_(torch.log(torch.tensor([0.2, 0.3, 0.5])))
    dist = policy(torch.zeros(20_000, 6))
    noise = policy.noise((20_000,), torch.Generator().manual_seed(0))
    shares = dist.sample(noise).mean(0)
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.3, 0.5]), atol=0.015, rtol=0)
    assert dist.sample(None)[0].tolist() == [0.0, 0.0, 1.0]


def test_a_low_temperature_approaches_one_hot():
    policy = make_agent(Space("discrete", (), (3,))).model.policy
    states, noise = torch.randn(50, 6), torch.rand(50, 3)
    spread = [policy(states).rsample(noise, tau, False).max(-1).values.mean() for tau in (5.0, 0.1)]
    assert spread[0] < 0.6 < 0.9 < spread[1]


def test_continuous_samples_move_with_mean_and_spread():
    policy = make_agent(Space("continuous", (2,))).model.policy
    dist = policy(torch.randn(5, 6))
    noise = torch.randn(5, 2)
    torch.testing.assert_close(dist.rsample(noise, 1.0, True), dist.mean + dist.std * noise)
    assert dist.rsample(noise, 1.0, True).requires_grad
    assert dist.sample(None).equal(dist.mean) and dist.mean.abs().max() < 1
