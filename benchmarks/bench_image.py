"""The reconstruction loss of a batch of images."""

import torch

from fastwm import ops


def test_image_loss(time_op):
    logits = torch.randn(1024, 64, 64, 3)
    target = torch.randint(256, logits.shape, dtype=torch.uint8)
    count = logits.numel()
    time_op("image_loss N1024 64x64x3", ops.image_loss, ops.image_loss_ref, (logits, target),
            [logits], (5 * count, 9 * count))  # fmt: skip
