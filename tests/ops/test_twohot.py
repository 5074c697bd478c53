"""The two-hot stem: bins, loss with one and two targets, mean."""

import math

import pytest
import torch

from fastwm import ops
from fastwm.ops import (
    available,
    twohot_loss,
    twohot_loss_ref,
    twohot_mean,
    twohot_mean_ref,
)
from fastwm.ops._backend import raw

# (leading shape, V)
SHAPES = [
    ((5,), 255),
    ((2, 3), 41),
    ((), 40),
    ((4,), 2),
    ((0,), 9),
    ((3,), 1),
    ((7,), 33),
    ((2, 1, 2), 16),
    ((1,), 700),
]
fused_only = pytest.mark.skipif(not available("cpu"), reason="no compiled kernels")


def make_bins(count):
    return ops.symexp_bins(count) if count > 1 else torch.zeros(1)


def inputs(shape, count, spread=3.0):
    logits = spread * torch.randn(*shape, count)
    targets = [ops.symexp(4 * torch.randn(shape)) for _ in range(2)]
    return logits.requires_grad_(), targets, make_bins(count)


def gradient(value, leaf):
    weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(value, leaf, weight.to(value.dtype))[0]


def double(tensor):
    return tensor.detach().double().requires_grad_()


@pytest.mark.parametrize("shape, count", SHAPES, ids=str)
@pytest.mark.parametrize("pair", [False, True], ids=["one", "two"])
def test_loss_matches_reference(shape, count, pair, variant, close):
    logits, targets, bins = inputs(shape, count)
    target, weights = (targets, (1.0, 0.3)) if pair else (targets[0], None)
    wide = double(logits)
    expected = twohot_loss_ref(wide, target, bins, weights)
    actual = twohot_loss(logits, target, bins, weights)
    assert actual.shape == shape
    close(actual, expected)
    with torch.no_grad():
        close(twohot_loss(logits, target, bins, weights), expected)
    close(gradient(actual, logits), gradient(expected, wide))


@pytest.mark.parametrize("shape, count", SHAPES, ids=str)
def test_mean_matches_reference(shape, count, variant, near):
    logits, _, bins = inputs(shape, count, spread=1.0)
    wide = double(logits)
    expected, actual = twohot_mean_ref(wide, bins), twohot_mean(logits, bins)
    # The bins end at 5e8, so an absolute error means nothing: relative to the largest term.
    scale = (torch.softmax(wide, -1) * bins).abs().amax(-1).clamp(min=1.0).detach()
    assert actual.shape == shape
    assert (((actual - expected) / scale).abs() < 1e-5).all()
    near(gradient(actual, logits).double(), gradient(expected, wide), 1e-5, "grad_logits")


@pytest.mark.parametrize("count", [2, 3, 40, 41, 255])
@pytest.mark.parametrize("level", [0.0, -3.7, 1e4])
def test_mean_of_uniform_logits_is_exactly_zero(count, level, variant):
    bins = ops.symexp_bins(count)
    logits = torch.full((6, count), level)
    assert torch.equal(twohot_mean(logits, bins), torch.zeros(6))
    compiled = torch.compile(twohot_mean, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, bins), torch.zeros(6))


def test_loss_of_uniform_logits(variant):
    loss = twohot_loss(
        torch.zeros(4, 255), torch.tensor([0.0, 1.0, -1e9, 7e3]), ops.symexp_bins(255)
    )
    torch.testing.assert_close(loss, torch.full((4,), math.log(255)), rtol=1e-6, atol=0)


