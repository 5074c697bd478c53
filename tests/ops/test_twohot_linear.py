"""The two-hot stem with the linear layer before it: mean and loss of x W^T + b."""

import pytest
import torch
from test_mlp import on_threads
from test_twohot import double, fused_only, make_bins

from fastwm import ops
from fastwm.ops import (
    twohot_loss,
    twohot_loss_linear,
    twohot_loss_linear_ref,
    twohot_mean,
    twohot_mean_linear,
    twohot_mean_linear_ref,
)
from fastwm.ops._backend import raw

# ---- the mean of a linear head


HEADS = [((5,), 64, 255), ((2, 3), 7, 41), ((), 1, 40), ((0,), 3, 9), ((200,), 33, 255),
         ((30,), 130, 1024), ((97,), 16, 1)]  # fmt: skip


def head(lead, units, count):
    weight, bias = 2 * torch.randn(count, units) / units**0.5, torch.randn(count)
    return torch.randn(*lead, units), weight, bias, make_bins(count)


@pytest.mark.parametrize("lead, units, count", HEADS, ids=str)
@pytest.mark.parametrize("squash", [False, True])
def test_mean_of_a_linear_head_matches_reference(lead, units, count, squash, variant):
    *args, bins = head(lead, units, count)
    bins = ops.symlog_bins(count) if squash and count > 1 else bins
    expected = twohot_mean_linear_ref(*(t.double() for t in args), bins.double(), squash=squash)
    actual = twohot_mean_linear(*args, bins, squash=squash)
    assert actual.shape == lead
    if squash:
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
        return
    logits = torch.nn.functional.linear(*(t.double() for t in args))
    scale = (torch.softmax(logits, -1) * bins).abs().amax(-1).clamp(min=1.0)
    assert (((actual - expected) / scale).abs() < 1e-5).all()


def test_mean_of_a_linear_head_has_gradients(variant, close):
    *args, bins = head((6,), 8, 41)
    bins = bins / bins[-1]
    narrow, wide = [[t.detach().to(d).requires_grad_() for t in args] for d in (torch.float32,
                    torch.float64)]  # fmt: skip
    got = torch.autograd.grad(twohot_mean_linear(*narrow, bins).sum(), narrow)
    want = torch.autograd.grad(twohot_mean_linear_ref(*wide, bins.double()).sum(), wide)
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_mean_of_a_linear_head_in_any_layout(variant, close):
    x, weight, bias, bins = head((4, 6), 8, 41)
    bins = bins / bins[-1]
    apart = torch.stack([bias, bias], 1)[:, 0]
    turned = x.transpose(0, 1), weight.t().contiguous().t(), apart
    close(twohot_mean_linear(*turned, bins), twohot_mean_linear(x, weight, bias, bins).t())
    with torch.autocast("cpu", torch.bfloat16):
        low = twohot_mean_linear(x, weight, bias, bins)
    torch.testing.assert_close(low, twohot_mean_linear(x, weight, bias, bins), rtol=0.1, atol=0.1)


def test_not_a_number_of_a_linear_head_stays_in_its_row(variant):
    x, weight, bias, bins = head((130,), 8, 41)
    x[99, 3] = float("nan")
    mean = twohot_mean_linear(x, weight, bias, bins)
    assert mean.isnan().nonzero().flatten().tolist() == [99]


@fused_only
def test_rows_of_a_linear_head_do_not_depend_on_each_other_or_on_threads():
    x, weight, bias, bins = head((1000,), 24, 255)
    whole, before = twohot_mean_linear(x, weight, bias, bins), torch.get_num_threads()
    parts = [twohot_mean_linear(part, weight, bias, bins) for part in x.split([1, 96, 100, 803])]
    torch.set_num_threads(2)
    shared = twohot_mean_linear(x, weight, bias, bins)
    torch.set_num_threads(before)
    assert torch.equal(whole, torch.cat(parts)) and torch.equal(whole, shared)


