"""Products of a layer on a CPU: the library's, oneDNN with and without packing, our packed panels.

Rows, inputs, outputs are those of size1m and size12m: a step of 16 rows, a rollout's group of 64, a
batch of 1024. What `fastwm/ops/_products.py` decides between is the first two; the loops of a
sequence and of a rollout are made of the last.
"""

import pytest
import torch
from conftest import report

from fastwm import ops
from fastwm.ops import _products

LAYERS = {"size1m": [(512, 64), (64, 192)], "size12m": [(2048, 256), (256, 768), (1024, 256)]}
SHAPES = [(rows, *layer) for layers in LAYERS.values() for layer in layers
          for rows in (16, 64, 1024)]  # fmt: skip


def make(backend, x, weight):
    if backend == "reference":
        return lambda: x @ weight.t()
    if backend == "fused":
        packed = ops.packed_mlp([weight, torch.zeros(len(weight))])
        return None if packed is None else lambda: packed(x)
    if not _products.has_onednn():
        return None
    if backend == "onednn":
        return lambda: _products.by_onednn(x, weight.t())
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("backend", ["reference", "onednn", "onednn packed", "fused"])
def test_product(benchmark, backend, shape):
    rows, inputs, outputs = shape
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    call = make(backend, x, weight)
    if call is None:
        pytest.skip("not in this PyTorch or not built")
    benchmark.group = f"product {rows} x {inputs} x {outputs}"
    torch.testing.assert_close(call(), x @ weight.t(), rtol=1e-3, atol=1e-3)
    benchmark(call)
    report(benchmark, 4 * (x.numel() + weight.numel() + rows * outputs), 2 * rows * weight.numel())
