"""The CUDA path of the RSSM, executed on the CPU: binding, products, kernels (tests/emulate.py).

Both loops, the library's products with kernels between them and the phase kernels.
"""

import shutil

import emulate
import pytest
import test_rssm_raw
import torch
from test_rssm import (  # noqa: F401 - the tests run once more, on the path of CUDA tensors
    CASES,
    STATES,
    all_gradients,
    away_from_edges,
    double,
    make_inputs,
    make_weights,
    test_an_episode_never_reaches_the_next,
    test_imagine_matches_reference,
    test_observe_matches_reference,
    test_observe_of_nothing,
    test_sequence_equals_single_steps,
    test_step_and_prior_match_reference,
    test_two_runs_are_bit_equal,
)

from fastwm.ops import _rssm_fused as fused
from fastwm.ops import _rssm_rollout as rollout
from fastwm.ops import _rssm_sequence as sequence
from fastwm.ops import rssm as R

SIZES = CASES | {
    "wide-row": {"B": 2, "T": 2, "D": 300, "U": 260, "S": 3, "K": 33, "G": 3, "E": 5},
    "many-classes": {"B": 2, "T": 2, "K": 300, "S": 2},
    "rows": {"B": 33, "T": 2},
}


def raw_inputs(case, noise=True):
    """Arguments of the two loops in float64, away from where rounding flips a draw."""
    sizes = SIZES[case]
    weights, inputs = make_weights(**sizes), make_inputs(**sizes)
    inputs = away_from_edges(weights, inputs)
    wide, args = double(weights, inputs)
    args = {k: x.detach() for k, x in args.items()}
    flat = sequence.unflatten([x.detach() for x in sequence.flatten(wide)], len(wide.hidden))
    block, units = flat.deter // flat.blocks, flat.units
    action, _ = sequence.bounded(args["prev_action"], args["is_first"])
    branch = sequence.activate(
        torch.nn.functional.linear(action, *flat.action_in[:2]), flat.action_in[2]
    )
    action_part = branch @ flat.rows(block + 2 * units, block + 3 * units) + flat.hidden[0][1]
    token = torch.nn.functional.linear(
        args["tokens"], flat.post[0][0][:, flat.deter :], flat.post[0][1]
    )
    start = (args["deter"], args["stoch"])
    return flat, start, action_part, token, args["is_first"], args["noise"] if noise else None


def low(x):
    return None if x is None else x.float() if x.is_floating_point() else x


def scan_arguments(case, noise=True):
    """What the forward loop gives in float64, arguments of the raw op, and what backward needs."""
    weights, (deter, stoch), action, token, first, draws = raw_inputs(case, noise)
    groups = stoch.shape[1]
    want = sequence.scan(
        weights, deter, stoch.flatten(1), action, token, first, draws, 0.01, groups
    )
    flat = [low(x) for x in sequence.flatten(weights)]
    args = [flat, len(weights.hidden), *map(low, (deter, stoch, action, token, first, draws)), 0.01]
    return want, args, (weights, flat, want, deter, first, groups)


def in_order(scan):
    return [*scan[:4], scan.gates, *scan.hidden, *scan.post]


@pytest.fixture(params=["gemm", "phase"])
def raw(request, monkeypatch):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler (c++)")
    monkeypatch.setenv("FASTWM_RSSM", request.param)
    return emulate.load()


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("noise", [True, False], ids=["sample", "mode"])
def test_scan(case, noise, raw, near):
    want, args, _ = scan_arguments(case, noise)
    actual = raw.rssm_scan(*args, True, False)
    assert torch.equal(actual[2].long(), want.index.long())
    for i, (got, expected) in enumerate(zip(actual, in_order(want), strict=True)):
        near(got, expected, rtol=1e-5, who=str(i))
    for got, other in zip(raw.rssm_scan(*args, False, False), actual[:3], strict=True):
        assert torch.equal(got, other)


def backward_arguments(setup):
    weights, flat, want, deter, first, groups = setup
    grads = [torch.randn(x.shape).double() for x in (want.deter, want.logits, want.logits)]
    loop = sequence.scan_backward(weights, want, deter, first, 0.01, groups, grads)
    saved = list(map(low, in_order(want)))
    by_group = [low(x).unflatten(-1, (groups, -1)) for x in grads[1:]]
    args = [flat, len(weights.hidden), saved, low(deter), first, 0.01, low(grads[0]), *by_group]
    return loop, args