@fused_only
def test_opcheck_and_compile_of_a_linear_head(close):
    args = head((3, 2), 7, 41)
    torch.library.opcheck(raw.twohot_mean_linear.default, args)
    compiled = torch.compile(twohot_mean_linear, fullgraph=True, backend="aot_eager")
    close(compiled(*args), twohot_mean_linear(*args))


@pytest.mark.parametrize(
    "place, forge, error, message",
    [
        (0, lambda x: x[:, 1:], ValueError, "expected weight of shape"),
        (1, lambda x: x[1:], ValueError, "expected bias of shape"),
        (3, lambda x: x[1:], ValueError, "expected bins of shape"),
        (0, lambda x: x.int(), TypeError, "expected x of dtype"),
    ],
)
def test_bad_linear_heads(place, forge, error, message, variant):
    args = list(head((3,), 7, 41))
    args[place] = forge(args[place])
    with pytest.raises(error, match=message):
        twohot_mean_linear(*args)


# ---- the loss of a linear head


@pytest.mark.parametrize("lead, units, count", HEADS, ids=str)
@pytest.mark.parametrize("pair", [False, True], ids=["one", "two"])
def test_loss_of_a_linear_head_matches_reference(lead, units, count, pair, variant, close, near):
    *parts, bins = head(lead, units, count)
    targets = [ops.symexp(4 * torch.randn(lead)) for _ in range(2)]
    target, weights = (targets, (1.0, 0.3)) if pair else (targets[0], None)
    narrow, wide = [part.requires_grad_() for part in parts], [double(part) for part in parts]
    loss = twohot_loss_linear(*narrow, target, bins, weights)
    expected = twohot_loss_linear_ref(*wide, target, bins, weights)
    close(loss, expected)
    if loss.numel() and count > 1:  # of one bin the gradient is rounding
        factor = torch.randn(lead)
        got = torch.autograd.grad(loss, narrow, factor)
        want = torch.autograd.grad(expected, wide, factor.double())
        for name, mine, exact in zip(("x", "weight", "bias"), got, want, strict=True):
            near(mine.double(), exact, 1e-5, name)


