"""Acting on packed weights: the actions and states that encoder, RSSM and actor give."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from fastwm import config, ops
from fastwm.agents.dreamer import DreamerAgent
from fastwm.agents.policy import MODES, RecurrentPolicy
from fastwm.ops.mlp import MAX_LAYERS
from fastwm.optim import LaProp
from fastwm.spaces import Space

OBS = {
    "vector": {"vector": Space("vector", (5,))},
    "two": {"b": Space("vector", (2, 3)), "a": Space("vector", (1,))},
    "discrete": {"place": Space("discrete", (2,), (3, 4)), "vector": Space("vector", (5,))},
    "image": {"image": Space("image", (32, 32, 3))},
    "both": {"image": Space("image", (32, 32, 1)), "vector": Space("vector", (5,))},
}
ACT = {
    "discrete": Space("discrete", (), (6,)),
    "several": Space("discrete", (2,), (3, 5)),
    "continuous": Space("continuous", (3,)),
}
COUNT = 5
fused_only = pytest.mark.skipif(not ops.available("cpu", "mlp"), reason="no compiled kernels")


def make(obs="vector", act="discrete") -> RecurrentPolicy:
    small = {"encoder.mults": "2,4", "decoder.mults": "2,4", "expl.behavior": "plan2explore"}
    settings = config.resolve("dreamerv3", ["debug"], small)[0]
    torch.manual_seed(0)
    agent = DreamerAgent(OBS[obs], ACT[act], settings)
    for parameter in agent.model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    agent.policy.explorer = agent.model.explorer.actor
    return agent.policy


def observe(obs: str, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    found = {}
    for key, space in OBS[obs].items():
        shape = (COUNT, *space.shape)
        if space.kind == "image":
            found[key] = rng.integers(0, 256, shape, np.uint8)
        elif space.kind == "discrete":
            found[key] = rng.integers(0, space.classes, shape).astype(np.int32)
        else:
            found[key] = (20 * rng.normal(size=shape)).astype(np.float32)
    return {key: torch.from_numpy(value) for key, value in found.items()}


def play(policy, obs, mode, actor=None, steps=6):
    """Actions and states of some steps, with resets, whose lost states are not numbers."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(3)
    state, found = policy.initial_state(COUNT), []
    for step in range(steps):
        is_first = torch.from_numpy(rng.random(COUNT) < 0.3) | (step == 0)
        state = {k: torch.where(_like(is_first, v), torch.nan, v) for k, v in state.items()}
        rows = observe(obs, rng)
        action, state = policy.step(rows, state, is_first, mode, generator, actor)
        found.append((action, state))
    return found, generator.get_state()


def _like(flags, value):
    return flags.reshape(-1, *[1] * (value.dim() - 1))


@fused_only
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "obs, act",
    [("vector", a) for a in ACT] + [(o, "discrete") for o in OBS if o != "vector"],
)
def test_packed_steps_are_plain_steps(obs, act, mode, monkeypatch):
    policy = make(obs, act)
    for actor in (None, policy.explorer):
        found, after = play(policy, obs, mode, actor)
        assert policy.packed(actor or policy.actor) is not None
        with monkeypatch.context() as patch:
            patch.setattr(RecurrentPolicy, "packed", lambda self, actor: None)
            expected, plain_after = play(policy, obs, mode, actor)
        assert torch.equal(after, plain_after)  # as many draws
        for (action, state), (want_action, want) in zip(found, expected, strict=True):
            assert action.dtype == want_action.dtype and action.shape == want_action.shape
            torch.testing.assert_close(action, want_action, rtol=1e-4, atol=1e-4)
            assert torch.equal(state["stoch"], want["stoch"])
            torch.testing.assert_close(state["deter"], want["deter"], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(state["action"], want["action"], rtol=1e-4, atol=1e-4)


def by_optimizer(policy):
    settings = asdict(config.resolve("dreamerv3")[0].optim) | {"lr": 0.1, "warmup": 0}
    optimizer = LaProp(list(policy.named_parameters()), **settings)
    for parameter in policy.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(torch.zeros(()))


def by_loading(policy):
    policy.load_state_dict({k: v + 0.5 for k, v in policy.state_dict().items()})


def by_replacing(policy):
    layer = policy.actor.mlp[-1]
    layer.weight = torch.nn.Parameter(layer.weight.detach() + 0.5)


@fused_only
@pytest.mark.parametrize("change", [by_optimizer, by_loading, by_replacing])
def test_changed_weights_are_packed_again(change, monkeypatch):
    policy = make("vector", "continuous")
    before, _ = play(policy, "vector", "greedy")
    step = policy.packed(policy.actor)
    assert policy.packed(policy.actor) is step  # and no sooner
    change(policy)
    after, _ = play(policy, "vector", "greedy")
    monkeypatch.setattr(RecurrentPolicy, "packed", lambda self, actor: None)
    expected, _ = play(policy, "vector", "greedy")
    for (_, old), (_, got), (_, want) in zip(before, after, expected, strict=True):
        assert not torch.allclose(old["action"], want["action"], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(got["action"], want["action"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_decisions_are_in_float32_whatever_the_precision(precision):
    """As `load_policy` makes them; on a CPU on packed weights."""
    found = []
    for setting in ("fp32", precision):
        settings = config.resolve("dreamerv3", ["debug"], {"precision": setting})[0]
        agent = DreamerAgent(OBS["vector"], ACT["discrete"], settings, seed=3)
        rng, state, steps = np.random.default_rng(0), agent.initial_state(COUNT), []
        for step in range(4):
            rows = {key: value.numpy() for key, value in observe("vector", rng).items()}
            rows["is_first"] = np.full(COUNT, step == 0)
            action, state, _ = agent.act(rows, state)
            steps += [torch.from_numpy(action), *state.values()]
        found.append(steps)
    assert agent.precision == precision
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_low_precision_and_references_take_the_layers_themselves():
    policy = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert policy.packed(policy.actor) is None
    with ops.use_backend("reference"):
        assert policy.packed(policy.actor) is None


@fused_only
@pytest.mark.parametrize("part", ["encoder", "actor"])
def test_deeper_networks_than_the_kernel_takes_act_layer_by_layer(part):
    settings = config.resolve("dreamerv3", ["debug"], {f"{part}.layers": str(MAX_LAYERS + 1)})[0]
    policy = DreamerAgent(OBS["vector"], ACT["discrete"], settings).policy
    found, _ = play(policy, "vector", "greedy", steps=2)
    assert policy.packed(policy.actor) is None and len(found) == 2