@pytest.mark.parametrize("case", SIZES)
def test_scan_backward(case, raw, near):
    setup = scan_arguments(case)[2]
    want, args = backward_arguments(setup)
    carry, logits, inner, gates, act_inner, *rest = raw.rssm_scan_backward(*args, False)
    weights, first = setup[0], setup[4]
    count = len(weights.hidden) + len(weights.post)
    into = inner[:, 0].masked_fill(first[:, :1], 0.0).double()
    near(carry + into[:, : weights.units] @ weights.deter_in[0], want.deter, 1e-4, "carry")
    near(into[:, weights.units :] @ weights.stoch_in[0], want.stoch, 1e-4, "stoch")
    layers = [*want.hidden, *want.post], [*want.act_hidden, *want.act_post]
    pairs = [x for pair in zip(*layers, strict=True) for x in pair]
    expected = [want.logits, want.inner, want.gates, want.act_inner, *pairs, *want.scales]
    actual = [logits, inner, gates, act_inner, *rest[: 2 * count]]
    actual += [x.sum(0) for x in rest[2 * count :]]
    for i, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        near(got, wanted, rtol=1e-4, who=str(i))


@pytest.mark.parametrize("case", ["odd", "layers", "wide"])
def test_low_products(case, raw, near):
    """Operands in bfloat16: what a step computes from one state, and all of the backward loop."""
    want, args, setup = scan_arguments(case)
    first_step = [x[:, :1] if i > 3 and isinstance(x, torch.Tensor) else x
                  for i, x in enumerate(args)]  # fmt: skip
    actual = raw.rssm_scan(*first_step, True, True)
    for i in (0, 1, 3, 4, 5):
        near(actual[i], in_order(want)[i][:, :1], rtol=3e-2, who=str(i))
    assert not torch.equal(actual[1], raw.rssm_scan(*first_step, True, False)[1])
    _, back = backward_arguments(setup)
    exact = raw.rssm_scan_backward(*back, False)
    for i, (got, expected) in enumerate(
        zip(raw.rssm_scan_backward(*back, True), exact, strict=True)
    ):
        near(got, expected, rtol=5e-2, who=str(i))


def test_low_rollout(raw, near):
    weights, inputs = make_weights(**CASES["wide"]), make_inputs(**CASES["wide"])
    flat = [
        x.detach()
        for x in sequence.flatten(
            weights._replace(post=weights.prior, post_logit=weights.prior_logit)
        )
    ]
    results = []
    for narrow in (False, True):
        deters, stochs = torch.zeros(19, 2, 96), torch.zeros(19, 2, 5, 16)
        deters[:, 0], stochs[:, 0] = inputs["deter"].detach(), inputs["stoch"].detach()
        packed = raw.rssm_pack(flat, 1, 5, narrow)
        assert packed.dtype == (torch.bfloat16 if narrow else torch.float32)
        raw.rssm_step_(packed, flat, 1, deters, stochs, inputs["prev_action"].detach()[:, 0],
                       None, inputs["noise"][:, 0], 0, 0.01)  # fmt: skip
        assert torch.equal(stochs.sum(-1), torch.ones(19, 2, 5))
        results.append((deters, stochs))
    near(results[1][0], results[0][0], rtol=2e-2)
    assert (results[1][1] == results[0][1]).all(-1).float().mean() > 0.9


def test_acting_takes_the_sequence(raw, monkeypatch, near):
    """T = 1 without gradient, as CUDA tensors go."""
    monkeypatch.setattr(fused, "raw", raw)
    weights, inputs = make_weights(), make_inputs(T=1)
    inputs = away_from_edges(weights, inputs)
    with torch.no_grad():
        actual = sequence.observe(weights, **inputs, unimix=0.01, loops=fused.LOOPS)
        expected = R.rssm_observe_ref(weights, **inputs)
    for got, want in zip(actual, expected, strict=True):
        near(got, want)


