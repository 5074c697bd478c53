"""The decoder's upsampling convolutions: 64 frames, size 12m, inner layers and the last one."""

import pytest
import torch

from fastwm import ops

LAYERS = {"64->64@4": (64, 64, 4), "48->32@16": (48, 32, 16), "32->3@32": (32, 3, 32)}
FRAMES = 64


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_upsample_conv2d(time_op, variant, layer, layout):
    if variant == "compiled":
        pytest.skip("the reference is one library call: there is nothing to fuse")
    inputs, outputs, size = LAYERS[layer]
    x = torch.randn(FRAMES, inputs, size, size)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, inputs, 5, 5), torch.randn(outputs)
    moved = 4 * FRAMES * size * size * (inputs + 4 * outputs)
    time_op(f"upsample_conv2d {layer} {layout}", ops.upsample_conv2d, ops.upsample_conv2d_ref,
            (x, weight, bias), [x, weight, bias], (moved, 2 * moved),
            2 * FRAMES * size * size * 36 * inputs * outputs)  # fmt: skip
