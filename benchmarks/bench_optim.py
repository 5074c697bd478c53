"""The optimizer on 12 million parameters in 95 tensors, against the loop over parameters."""

import pytest
import torch
from conftest import report

from fastwm import ops

# 95 tensors: most are biases and scales, few hold nearly all parameters.
SHAPES = [(2048, 768)] * 6 + [(512, 1024)] * 4 + [(256, 512)] * 5 + [(256,)] * 80


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_laprop_agc(benchmark, backend):
    benchmark.group = "laprop_agc_ 12M parameters, 95 tensors"
    params, grads, mu, nu = ([torch.rand(shape) for shape in SHAPES] for _ in range(4))
    step, lr = torch.tensor(4), torch.tensor(1e-4)
    with ops.use_backend(backend):
        benchmark(lambda: ops.laprop_agc_(params, grads, mu, nu, step, lr))
    report(benchmark, 36 * sum(p.numel() for p in params), device="cpu")


@pytest.mark.parametrize("backend", ["reference", "torch", "fused"])
def test_adam(benchmark, backend):
    benchmark.group = "adam_ 12M parameters, 95 tensors, clipped by norm"
    params, grads, mu, nu = ([torch.rand(shape) for shape in SHAPES] for _ in range(4))
    step, lr = torch.tensor(4), torch.tensor(1e-4)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    other = torch.optim.AdamW(params, lr=1e-4)

    def by_torch():
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        other.step()

    def ours():
        ops.adam_(params, grads, mu, nu, step, lr, weight_decay=0.01, clip_norm=1.0)

    with ops.use_backend("reference" if backend == "reference" else "fused"):
        benchmark(by_torch if backend == "torch" else ours)
    report(benchmark, 32 * sum(p.numel() for p in params), device="cpu")


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_ema(benchmark, backend):
    benchmark.group = "ema_ 12M parameters, 95 tensors"
    slow, fast = ([torch.rand(shape) for shape in SHAPES] for _ in range(2))
    with ops.use_backend(backend):
        benchmark(lambda: ops.ema_(slow, fast, 0.02))
    report(benchmark, 12 * sum(p.numel() for p in slow), device="cpu")
