"""The optimizer around the op: which rate comes when, what is skipped, what is stored."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastwm import config, ops
from fastwm.optim import Adam, LaProp

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


def net_and_twin():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    return nets


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_trains_like_torch(decoupled):
    """With warm-up from zero, decay on matrices only, and clipping."""
    ours, theirs = net_and_twin()
    optimizer = Adam(ours.named_parameters(), lr=0.01, clip=0.5, eps=1e-6, weight_decay=0.1,
                     decoupled=decoupled, warmup=3)  # fmt: skip
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    other = (torch.optim.AdamW if decoupled else torch.optim.Adam)(groups, eps=1e-6)
    for number in range(6):
        x = torch.randn(9, 5)
        for net in (ours, theirs):
            net.zero_grad()
            net(x).square().sum().backward()
        for group in other.param_groups:
            group["lr"] = 0.01 * min(1.0, number / 3)
        norm, finite = optimizer.step(torch.tensor(0.0))
        assert bool(finite) and norm > 0.5
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        other.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [LaProp, Adam])
def test_state_goes_on_where_it_was(kind):
    def make_one(net):
        options = OPTIONS | {"lr": 0.01, "warmup": 2} if kind is LaProp else {"lr": 0.01}
        return kind(net.named_parameters(), **options)

    ours, theirs = net_and_twin()
    first, x = make_one(ours), torch.randn(9, 5)

    def update(optimizer, net):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step(torch.tensor(0.0))

    for _ in range(3):
        update(first, ours)
    theirs.load_state_dict(ours.state_dict())
    second = make_one(theirs)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        update(first, ours)
        update(second, theirs)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [LaProp, Adam])
def test_copies_follow_the_parameters(kind):
    net, twin = net_and_twin()
    options = OPTIONS | {"lr": 0.1, "warmup": 0} if kind is LaProp else {"lr": 0.1}
    optimizer = kind(net.named_parameters(), **options)
    net(torch.randn(9, 5)).square().sum().backward()
    slow = [twin[0].weight.detach(), None, None, None]
    before = slow[0].clone()
    optimizer.step(torch.tensor(0.0), copies=ops.Copies(slow, 0.25))
    expected = 0.25 * net[0].weight.detach() + 0.75 * before
    torch.testing.assert_close(slow[0], expected)
    assert not torch.equal(slow[0], before)
