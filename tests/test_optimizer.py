"""The optimizer around the op: which rate comes when, what is skipped, what is stored."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastwm import config
from fastwm.optim import LaProp

DEFAULTS = config.flatten(config.DreamerConfig())
OPTIONS = {k.removeprefix("optim."): v for k, v in DEFAULTS.items() if k.startswith("optim.")}


def make(**options):
    weight, bias = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
    return LaProp([("w", weight), ("b", bias)], **(OPTIONS | {"lr": 1.0, "warmup": 4} | options))


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("const", [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.25, 0.5, 0.75, 1, 0.775, 0.55, 0.325, 0.1, 0.1]),
        ("cosine", [0, 0.25, 0.5, 0.75, 1, 0.1 + 0.45 * (1 + math.sqrt(0.5)), 0.55,
                    0.1 + 0.45 * (1 - math.sqrt(0.5)), 0.1, 0.1]),
    ],
)  # fmt: skip
def test_rates(schedule, rates):
    optimizer = make(schedule=schedule, anneal=0 if schedule == "const" else 8)
    found = []
    for _ in rates:
        found.append(float(optimizer.learning_rate()))
        for param in optimizer.params:
            param.grad = torch.ones_like(param)
        optimizer.step(torch.tensor(1.0))
    assert found == pytest.approx(rates, abs=1e-6)


def test_without_warmup_the_first_update_moves():
    optimizer = make(warmup=0, lr=0.5, agc=0.0)
    for param in optimizer.params:
        param.grad = torch.full_like(param, 3.0)
    optimizer.step(torch.tensor(1.0))
    for param in optimizer.params:
        torch.testing.assert_close(param.data, torch.full_like(param, 0.5))


def test_weight_decay_reaches_matrices_only():
    optimizer = make(warmup=0, lr=0.5, weight_decay=0.1)
    optimizer.step(torch.tensor(1.0))  # no gradients at all
    weight, bias = optimizer.params
    torch.testing.assert_close(weight.data, torch.full((2, 3), 0.95))
    assert torch.equal(bias.data, torch.ones(3))


def test_a_bad_loss_skips_the_update():
    optimizer = make(warmup=0)
    for param in optimizer.params:
        param.grad = torch.ones_like(param)
    _, finite = optimizer.step(torch.tensor(math.inf))
    assert not bool(finite) and float(optimizer.step_count) == 0.0
    assert all(torch.equal(p.data, torch.ones_like(p)) for p in optimizer.params)


def test_moments_of_another_model_are_refused():
    other = LaProp([("x", nn.Parameter(torch.ones(1)))], **OPTIONS)
    with pytest.raises(ValueError, match="expected moments of 2 parameters, got 1"):
        make().load_state_dict(other.state_dict())


def test_a_schedule_needs_an_end():
    with pytest.raises(ValueError, match="expected optim.anneal > warmup = 4 for schedule"):
        make(schedule="linear", anneal=4)
    with pytest.raises(ValueError, match="expected schedule to be one of"):
        make(schedule="step")