def test_targets_on_bins_between_bins_and_beyond(variant):
    bins = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    logits = torch.arange(5.0)
    log_p = torch.log_softmax(logits, 0)
    inf = float("inf")
    cases = {
        -2.0: [1, 0, 0, 0, 0],
        -5.0: [1, 0, 0, 0, 0],
        -inf: [1, 0, 0, 0, 0],
        2.0: [0, 0, 0, 0, 1],
        9.0: [0, 0, 0, 0, 1],
        inf: [0, 0, 0, 0, 1],
        0.0: [0, 0, 1, 0, 0],
        0.25: [0, 0, 0.75, 0.25, 0],
        -1.5: [0.5, 0.5, 0, 0, 0],
    }
    for target, weights in cases.items():
        loss = twohot_loss(logits, torch.tensor(target), bins)
        expected = -(torch.tensor(weights) * log_p).sum()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def test_linear_symlog_bins_of_2023(variant):
    """Bins on a line, target through symlog: the worked example of 100 on 255 bins."""
    logits = torch.randn(255)
    loss = twohot_loss(logits, torch.tensor(100.0), ops.symlog_bins(255), squash=True)
    log_p = torch.log_softmax(logits, 0)
    torch.testing.assert_close(
        loss, -(0.69398 * log_p[156] + 0.30602 * log_p[157]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("count", [2, 3, 40, 255])
def test_squashed_loss_and_mean_match_reference(count, variant, close, near):
    logits, targets, _ = inputs((3, 2), count, spread=1.0)
    bins, wide = ops.symlog_bins(count), double(logits)
    assert torch.equal(bins, -bins.flip(0)) and (bins.diff() > 0).all()
    torch.testing.assert_close(bins, torch.linspace(-20, 20, count), rtol=1e-6, atol=1e-6)
    pair = (targets, (1.0, 0.3))
    loss = twohot_loss(logits, pair[0], bins, pair[1], squash=True)
    expected = twohot_loss_ref(wide, [ops.symlog(t.double()) for t in targets], bins, pair[1])
    close(loss, expected, rtol=1e-4, atol=1e-5)  # the target's symlog is rounded to float32
    near(gradient(loss, logits).double(), gradient(expected, wide), 1e-4, "loss")
    mean, exact = twohot_mean(logits, bins, squash=True), twohot_mean_ref(wide, bins, squash=True)
    close(mean, exact, rtol=2e-5, atol=1e-5)
    near(gradient(mean, logits).double(), gradient(exact, wide), 2e-5, "mean")
    assert torch.equal(twohot_mean(torch.zeros(count), bins, squash=True), torch.zeros(()))


def test_golden_symlog_2023(golden, near, variant):
    data = golden("twohot_symlog_2023")
    logits, bins = data["logits"].requires_grad_(), ops.symlog_bins(255)
    loss = twohot_loss(logits, data["target"], bins, squash=True)
    torch.testing.assert_close(-loss, data["log_prob"], rtol=1e-4, atol=1e-4)
    expected = data["grad_of_weighted_log_prob"]
    (grad,) = torch.autograd.grad(-loss, logits, torch.ones_like(loss))
    # Per row the golden is our gradient times a weight; find the weight by projection.
    weight = (grad * expected).sum(-1, keepdim=True) / grad.square().sum(-1, keepdim=True)
    near(grad * weight, expected, 1e-4, "grad")
    mean = twohot_mean(logits, bins, squash=True)
    error = (mean - data["mean"]).abs() / (1 + data["mean"].abs())
    assert error.max() < 1e-4


def test_not_a_number_stays_in_its_row(variant):
    logits, (target, _), bins = inputs((4,), 41)
    target[2] = float("nan")
    with torch.no_grad():
        logits[1, 3] = float("nan")
    loss = twohot_loss(logits, target, bins)
    assert loss.isnan().tolist() == [False, True, True, False]
    grad = torch.autograd.grad(loss.sum(), logits)[0]
    assert grad[0].isfinite().all() and grad[3].isfinite().all()
    assert grad[1].isnan().any() and grad[2].isnan().any()
    assert twohot_mean(logits, bins).isnan().tolist() == [False, True, False, False]


def test_any_stride_and_low_precision(variant, close):
    logits = torch.randn(9, 6, 5).permute(2, 1, 0)[:, ::2]
    bins, target = torch.linspace(-4, 4, 18)[::2], torch.randn(3, 5).t()
    close(twohot_loss(logits, target, bins), twohot_loss_ref(logits, target, bins))
    expanded = torch.zeros(()).expand(5, 3)
    close(twohot_loss(logits, expanded, bins), twohot_loss_ref(logits, expanded, bins))
    low = logits.bfloat16().requires_grad_()
    loss = twohot_loss(low, target, bins)
    assert loss.dtype == torch.float32 and twohot_mean(low, bins).dtype == torch.float32
    assert torch.autograd.grad(loss.sum(), low)[0].dtype == torch.bfloat16


def test_many_bins_run_on_the_reference(close):
    logits, (target, _), bins = inputs((2,), 1500)
    close(twohot_mean(logits, bins) / 1e8, twohot_mean_ref(logits, bins) / 1e8)
    close(twohot_loss(logits, target, bins), twohot_loss_ref(logits, target, bins))


def test_gradcheck_of_references():
    logits, (target, other), _ = inputs((3,), 7)
    bins = torch.linspace(-3, 3, 7)
    wide = double(logits)
    assert torch.autograd.gradcheck(
        lambda x: twohot_loss_ref(x, (target, other), bins, (1.0, 0.5)), wide
    )
    assert torch.autograd.gradcheck(lambda x: twohot_mean_ref(x, bins), wide)


@fused_only
def test_opcheck():
    logits, (target, other), bins = inputs((2, 3), 9)
    logits = logits.detach()
    for second in (None, other):
        args = (logits, bins, target, second, 1.0, 0.5)
        torch.library.opcheck(raw.twohot_loss.default, args)
        loss, exp_sum = raw.twohot_loss(*args)
        torch.library.opcheck(raw.twohot_loss_backward.default, (loss, exp_sum, *args))
    torch.library.opcheck(raw.twohot_mean.default, (logits, bins))
    torch.library.opcheck(raw.twohot_mean_backward.default, (target, logits, bins))


def test_fullgraph_compile(variant, close):
    def everything(logits, target, other, bins):
        return twohot_loss(logits, (target, other), bins) + ops.symlog(twohot_mean(logits, bins))

    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    logits, targets, bins = inputs((2, 3), 9, spread=1.0)
    got, want = compiled(logits, *targets, bins), everything(logits, *targets, bins)
    close(got, want)
    close(gradient(got, logits), gradient(want, logits))


def test_bad_input_messages(variant):
    logits, (target, _), bins = inputs((3, 4), 9)
    with pytest.raises(ValueError, match=r"bins of shape \(V,\) = \(9,\), got \(8,\)"):
        twohot_loss(logits, target, bins[1:])
    with pytest.raises(ValueError, match=r"target of shape \(...\) = \(3, 4\), got \(3, 3\)"):
        twohot_loss(logits, target[:, 1:], bins)
    with pytest.raises(ValueError, match="one target or a pair, got 3"):
        twohot_loss(logits, (target, target, target), bins)
    with pytest.raises(ValueError, match="expected 2 weights, one per target, got 1"):
        twohot_loss(logits, (target, target), bins, (1.0,))
    with pytest.raises(TypeError, match="logits of dtype a floating type, got int64"):
        twohot_mean(logits.long(), bins)
    with pytest.raises(ValueError, match=r"bins of shape \(V,\)"):
        twohot_mean(logits, bins[1:])
    with pytest.raises(ValueError, match="expected n >= 2, got 1"):
        ops.symexp_bins(1)
    with pytest.raises(ValueError, match="symlog_bins: expected n >= 2, got 0"):
        ops.symlog_bins(0)


@fused_only
def test_raw_ops_refuse_forged_input():
    logits, (target, _), bins = inputs((3,), 9)
    logits = logits.detach()
    forged = [
        lambda: raw.twohot_loss(logits, bins[1:], target, None, 1.0, 1.0),
        lambda: raw.twohot_loss(logits, bins, target[1:], None, 1.0, 1.0),
        lambda: raw.twohot_loss(logits, bins, target, target[1:], 1.0, 1.0),
        lambda: raw.twohot_loss(logits, bins, target.double(), None, 1.0, 1.0),
        lambda: raw.twohot_loss(logits[:, :0], bins[:0], target, None, 1.0, 1.0),
        lambda: raw.twohot_loss_backward(target, target[1:], logits, bins, target, None, 1.0, 1.0),
        lambda: raw.twohot_loss_backward(target[1:], target, logits, bins, target, None, 1.0, 1.0),
        lambda: raw.twohot_mean(logits, bins[1:]),
        lambda: raw.twohot_mean(torch.randn(2, 3000), torch.randn(3000)),
        lambda: raw.twohot_mean_backward(target[1:], logits, bins),
    ]
    for call in forged:
        with pytest.raises(RuntimeError, match="expected"):
            call()


def groups(data):
    return sorted({key.split("/")[0] for key in data})


def test_golden_symlog(golden):
    data = golden("dreamerv3_head_pieces")
    torch.testing.assert_close(ops.symlog(data["symlog/x"]), data["symlog/y"], rtol=2e-6, atol=0)
    torch.testing.assert_close(
        ops.symexp(data["symlog/y"]), data["symlog/symexp"], rtol=5e-6, atol=0
    )


def test_golden_bins(golden):
    data = golden("dreamerv3_head_pieces")
    names = [key for key in data if key.startswith("bins")]
    assert names
    for name in names:
        bins = ops.symexp_bins(data[name].shape[0])
        torch.testing.assert_close(bins, data[name], rtol=3e-6, atol=0)
        assert torch.equal(bins, -bins.flip(0))


def test_golden_symexp(golden, near, variant):
    data = golden("twohot_symexp")
    for group in groups(data):
        bins, target = data[f"{group}/bins"], data[f"{group}/target"]
        logits = data[f"{group}/logits"].requires_grad_()
        loss = ops.twohot_loss(logits, target, bins)
        torch.testing.assert_close(loss, data[f"{group}/loss"], rtol=2e-6, atol=2e-6)
        expected = data[f"{group}/grad_of_weighted_loss"]
        (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
        # Per row the golden is our gradient times a weight; find the weight by projection.
        weight = (grad * expected).sum(-1, keepdim=True) / grad.square().sum(-1, keepdim=True)
        near(grad * weight, expected, 1e-5, f"{group} grad")
        mean = ops.twohot_mean(logits, bins)
        error = (mean - data[f"{group}/mean"]).abs() / (1 + data[f"{group}/mean"].abs())
        assert error.max() < 1e-4, group


def test_golden_head_pieces(golden, near, variant):
    data = golden("dreamerv3_head_pieces")
    bins = data[f"bins{data['twohot/logits'].shape[-1]}"]
    logits = data["twohot/logits"].requires_grad_()
    loss = ops.twohot_loss(logits, data["twohot/target"], bins)
    torch.testing.assert_close(loss, data["twohot/loss"], rtol=5e-6, atol=5e-6)
    near(torch.autograd.grad(loss.sum(), logits)[0], data["twohot/grad"], 1e-5, "grad")
    mean = ops.twohot_mean(logits, bins)
    error = (mean - data["twohot/pred"]).abs() / (1 + data["twohot/pred"].abs())
    assert error.max() < 1e-4
    row = torch.arange(mean.shape[0], dtype=torch.float32)  # the golden's cotangent
    grad = torch.autograd.grad(mean, logits, row)[0]
    near(grad, data["twohot/pred_grad"], 1e-5, "pred grad")
