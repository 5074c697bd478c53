"""One whole loss of the public JAX reference, through our agent: losses, metrics, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference_names import config_of, count, load_parameters, named, spaces_of

from fastwm.agents.dreamer import DreamerAgent, Noise

FILES = ("dreamerv3_image_discrete", "dreamerv3_vector_continuous")
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 5e-4
METRICS = (
    "dyn_ent rep_ent adv adv_std adv_mag rew con ret val weight slowval ret_min ret_max ret_rate"
)


def batch_of(golden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows as replay gives them: row 0 carries latents and action only."""
    data = {k.removeprefix("data/"): v for k, v in golden.items() if k.startswith("data/")}
    action, deter, stoch = data.pop("action"), data.pop("dyn/deter"), data.pop("dyn/stoch")
    batch = {key: value[:, 1:] for key, value in data.items()}
    batch["prev_action"] = action[:, :-1]
    batch["deter"], batch["stoch"] = deter[:, 0], stoch[:, 0].argmax(-1).to(torch.uint8)
    return batch


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.double()
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


@pytest.fixture(params=FILES)
def case(request, golden, variant):
    golden = golden(request.param)
    obs_space, act_space = spaces_of(golden)
    agent = DreamerAgent(obs_space, act_space, config_of(golden))
    stages = count(golden, r"enc/cnn\d+")
    load_parameters(agent.model, named(golden, "params", stages))
    shape = (agent.config.imag_horizon + 1, *golden["data/reward"][:, 1:].reshape(-1).shape)
    half_std = torch.full((*shape, act_space.encoded_size), 0.5)
    noise = Noise(None, None, None if act_space.kind == "discrete" else half_std)
    return golden, agent, agent.losses(batch_of(golden), noise, normalize=False), stages


def test_losses_match(case):
    golden, _, out, _ = case
    theirs = {k.removeprefix("losses/"): v for k, v in golden.items() if k.startswith("losses/")}
    ours = {name.removeprefix("recon/"): term for name, term in out.terms.items()}
    assert set(ours) == set(theirs)
    for name, term in ours.items():
        want = theirs[name]
        assert term.shape == want.shape, name
        assert relative(term, want) < LOSS_TOLERANCE, name
    total = golden["loss_total"]
    assert relative(out.total, total) < LOSS_TOLERANCE


def test_features_match(case):
    golden, agent, out, _ = case
    np.testing.assert_allclose(out.post.deter.detach(), golden["feat/deter"], atol=2e-5)
    np.testing.assert_allclose(out.post.stoch.detach(), golden["feat/stoch"], atol=1e-6)


def test_metrics_match(case):
    golden, _, out, _ = case
    for name in METRICS.split():
        want = float(golden[f"metrics/{name}"])
        assert float(out.metrics[name]) == pytest.approx(want, rel=1e-4, abs=1e-5), name
    assert float(out.metrics["ent"]) == pytest.approx(float(golden["metrics/ent/action"]), rel=1e-4)


def test_gradients_match(case):
    golden, agent, out, stages = case
    out.total.backward()
    theirs = named(golden, "grads", stages)
    ours = {name: param.grad for name, param in agent.trainable()}
    assert set(ours) == set(theirs)
    for name, grad in ours.items():
        assert relative(grad, theirs[name]) < GRADIENT_TOLERANCE, name
