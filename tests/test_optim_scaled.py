"""Adam with clip and loss scale: the order of a mixed-precision update, and what overflow does."""

import copy

import pytest
import torch
from torch import nn
from trees import same

from fastwm.optim import LossScale
from fastwm.optim_scaled import ScaledAdam


def make(scaled, clip=0.5, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    options = {"lr": 1e-2, "eps": 1e-8, **options}
    return net, ScaledAdam(net.named_parameters(), clip=clip, scaled=scaled, **options)


def loss_of(net):
    return (net(torch.linspace(-1, 1, 12).view(3, 4)) - 5.0).square().mean()


def params(net):
    return torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def test_equals_the_written_out_sequence(near):
    """zero, scale.backward, unscale, clip, step, update with the library's scaler."""
    (ours, part), (theirs, _) = make(True), make(True)
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2, eps=1e-8)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    part.scale.value.fill_(2.0**14)
    for _ in range(5):
        metrics, applied, well = part.descend(loss_of(ours))
        adam.zero_grad()
        scaler.scale(loss_of(theirs)).backward()
        scaler.unscale_(adam)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        scaler.step(adam)
        scaler.update()
        assert applied and well
        near(metrics["grad_norm"], norm)
        assert norm > 0.5  # the clip is at work
    near(params(ours), params(theirs), 1e-6)


def test_clips_what_is_unscaled(near):
    """With a scale of 2^16 the clipped gradients are those of a plain update."""
    (one, scaled), (two, plain) = make(True), make(False)
    scaled.scale.value.fill_(2.0**16)
    norms = [
        part.descend(loss_of(net))[0]["grad_norm"] for net, part in ((one, scaled), (two, plain))
    ]
    near(norms[0], norms[1], 1e-3)
    for a, b in zip(scaled.adam.mu, plain.adam.mu, strict=True):
        near(a, b, 1e-3)
    total = torch.nn.utils.get_total_norm(scaled.adam.mu) / 0.1  # the clipped gradient
    near(total, torch.tensor(0.5), 1e-4)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("scaled", [True, False])
def test_what_is_not_finite_changes_nothing(bad, scaled):
    net, part = make(scaled)
    part.descend(loss_of(net))
    before, moments = params(net), copy.deepcopy(part.adam.state_dict())
    scale = float(part.scale.value) if scaled else None
    weight = next(net.parameters())
    handle = weight.register_hook(lambda grad: grad * bad)  # injected into the gradient
    _, applied, well = part.descend(loss_of(net))
    handle.remove()
    assert not applied and bool(well) == scaled  # a smaller scale may cure it
    assert torch.equal(params(net), before)
    same(part.adam.state_dict(), moments)
    if scaled:
        assert float(part.scale.value) == scale / 2
    assert part.descend(loss_of(net))[1]  # and the next update goes on
    assert not torch.equal(params(net), before)


def test_a_bad_loss_with_good_gradients_is_skipped():
    net, part = make(True)
    before = params(net)
    loss = loss_of(net)
    _, applied, well = part.descend(loss + torch.tensor(float("inf")))
    assert not applied and not well and torch.equal(params(net), before)


def test_the_scale_grows_after_good_updates():
    net, part = make(True)
    part.scale = LossScale(torch.device("cpu"), initial=8.0, patience=3)
    scales = [float(part.descend(loss_of(net))[0]["grad_scale"]) for _ in range(4)]
    assert scales == [8.0, 8.0, 16.0, 16.0]


def test_resumes_exactly():
    one, first = make(True)
    for _ in range(3):
        first.descend(loss_of(one))
    first.scale.value.fill_(64.0)
    two, second = make(True, lr=1e-2)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for net, part in ((one, first), (two, second)):
        for _ in range(3):
            part.descend(loss_of(net))
    assert torch.equal(params(one), params(two)) and second.scale.value == 64.0


def test_another_model_is_refused():
    _, part = make(False)
    other = ScaledAdam([("x", nn.Parameter(torch.ones(1)))], lr=1e-3, eps=1e-8, clip=0.0)
    with pytest.raises(ValueError, match="belongs to another model"):
        other.load_state_dict(part.state_dict())


def test_no_clip_keeps_the_gradient(near):
    net, part = make(False, clip=0.0)
    metrics, _, _ = part.descend(loss_of(net))
    near(torch.nn.utils.get_total_norm(part.adam.mu) / 0.1, metrics["grad_norm"], 1e-4)
