"""Updates under torch.compile: the same numbers, and a way back where it fails."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from test_dreamer import random_batch, tiny_agent, tiny_config

from fastwm import compiled
from fastwm.agents import dreamer
from fastwm.agents.dreamer import COMPILED

SMALL = {"imag_horizon": 2, "optim.warmup": 0, "rssm.deter": 8, "rssm.blocks": 2}


def updates(agent, count: int = 2):
    torch.manual_seed(1)
    return [agent.update(random_batch(agent)) for _ in range(count)]


def check_equal(one, two):
    """Two updates of each: metrics, latents, parameters."""
    for (metrics, latents), (expected, stored) in zip(updates(one), updates(two), strict=True):
        assert list(metrics) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(metrics[key], value, rtol=2e-4, atol=2e-5, msg=key)
        assert torch.equal(latents["stoch"], stored["stoch"])
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["ops", "full"])
def test_traced_updates_equal_eager_ones(mode, monkeypatch):
    """What torch.compile traces, run operation by operation: no C++ compiler, a few seconds."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    agent = tiny_agent(**SMALL, compile=mode)
    assert agent.compiled.names == COMPILED[mode]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        check_equal(agent, tiny_agent(**SMALL, compile="off"))
    assert agent.compiled.names == COMPILED[mode]  # nothing failed


@pytest.mark.slow  # compiles C++ for half a minute
def test_compiled_updates_equal_eager_ones():
    agent = tiny_agent(**SMALL, compile="ops")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        check_equal(agent, tiny_agent(**SMALL, compile="off"))
    assert agent.compiled.names == COMPILED["ops"]


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no C++ compiler\nmore")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_failing_compiler_is_left_out_with_one_warning(where, monkeypatch):
    def compile(function, dynamic):
        def broken(*args, **options):
            if where == "forward":
                raise RuntimeError("no C++ compiler\nmore")
            out = function(*args, **options)
            return out._replace(total=FailsBackward.apply(out.total))

        return broken

    monkeypatch.setattr(compiled.torch, "compile", compile)
    agent, plain = tiny_agent(compile="full"), tiny_agent(compile="off")
    with pytest.warns(
        RuntimeWarning, match="failed \\(RuntimeError: no C\\+\\+ compiler\\);"
    ) as seen:
        found = updates(agent, 3)
    assert len([w for w in seen if "torch.compile" in str(w.message)]) == 1
    assert agent.compiled.names == () and "losses" not in vars(agent)
    for (metrics, _), (expected, _) in zip(found, updates(plain, 3), strict=True):
        assert all(torch.equal(metrics[key], expected[key]) for key in expected)
    for a, b in zip(agent.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_fault_that_is_not_the_compilers_is_shown(monkeypatch):
    monkeypatch.setattr(compiled.torch, "compile", lambda function, dynamic: function)
    agent = tiny_agent(compile="full")
    batch = random_batch(agent)
    batch["reward"] = batch["reward"][:, :-1]
    with pytest.raises(ValueError, match="twohot_loss: expected"):
        agent.update(batch)


def test_auto_is_what_the_doctor_prints():
    choice = dreamer.defaults.compiled(torch.device("cpu")).value
    assert tiny_config().compile == "auto"
    assert tiny_agent().compiled.names == COMPILED[choice]
