"""The RSSM module around its ops: single steps, and how imagined states lie."""

import pytest
import torch

from fastwm import ops
from fastwm.optim import LaProp
from fastwm.rssm import RSSM, feat

SIZES = {"deter": 16, "hidden": 8, "stoch": 3, "classes": 5, "blocks": 2}
LAYERS = {"dynlayers": 1, "obslayers": 1, "imglayers": 2}


@pytest.fixture
def rssm():
    torch.manual_seed(0)
    rssm = RSSM(6, 2, **SIZES, **LAYERS, unimix=0.01)
    for parameter in rssm.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return rssm


def arguments(rssm, count=7):
    stoch = rssm.one_hot(torch.randint(0, 5, (count, 3)))
    is_first = torch.arange(count) % 3 == 0
    deter = torch.randn(count, 16)
    deter[0] = torch.nan  # forgotten by the reset
    return (
        deter,
        stoch,
        torch.randn(count, 6),
        torch.randn(count, 2),
        is_first,
        torch.rand(count, 3),
    )


def expected_step(rssm, deter, stoch, *rows):
    deter, _, stoch = rssm.observe(deter, stoch, *(x.unsqueeze(1) for x in rows))
    return deter.squeeze(1), stoch.squeeze(1)


@pytest.mark.parametrize("layers", [1, 2])
def test_step_is_observe_of_one_row(rssm, layers):
    if layers == 2:
        torch.manual_seed(1)
        options = {"dynlayers": 2, "obslayers": 2, "imglayers": 1}
        rssm = RSSM(6, 2, **SIZES, **options, unimix=0.01)
    args = arguments(rssm)
    for got, want in zip(rssm.step(*args), expected_step(rssm, *args), strict=True):
        torch.testing.assert_close(got, want)
        assert not got.requires_grad
    greedy = (*args[:-1], None)
    deter, stoch = rssm.step(*greedy)
    wide = rssm.observe(*args[:2], *(x.unsqueeze(1) for x in args[2:-1]), None)
    torch.testing.assert_close(deter, wide[0].squeeze(1))
    assert torch.equal(stoch, wide[2].squeeze(1))


def change_by_optimizer(rssm):
    options = {"lr": 0.1, "agc": 0.3, "pmin": 1e-3, "eps": 1e-20, "beta1": 0.9, "beta2": 0.999}
    options |= {"weight_decay": 0.0, "nesterov": False, "warmup": 0, "schedule": "const"}
    optimizer = LaProp(list(rssm.named_parameters()), **options, anneal=0)
    for parameter in rssm.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(torch.zeros(()))


def change_by_loading(rssm):
    rssm.load_state_dict({key: 0.5 * value for key, value in rssm.state_dict().items()})


@pytest.mark.parametrize("change", [change_by_optimizer, change_by_loading])
def test_step_sees_changed_weights(rssm, change):
    args = arguments(rssm)
    before, _ = rssm.step(*args)
    change(rssm)
    after, _ = rssm.step(*args)
    assert not torch.allclose(before[1:], after[1:])
    torch.testing.assert_close(after, expected_step(rssm, *args)[0])


def test_step_follows_the_backend(rssm):
    args = arguments(rssm)
    fused, _ = rssm.step(*args)
    with ops.use_backend("reference"):
        plain, _ = rssm.step(*args)
    torch.testing.assert_close(plain, fused)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_imagined_states_lie_as_features(rssm, backend):
    deter, stoch, *_ = arguments(rssm)
    deter[0] = 0.0
    seen = []

    def policy(features):
        seen.append(features.clone())
        return features[:, :2]

    noise = torch.rand(3, 7, 3)
    with ops.use_backend(backend):
        features, actions = rssm.imagine(deter, stoch, policy, 3, noise)
        states = ops.rssm_imagine(rssm.weights(), deter, stoch, lambda d, s: d[:, :2], 3, noise)
    assert features.is_contiguous() and features.shape == (7, 4, 16 + 15)
    torch.testing.assert_close(features, feat(*states[:2]))
    torch.testing.assert_close(actions, states[2])
    torch.testing.assert_close(torch.stack(seen, 1), features)
    for got, want in zip(rssm.split(features), states, strict=False):
        torch.testing.assert_close(got, want)
