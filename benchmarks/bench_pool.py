"""Stages of the image encoder, convolution to activation, at the widths of size1m and size12m.

`reference` is the stage said literally; in groups named so it is the library's convolution and our
`pool_silu`, which run where our convolution does not. First stages read bytes.
"""

import pytest
import torch
import torch.nn.functional as F

from fastwm import ops

# images, channels in and out, side of the input; what a convolution leaves stays below 32 MB, so
# that the C library keeps freed memory and no variant is timed with new pages
STAGES = [(128, 3, 8, 64), (256, 8, 12, 32), (512, 12, 16, 16), (512, 16, 16, 8),
          (32, 3, 32, 64), (64, 32, 48, 32), (128, 48, 64, 16)]  # fmt: skip


def by_library(x, weight, bias, scale):
    if x.dtype == torch.uint8:
        x = x.float().div_(255.0).sub_(0.5)
    return ops.pool_silu(F.conv2d(x, weight, padding=2), bias, scale)


@pytest.mark.parametrize("images, inputs, outputs, side", STAGES)
@pytest.mark.parametrize("against", ["plain", "library"])
def test_conv_pool_silu(time_op, variant, images, inputs, outputs, side, against):
    if variant == "compiled":
        pytest.skip("minutes of compiling for what follows a convolution")
    x = torch.randint(256, (images, side, side, inputs), dtype=torch.uint8).permute(0, 3, 1, 2)
    x = x if inputs == 3 else x.float() / 255 - 0.5
    weight, bias = torch.randn(outputs, inputs, 5, 5) / 9, torch.randn(outputs)
    scale = torch.rand(outputs) + 0.5
    wrt = [weight, bias, scale] + ([x] if inputs > 3 else [])  # images need no gradient
    read, result = x.element_size() * x.numel(), outputs * images * side * side // 4
    kept = 9 * result  # two float32 and where they come from
    time_op(f"conv_pool_silu N{images} {inputs} to {outputs} at {side}, {against}",
            ops.conv_pool_silu, ops.conv_pool_silu_ref if against == "plain" else by_library,
            (x, weight, bias, scale), wrt, (read + kept, 2 * read + kept + 4 * result))  # fmt: skip
