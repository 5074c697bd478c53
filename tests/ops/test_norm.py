"""The norm stem: reference parity, errors."""

import torch
import torch.nn.functional as F

from fastwm import ops


def test_equals_library():
    x, scale = torch.randn(3, 5, 7), torch.randn(7)
    expected = F.silu(F.rms_norm(x, (7,), scale, 1e-4))
    torch.testing.assert_close(ops.rms_silu(x, scale), expected, rtol=1e-5, atol=1e-6)