def test_mean_and_loss_share_their_logits(variant):
    """The mean without gradient leaves the logits to the loss, whose gradient is the same."""
    x, weight, bias, bins = head((110,), 12, 41)
    target = ops.symexp(torch.randn(110))
    results = []
    for first in (False, True):
        parts = [part.detach().requires_grad_() for part in (x, weight, bias)]
        logits = ops.LinearLogits(*parts)
        if first:
            with torch.no_grad():
                mean = twohot_mean(logits, bins)
            assert torch.allclose(mean, twohot_mean_linear(x, weight, bias, bins), rtol=1e-5)
        loss = twohot_loss(logits, target, bins)
        results.append([loss, *torch.autograd.grad(loss.square().sum(), parts)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_kernels_mean_and_loss_take_one_product():
    parts, bins = [part.requires_grad_() for part in head((6,), 4, 9)[:3]], make_bins(9)
    logits = ops.LinearLogits(*parts)
    with ops.use_backend("reference"):
        with torch.no_grad():
            mean = twohot_mean(logits, bins)
        first = logits.tensor()
        loss = twohot_loss(logits, torch.zeros(6), bins)
    assert logits.tensor() is first and first.requires_grad and not mean.requires_grad
    torch.autograd.grad(loss.sum(), parts)


def test_gradients_of_a_linear_head_where_only_some_are_wanted(variant, close):
    parts, bins = head((7, 3), 5, 41)[:3], make_bins(41)
    target = ops.symexp(torch.randn(7, 3))
    everything = [part.detach().requires_grad_() for part in parts]
    grads = torch.autograd.grad(twohot_loss_linear(*everything, target, bins).sum(), everything)
    for i in range(3):
        some = [part.detach().requires_grad_(k == i) for k, part in enumerate(parts)]
        only = torch.autograd.grad(twohot_loss_linear(*some, target, bins).sum(), some[i])[0]
        close(only, grads[i])
    with torch.no_grad():
        twohot_loss_linear(*everything, target, bins)
    wide = [double(part) for part in parts]  # without kernels: through the reference
    exact = torch.autograd.grad(twohot_loss_linear(*wide, target.double(), bins).sum(), wide)
    for mine, other in zip(grads, exact, strict=True):
        close(mine, other)


def test_loss_of_a_linear_head_does_not_depend_on_threads():
    parts, bins = head((500,), 24, 255)[:3], make_bins(255)
    target = ops.symexp(torch.randn(500))
    results = []
    for threads in (1, 2):
        with on_threads(threads):
            mine = [part.detach().requires_grad_() for part in parts]
            loss = twohot_loss_linear(*mine, target, bins)
            results.append([loss, *torch.autograd.grad(loss.sum(), mine)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_linear_logits_refuse_what_does_not_fit():
    x, weight, bias = torch.randn(2, 4), torch.randn(9, 4), torch.randn(9)
    with pytest.raises(ValueError, match=r"LinearLogits: expected weight of shape \(V, U\)"):
        ops.LinearLogits(x, weight[:, :3], bias)
    with pytest.raises(ValueError, match=r"LinearLogits: expected bias of shape \(V,\)"):
        ops.LinearLogits(x, weight, bias[:3])
    with pytest.raises(ValueError, match=r"twohot_mean: expected bins of shape \(V,\)"):
        twohot_mean(ops.LinearLogits(x, weight, bias), torch.zeros(8))
    with pytest.raises(ValueError, match=r"twohot_loss: expected bins of shape \(V,\)"):
        twohot_loss(ops.LinearLogits(x, weight, bias), torch.zeros(2), torch.zeros(8))
    with pytest.raises(TypeError, match="LinearLogits: expected weight"):
        ops.LinearLogits(x, weight.long(), bias)


@fused_only
def test_opcheck_and_compile_of_the_loss_of_a_linear_head(close):
    x, weight, bias, bins = head((3, 2), 7, 41)
    target = ops.symexp(torch.randn(3, 2))
    logits, _ = raw.twohot_linear(x, weight, bias, bins)
    loss, exp_sum = raw.twohot_loss(logits, bins, target, None, 1.0, 1.0)
    torch.library.opcheck(raw.twohot_linear.default, (x, weight, bias, bins))
    for wants_x in (True, False):
        args = (torch.ones_like(loss), exp_sum, logits, bins, target, None, 1.0, 1.0)
        torch.library.opcheck(raw.twohot_linear_backward.default, (*args, x, weight, wants_x))
    compiled = torch.compile(twohot_loss_linear, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, twohot_loss_linear):
        parts = [part.detach().requires_grad_() for part in (x, weight, bias)]
        value = function(*parts, target, bins)
        results.append([value, *torch.autograd.grad(value.sum(), parts)])
    for mine, eager in zip(*results, strict=True):
        close(mine, eager)


def test_logits_that_were_kept_are_not_used_for_other_weights(variant, close):
    x, weight, bias, bins = head((30,), 6, 21)
    target = ops.symexp(torch.randn(30))
    logits = ops.LinearLogits(x, weight, bias)
    twohot_mean(logits, bins)
    weight.mul_(2)
    if variant == "fused":  # the reference keeps its product for good
        close(twohot_loss(logits, target, bins), twohot_loss_linear(x, weight, bias, target, bins))


@fused_only
def test_a_mean_in_inference_mode_leaves_a_loss_its_gradient():
    parts, bins = [part.requires_grad_() for part in head((6,), 4, 9)[:3]], make_bins(9)
    logits = ops.LinearLogits(*parts)
    with torch.inference_mode():
        twohot_mean(logits, bins)
    torch.autograd.grad(twohot_loss(logits, torch.zeros(6), bins).sum(), parts)
