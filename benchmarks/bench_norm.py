"""RMSNorm and SiLU at the widths of the sizes, for a batch of 16 x 64."""

import pytest
import torch

from fastwm import ops


@pytest.mark.parametrize("rows, width", [(1024, 64), (1024, 256), (1024, 2048), (16384, 256)])
def test_rms_silu(time_op, rows, width):
    x, scale, array = torch.randn(rows, width), torch.rand(width), 4 * rows * width
    time_op(f"rms_silu N{rows} U{width}", ops.rms_silu, ops.rms_silu_ref, (x, scale), [x, scale],
            (2 * array, 3 * array))  # fmt: skip