@pytest.fixture
def variant(raw, monkeypatch):
    """What test_rssm.py asks of every path, asked of this one."""
    monkeypatch.setattr(fused, "raw", raw)
    monkeypatch.setattr(rollout, "raw", raw)
    for module in (fused, rollout):
        monkeypatch.setattr(module, "available", lambda *_: True)
    return "fused"


def test_low_sequence(raw, monkeypatch, near):
    """As under autocast on CUDA: every product in bfloat16, results and gradients in float32."""
    monkeypatch.setattr(fused, "raw", raw)
    weights, inputs = make_weights(), make_inputs(T=2)
    inputs["noise"] = None

    def observe(low):
        loops = fused.LOW_LOOPS if low else fused.LOOPS
        return sequence.observe(weights, **inputs, unimix=0.01, loops=loops, low=low)

    cotangents = [torch.randn(x.shape) for x in observe(False)]
    leaves = [*sequence.flatten(weights), *(inputs[k] for k in STATES)]
    grads = []
    for low in (False, True):
        out = observe(low)
        assert all(x.dtype == torch.float32 for x in out)
        loss = sum((x * c).sum() for x, c in zip(out, cotangents, strict=True))
        grads.append(torch.autograd.grad(loss, leaves))
    exact, rounded = (torch.cat([x.flatten() for x in g]) for g in grads)
    near(rounded, exact, rtol=6e-2)
    assert not torch.equal(exact, rounded)


def test_bindings_refuse_forged_input(raw, monkeypatch):
    monkeypatch.setattr(test_rssm_raw, "raw", raw)
    test_rssm_raw.test_raw_ops_refuse_forged_input()
    test_rssm_raw.test_step_refuses_forged_input()


def test_unknown_loop(raw, monkeypatch):
    args = scan_arguments("odd")[1]
    monkeypatch.setenv("FASTWM_RSSM", "phases")
    with pytest.raises(RuntimeError, match="FASTWM_RSSM: expected gemm or phase, got phases"):
        raw.rssm_scan(*args, True, False)


def to_gpu(weights, inputs):
    def moved(x):
        if isinstance(x, torch.Tensor):
            return x.detach().cuda().requires_grad_(x.requires_grad)
        return tuple(map(moved, x))

    return R.RSSMWeights(*map(moved, weights)), {k: moved(x) for k, x in inputs.items()}


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loop", ["gemm", "phase"])
def test_gpu_matches_reference(case, loop, monkeypatch, near):
    monkeypatch.setenv("FASTWM_RSSM", loop)
    weights, inputs = make_weights(**CASES[case]), make_inputs(**CASES[case])
    inputs = away_from_edges(weights, inputs)
    wide, args = double(weights, inputs)
    cotangents = [torch.randn(x.shape) for x in R.rssm_observe_ref(wide, **args)]
    expected, wanted = all_gradients(R.rssm_observe_ref, wide, args, cotangents)
    moved = to_gpu(weights, inputs)
    runs = [all_gradients(R.rssm_observe, *moved, [c.cuda() for c in cotangents]) for _ in range(2)]
    for got, again, want in zip(runs[0][0], runs[1][0], expected, strict=True):
        assert torch.equal(got, again)
        near(got.cpu(), want, rtol=1e-4)
    for name, want in wanted.items():
        assert torch.equal(runs[0][1][name], runs[1][1][name])
        near(runs[0][1][name].cpu(), want, rtol=1e-3, who=name)


@pytest.mark.cuda
@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("loop", ["gemm", "phase"])
def test_gpu_capture(loop, low, monkeypatch):
    """Forward and backward in one graph, replayed on new inputs, equal the eager calls."""
    monkeypatch.setenv("FASTWM_RSSM", loop)
    weights, inputs = to_gpu(make_weights(**CASES["wide"]), make_inputs(**CASES["wide"]))
    leaves = [*sequence.flatten(weights), *(inputs[k] for k in STATES)]

    def call():
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            out = R.rssm_observe(weights, **inputs)
        return [*out, *torch.autograd.grad(sum(x.square().sum() for x in out), leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = call()
    for _ in range(2):
        with torch.no_grad():
            inputs["tokens"].normal_()
            inputs["noise"].uniform_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(static, call(), strict=True))
