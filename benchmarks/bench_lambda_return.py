"""Lambda-return: fused kernels against the plain PyTorch loop, in one run."""

import pytest
import torch

from fastwm import ops

SHAPES = [(16, 64), (1024, 16)]  # replay value loss, imagination


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"B{s[0]}-T{s[1]}")
@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_lambda_return(benchmark, shape, backend, mode):
    benchmark.group = f"lambda_return {mode} B{shape[0]} T{shape[1]}"
    train = mode == "forward+backward"
    args = [torch.rand(shape, requires_grad=train) for _ in range(3)] + [torch.rand(shape)]
    benchmark.extra_info["bytes"] = 4 * shape[0] * (5 * shape[1] - 1) * (2 if train else 1)

    def call():
        out = ops.lambda_return(*args)
        if train:
            out.sum().backward()

    with ops.use_backend(backend):
        call()
        benchmark(call)
