"""The image decoder at the widths of size1m and size12m: stages, and the last convolution.

`reference` is the pair said literally, upsampling and a 5x5 convolution; in groups named so it is
the library's 3x3 convolution to four phases and a shuffle, which runs where ours does not.
"""

import functools

import pytest
import torch

from fastwm import assemble, ops

# images, channels in and out, side of the input
LAYERS = [(512, 16, 12, 8), (512, 12, 8, 16), (512, 8, 3, 32),
          (128, 64, 64, 4), (128, 48, 32, 16), (128, 32, 3, 32)]  # fmt: skip


def by_phases(op, *args):
    with ops.use_backend("reference"):
        return op(*args)


@pytest.mark.parametrize("images, inputs, outputs, side", LAYERS)
@pytest.mark.parametrize("against", ["upsampling", "phases"])
def test_upsample_conv2d(time_op, variant, images, inputs, outputs, side, against):
    if variant == "compiled":
        pytest.skip("the reference is one library call: there is nothing to fuse")
    x = torch.randn(images, inputs, side, side).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, inputs, 5, 5) / (5 * inputs**0.5), torch.randn(outputs)
    assemble.keep_freed_memory()  # as training does: no variant is timed with new pages
    leaves, name = [x, weight, bias], "upsample_conv2d"
    if outputs > 3:
        leaves, name = [*leaves, torch.rand(outputs) + 0.5], "upsample_conv2d_silu"
    op, reference = getattr(ops, name), getattr(ops, f"{name}_ref")
    if against == "phases":
        reference = functools.partial(by_phases, op)
    moved = 4 * images * side * side * (inputs + 4 * outputs)
    multiplied = 2 * 14 * images * side * side * inputs * outputs
    time_op(f"{name} N{images} {inputs} to {outputs} at {side}, {against}", op, reference,
            leaves, leaves, (moved, 2 * moved), multiplied)  # fmt: skip
