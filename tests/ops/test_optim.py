"""The optim stem: goldens, reference parity, errors."""

import math

import pytest
import torch

from fastwm import ops


class Run:
    """Parameters by name and everything the optimizer keeps about them."""

    def __init__(self, params):
        self.names = list(params)
        self.params = [params[name].clone() for name in self.names]
        self.mu = [torch.zeros_like(p) for p in self.params]
        self.nu = [torch.zeros_like(p) for p in self.params]
        self.step = torch.zeros((), dtype=torch.int64)

    def update(self, grads, lr, **options):
        return ops.laprop_agc_(
            self.params, [grads[name] for name in self.names], self.mu, self.nu, self.step,
            torch.tensor(lr, dtype=torch.float32), **options)


def under(data, prefix):
    return {k[len(prefix):]: v for k, v in data.items() if k.startswith(prefix)}


def test_golden_laprop(golden, near):
    data = golden("laprop_agc")
    run = Run(under(data, "params0/"))
    options = {k: float(data[k]) for k in ("agc", "pmin", "beta1", "beta2", "eps")}
    number = 0
    while f"step{number}/grad/{run.names[0]}" in data:
        grads = under(data, f"step{number}/grad/")
        lr = float(data["lr"]) * min(1.0, number / float(data["warmup"]))
        norm, finite = run.update(grads, lr, **options)
        assert finite
        expected = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        assert math.isclose(float(norm), expected, rel_tol=1e-6)
        for name, param in zip(run.names, run.params, strict=True):
            near(param, data[f"step{number}/params/{name}"], 2e-5, f"{number} {name}")
        number += 1
    assert number > 1 and run.step == number


def cosine(number):
    """Two updates of warm-up, then a cosine over four down to alpha = 0.1 * 0.01 of the rate."""
    if number < 2:
        return number / 2
    return 0.999 * 0.5 * (1 + math.cos(math.pi * (number - 2) / 4)) + 0.001


SETTINGS = {
    "default": ({}, lambda number: min(1.0, number / 3)),
    "wd": ({"weight_decay": 0.1}, lambda number: 1.0),
    "nesterov": ({"nesterov": True}, lambda number: 1.0),
    "cosine": ({}, cosine),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_golden_head_pieces(golden, near, setting):
    data = golden("dreamerv3_head_pieces")
    options, schedule = SETTINGS[setting]
    run = Run(under(data, "opt/init/"))
    mask = [name.endswith("kernel") for name in run.names]
    number = 0
    while f"opt/grad{number}/{run.names[0]}" in data:
        grads = under(data, f"opt/grad{number}/")
        run.update(grads, 0.01 * schedule(number), decay_mask=mask, **options)
        for name, param in zip(run.names, run.params, strict=True):
            near(param, data[f"opt/{setting}/step{number}/{name}"], 2e-5, f"{number} {name}")
        number += 1
    assert number > 1
