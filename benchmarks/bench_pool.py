"""Stages of the image encoder, convolution to activation, at the widths of size1m and size12m."""

import pytest
import torch

from fastwm import ops


@pytest.mark.parametrize(
    "images, channels, side, out",
    [(1024, 3, 64, 8), (1024, 8, 32, 12), (1024, 12, 16, 16), (128, 32, 32, 48)],
)
def test_conv_pool_silu(time_op, images, channels, side, out):
    x = torch.randn(images, channels, side, side).to(memory_format=torch.channels_last)
    weight, bias, scale = torch.randn(out, channels, 5, 5) / 9, torch.randn(out), torch.rand(out)
    wrt = [weight, bias, scale] + ([x] if channels > 3 else [])  # images need no gradient
    read, result = 4 * x.numel(), 4 * out * images * side * side // 4
    time_op(f"conv_pool_silu N{images} C{channels} to {out} at {side}", ops.conv_pool_silu,
            ops.conv_pool_silu_ref, (x, weight, bias, scale), wrt,
            (read + result, 2 * read + result))  # fmt: skip
