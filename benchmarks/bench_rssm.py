"""RSSM: the posterior sequence and the rollout, fused against the plain PyTorch loop, in one run.

`compiled` is torch.compile of one step of the reference, called T times: a minute or two a size.
The whole loop unrolled compiles for half an hour at T = 64 and is what nobody waits for.
FASTWM_BENCH_COMPILE=0 leaves it out. GFLOP/s count what the loop and the hoisted products must
compute: forward 69 U^2 multiplications a row at these sizes, backward twice that.
"""

import os

import pytest
import torch
from conftest import report

from fastwm import ops
from fastwm.ops._products import multiplies_low
from fastwm.ops.rssm import RSSMWeights

# D, U, K, E of the published sizes; S = 32, G = 8, A = 6.
SIZES = {"size1m": (512, 64, 4, 64), "size12m": (2048, 256, 16, 1024)}
BACKENDS = ["reference", "fused"]


def make_weights(deter, units, classes, embed, actions=6, groups=32, blocks=8):
    def leaf(*shape):
        return (torch.randn(*shape) / shape[-1] ** 0.5).requires_grad_()

    def vector(width, value):
        return torch.full((width,), value).requires_grad_()

    def layer(out, into):
        return leaf(out, into), vector(out, 0.0), vector(out, 1.0)

    block, stoch = deter // blocks, groups * classes
    hidden = (leaf(blocks, block + 3 * units, block), vector(deter, 0.0), vector(deter, 1.0))
    return RSSMWeights(
        layer(units, deter), layer(units, stoch), layer(units, actions), (hidden,),
        (leaf(blocks, block, 3 * block), vector(3 * deter, 0.0)),
        (layer(units, deter + embed),), layer(stoch, units)[:2],
        (layer(units, deter), layer(units, units)), layer(stoch, units)[:2],
    )  # fmt: skip


def leaves_of(weights):
    layers = [*weights[:3], *weights.hidden, weights.gru, *weights.post, weights.post_logit]
    return [x for layer in layers for x in layer]


def make_inputs(size, batch, time, groups=32, actions=6):
    deter, _, classes, embed = SIZES[size]
    index = torch.randint(classes, (batch, groups))
    return {
        "deter": torch.randn(batch, deter),
        "stoch": torch.nn.functional.one_hot(index, classes).float(),
        "tokens": torch.randn(batch, time, embed).requires_grad_(),
        "prev_action": torch.rand(batch, time, actions) * 2 - 1,
        "is_first": torch.rand(batch, time) < 0.02,
        "noise": torch.rand(batch, time, groups),
    }


def observe_call(function, weights, inputs, train):
    leaves = [*leaves_of(weights), inputs["tokens"]]

    def call():
        with torch.set_grad_enabled(train):
            out = function(weights, **inputs)
        if train:
            torch.autograd.grad(sum(x.square().sum() for x in out), leaves)

    return call


def compiled_steps():
    """`rssm_observe_ref` as a loop over its compiled step."""
    torch._dynamo.reset()
    step = torch.compile(ops.rssm_observe_ref, fullgraph=True, dynamic=False)

    def call(weights, deter, stoch, tokens, prev_action, is_first, noise):
        rows = []
        for t in range(is_first.shape[1]):
            now = slice(t, t + 1)
            inputs = tokens[:, now], prev_action[:, now], is_first[:, now], noise[:, now]
            rows.append(step(weights, deter, stoch, *inputs))
            deter, stoch = rows[-1][0][:, 0], rows[-1][2][:, 0]
        return tuple(torch.cat(parts, 1) for parts in zip(*rows, strict=True))

    return call


