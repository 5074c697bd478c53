"""Any shape, any stride: every op equals its reference on shapes that nobody chose."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastwm import ops
from fastwm.ops._cases import _weights as make_weights

# The same examples in every run; a few dozen milliseconds an op.
FEW = settings(
    max_examples=25, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
LEAD = st.lists(st.integers(0, 4), max_size=3).map(tuple)
VIEWS = st.sampled_from(["plain", "skip", "flip", "expand"])
pytestmark = pytest.mark.skipif(not ops.available("cpu"), reason="no compiled kernels")


def view(x, how):
    """The tensor, or one of its shape that lies differently in memory."""
    if how == "skip" and x.dim():
        return torch.stack([x, x + 1], -1).flatten(-2)[..., ::2]
    if how == "flip" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "expand" and x.dim() and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    return x


def agree(name, args, wrt, rtol=2e-5, floor=1e-2):
    """Results and gradients of an op against its reference in float64."""
    leaves = [x.detach().requires_grad_(i in wrt) if torch.is_tensor(x) else x
              for i, x in enumerate(args)]  # fmt: skip
    wide = [x.detach().double().requires_grad_(i in wrt)
            if torch.is_tensor(x) and x.is_floating_point() else x
            for i, x in enumerate(args)]  # fmt: skip
    results = [getattr(ops, name)(*leaves), getattr(ops, f"{name}_ref")(*wide)]
    results = [r if isinstance(r, tuple) else (r,) for r in results]
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape
        near(a, b, rtol, floor)
    grads = []
    for outs, inputs in zip(results, (leaves, wide), strict=True):
        noise = torch.Generator().manual_seed(0)
        total = sum((x * torch.randn(x.shape, generator=noise)).sum()
                    for x in outs if x.requires_grad)  # fmt: skip
        grads.append(torch.autograd.grad(total, [inputs[i] for i in wrt], materialize_grads=True))
    for i, a, b in zip(wrt, *grads, strict=True):
        assert a.shape == args[i].shape
        near(a, b, rtol, floor)


def near(a, b, rtol, floor=1e-2):
    a, b = a.detach().double(), b.detach().double()
    # What cancels leaves the last bits of what it was made of: `floor` is the size of that.
    scale = torch.linalg.vector_norm(b).clamp(min=floor)
    assert torch.linalg.vector_norm(a - b) <= rtol * scale


@FEW
@given(st.integers(0, 40), st.integers(1, 40), VIEWS, VIEWS)
def test_lambda_return(batch, time, one, other):
    reward, value, discount, trace = torch.rand(4, batch, time)
    agree("lambda_return", (view(reward, one), view(value, other), discount, view(trace, one)),
          (0, 1, 2))  # fmt: skip


@FEW
@given(LEAD, st.integers(2, 70), VIEWS)
def test_twohot(lead, bins, how):
    line = ops.symlog_bins(bins)
    logits, target = view(torch.randn(*lead, bins), how), view(9 * torch.randn(lead), how)
    agree("twohot_loss", (logits, target, line), (0,))
    agree("twohot_mean", (logits, line), (0,))


@FEW
@given(LEAD, st.integers(0, 40), st.integers(1, 20), st.sampled_from(["joint", "factored"]), VIEWS)
def test_gmm_nll(lead, latents, components, layout, how):
    sizes = (components, latents) if layout == "joint" else (latents, components)
    mean, log_std = (view(torch.randn(*lead, *sizes), how) for _ in range(2))
    logits = view(torch.randn(*lead, *sizes[: 1 if layout == "joint" else 2]), how)
    agree("gmm_nll", (torch.randn(*lead, latents), mean, log_std, logits, layout), (1, 2, 3))


@FEW
@given(LEAD, st.integers(0, 6), st.integers(1, 70), st.sampled_from([0.0, 0.01, 1.0]), VIEWS)
def test_latent(lead, groups, classes, unimix, how):
    post, prior = (view(2 * torch.randn(*lead, groups, classes), how) for _ in range(2))
    agree("kl_balance", (post, prior, unimix, 0.3), (0, 1))
    index = torch.randint(classes, (*lead, groups))
    agree("straight_through", (index, post, unimix), (1,))
    noise = view(torch.rand(*lead, groups), how)
    chosen, log_probs = ops.latent_sample(post, noise, unimix)
    assert chosen.shape == (*lead, groups) and (chosen.long() < classes).all()
    near(log_probs, ops.latent_sample_ref(post.double(), noise, unimix)[1], 1e-5)


@FEW
@given(LEAD, st.integers(1, 70), VIEWS)
def test_rms_silu(lead, units, how):
    # One unit is normalised to its sign: its gradient cancels, and 1 / |x| makes that large.
    args = view(torch.randn(*lead, units), how), torch.rand(units) + 0.5
    agree("rms_silu", args, (0, 1), floor=0.1 if units == 1 else 1e-2)


@FEW
@given(st.integers(0, 5), st.integers(1, 20), st.integers(1, 18), st.integers(1, 9),
       st.integers(1, 9), VIEWS)  # fmt: skip
def test_upsample_conv2d(batch, inputs, outputs, height, width, how):
    x = view(torch.randn(batch, inputs, height, width), how)
    weight = view(torch.randn(outputs, inputs, 5, 5), how)
    agree("upsample_conv2d", (x, weight, torch.randn(outputs)), (0, 1, 2))
    args = x, weight / (5 * inputs**0.5), torch.randn(outputs), torch.rand(outputs) + 0.5
    # One channel is normalised to its sign: see test_rms_silu.
    agree("upsample_conv2d_silu", args, (0, 1, 2, 3), floor=0.1 if outputs == 1 else 1e-2)


@FEW
@given(st.integers(0, 9), st.integers(1, 5), st.integers(2, 17), st.integers(2, 21),
       st.integers(2, 35), st.sampled_from([3, 5, 5]), VIEWS)  # fmt: skip
def test_conv_pool_silu(batch, inputs, outputs, height, width, kernel, how):
    x = view(torch.randn(batch, inputs, height, width), how)
    weight = view(torch.randn(outputs, inputs, kernel, kernel), how)
    rest = (weight, torch.randn(outputs), torch.rand(outputs) + 0.5)
    agree("conv_pool_silu", (x, *rest), (0, 1, 2, 3))
    x = view(torch.randint(256, (batch, inputs, height, width), dtype=torch.uint8), how)
    agree("conv_pool_silu", (x, *rest), (1, 2, 3))


@FEW
@given(st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), max_size=4),
       st.sampled_from(["laprop_agc_", "adam_", "ema_"]), VIEWS)  # fmt: skip
def test_optim(shapes, name, how):
    lists = [[torch.rand(shape) + 0.1 for shape in shapes] for _ in range(4)]
    lists[1] = [view(g, how) for g in lists[1]]
    twins = [[x.clone() for x in group] for group in lists]
    reference = getattr(ops, f"{name[:-1]}_ref_")
    if name == "ema_":
        getattr(ops, name)(*lists[:2], 0.1)
        reference(*twins[:2], 0.1)
    else:
        getattr(ops, name)(*lists, torch.tensor(3), torch.tensor(0.1))
        reference(*twins, torch.tensor(3), torch.tensor(0.1))
    for ours, theirs in zip(lists, twins, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            near(a, b, 1e-5)


@FEW
@given(st.integers(0, 9), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), VIEWS)
def test_gru_steps(batch, blocks, part, units, how):
    deter = blocks * part
    weights = make_weights(deter=deter, hidden=units, blocks=blocks)
    args = (view(torch.randn(batch, deter), how), view(torch.randn(batch, 12), how),
            torch.randn(batch, 2))  # fmt: skip
    near(ops.gru_step(weights, *args), ops.gru_step_ref(weights, *args), 1e-5)


@FEW
@given(st.integers(0, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 9),
       st.integers(1, 4), st.integers(2, 5), VIEWS)  # fmt: skip
def test_rssm_observe(batch, time, blocks, units, groups, classes, how):
    weights = make_weights(deter=4 * blocks, hidden=units, groups=groups, classes=classes,
                           blocks=blocks)  # fmt: skip
    stoch = torch.eye(classes)[torch.randint(classes, (batch, groups))]
    tokens, action = torch.randn(batch, time, 5), torch.randn(batch, time, 2)
    is_first, noise = torch.rand(batch, time) < 0.3, torch.rand(batch, time, groups)
    args = (weights, torch.randn(batch, 4 * blocks), stoch, view(tokens, how), view(action, how),
            is_first, view(noise, how), 0.01)  # fmt: skip
    for a, b in zip(ops.rssm_observe(*args), ops.rssm_observe_ref(*args), strict=True):
        near(a, b, 2e-5)
