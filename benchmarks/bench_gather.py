"""Windows out of replay rings on the device: the fused op against one index_select per key."""

import pytest
import torch
from conftest import DEVICE, report

from fastwm import ops

ENVS, LENGTH, BATCH, ROWS = 16, 2000, 16, 64
KEYS = {
    "images": [((64, 64, 3), torch.uint8)],
    "images+latents12m": [
        ((64, 64, 3), torch.uint8), ((2048,), torch.bfloat16), ((32,), torch.uint8),
    ],
    "vectors": [((24,), torch.float32)],
}  # fmt: skip
COMMON = [((6,), torch.float32), ((), torch.float32), *[((), torch.bool)] * 3]


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("kind", KEYS)
def test_gather_windows(benchmark, kind, backend):
    benchmark.group = f"gather_windows {kind} B{BATCH} T{ROWS}"
    keys = KEYS[kind] + COMMON
    rings = [torch.zeros(ENVS, LENGTH, *shape, dtype=dtype, device=DEVICE) for shape, dtype in keys]
    rows = [1 if dtype == torch.bfloat16 or shape == (32,) else ROWS for shape, dtype in keys]
    ids = torch.stack([torch.arange(BATCH) % ENVS, torch.randint(1, LENGTH, (BATCH,))], -1)
    ids = ids.to(DEVICE)
    out = ops.gather_windows_ref(rings, ids, [0] * len(rings), rows)
    with ops.use_backend(backend):
        benchmark(lambda: ops.gather_windows(rings, ids, [0] * len(rings), rows))
    report(benchmark, 2 * sum(x.nbytes for x in out))