def run(benchmark, call, flops, moved, rounds=8, **where):
    """moved: tensors that must be read or written at least once."""
    call()
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
    where = {"device": "cpu"} | where
    report(benchmark, 4 * sum(x.numel() for x in moved), flops, **where)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", ["reference", "compiled", "fused"])
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_observe(benchmark, size, backend, mode, batch=16, time=64):
    if backend == "compiled" and os.environ.get("FASTWM_BENCH_COMPILE") == "0":
        pytest.skip("FASTWM_BENCH_COMPILE=0")
    benchmark.group = f"rssm_observe {mode} {size} B{batch} T{time}"
    train = mode != "forward"
    weights, inputs = make_weights(*SIZES[size]), make_inputs(size, batch, time)
    function = compiled_steps() if backend == "compiled" else ops.rssm_observe
    call = observe_call(function, weights, inputs, train)
    flops = 2 * 69 * SIZES[size][1] ** 2 * batch * time * (3 if train else 1)
    moved = [*leaves_of(weights), *inputs.values()] * (3 if train else 1)
    with ops.use_backend("fused" if backend == "fused" else "reference"):
        run(benchmark, call, flops, moved)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", [*BACKENDS, "fused bf16"])
def test_imagine(benchmark, size, backend, count=1024, length=15):
    if backend.endswith("bf16") and not multiplies_low():
        pytest.skip("this CPU does not multiply bfloat16")
    benchmark.group = f"rssm_imagine {size} N{count} I{length}"
    weights, inputs = make_weights(*SIZES[size]), make_inputs(size, count, 1)
    noise = torch.rand(length, count, 32)
    actions = torch.rand(count, 6) * 2 - 1

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=backend.endswith("bf16")):
            ops.rssm_imagine(
                weights, inputs["deter"], inputs["stoch"], lambda d, s: actions, length, noise
            )

    with ops.use_backend(backend.split()[0]):
        moved = [*leaves_of(weights), torch.empty(length, *inputs["deter"].shape)]
        run(benchmark, call, 2 * 77 * SIZES[size][1] ** 2 * count * length, moved)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_act(benchmark, size, backend, envs=8):
    """One posterior step without gradient, as between two environment steps."""
    benchmark.group = f"rssm_observe act {size} B{envs} T1"
    weights, inputs = make_weights(*SIZES[size]), make_inputs(size, envs, 1)
    call = observe_call(ops.rssm_observe, weights, inputs, False)
    with ops.use_backend(backend):
        run(benchmark, call, 2 * 69 * SIZES[size][1] ** 2 * envs, leaves_of(weights), 100)


@pytest.mark.parametrize("batch, inputs, deter", [(16, 512, 512), (1024, 512, 512)])
def test_gru_step_layernorm(time_op, batch, inputs, deter):
    """The dense step of 2023, product included, as the posterior and the rollout see it."""
    shapes = [(batch, inputs), (batch, deter), (3 * deter, inputs + deter), (3 * deter,)]
    args = [torch.randn(s) / s[-1] ** 0.5 for s in [*shapes, shapes[-1]]]
    numbers = sum(x.numel() for x in args) + batch * deter
    time_op(f"gru_step_layernorm B{batch} D{deter}", ops.gru_step_layernorm,
            ops.gru_step_layernorm_ref, args, args, (4 * numbers, 8 * numbers))  # fmt: skip


def captured(call):
    """The call as a CUDA graph; returns what replays it and waits."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay():
        graph.replay()
        torch.cuda.synchronize()

    return replay


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("products", ["fp32", "bf16"])
@pytest.mark.parametrize("loop", ["reference", "gemm", "phase"])
def test_observe_captured(benchmark, monkeypatch, size, mode, products, loop, batch=16, time=64):
    """On a GPU, in one CUDA graph: the plain loop and both compiled ones."""
    benchmark.group = f"rssm_observe captured {mode} {size} {products} B{batch} T{time}"
    monkeypatch.setenv("FASTWM_RSSM", "gemm" if loop == "reference" else loop)
    train = mode != "forward"
    with torch.device("cuda"):
        weights, inputs = make_weights(*SIZES[size]), make_inputs(size, batch, time)
    call = observe_call(ops.rssm_observe, weights, inputs, train)

    def cast():
        with torch.autocast("cuda", torch.bfloat16, enabled=products == "bf16"):
            call()

    flops = 2 * 69 * SIZES[size][1] ** 2 * batch * time * (3 if train else 1)
    with ops.use_backend("reference" if loop == "reference" else "fused"):
        run(benchmark, captured(cast), flops, leaves_of(weights), name=loop, device="cuda")
