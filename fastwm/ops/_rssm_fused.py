"""The compiled pair of loops, with the interface of `fastwm.ops._rssm_sequence`.

CPU: csrc/cpu/rssm.cpp and rssm_backward.cpp, float32. CUDA: the library's products with the kernels
of csrc/cuda/rssm*.cu between them (csrc/rssm_library*.h); `LOW_LOOPS` has them read bfloat16, while
states, norms, gates and logits stay float32.
"""

import torch
from torch import Tensor

from fastwm.ops._backend import available, raw, register_fake
from fastwm.ops._rssm_sequence import Scan, ScanGrad, Weights, flatten
from fastwm.ops.latent import index_dtype


def scan(weights: Weights, deter, stoch, action_part, token_part, is_first, noise, unimix, groups,
         save=True, low=False):  # fmt: skip
    count = len(weights.hidden)
    out = raw.rssm_scan(
        flatten(weights), count, deter, stoch.unflatten(-1, (groups, -1)), action_part,
        token_part, is_first, noise, unimix, save, low,
    )  # fmt: skip
    if not save:
        return Scan(*out, None, (), None, ())
    return Scan(*out[:4], tuple(out[5 : 5 + count]), out[4], tuple(out[5 + count :]))


def scan_backward(weights: Weights, saved: Scan, deter, is_first, unimix, groups, grads, low=False):
    count = len(weights.hidden)
    kept = [*saved[:4], saved.gates, *saved.hidden, *saved.post]
    by_group = [grad.unflatten(-1, (groups, -1)) for grad in grads[1:]]
    out = raw.rssm_scan_backward(
        flatten(weights), count, kept, deter, is_first, unimix, grads[0], *by_group, low
    )
    carry, logits, inner, gates, act_inner, *rest = out
    pairs, scales = rest[: 2 * (count + len(weights.post))], rest[2 * (count + len(weights.post)) :]
    # What the first step hands back: its own input branches, unless it began with a reset.
    first = inner[:, 0].masked_fill(is_first[:, :1], 0.0)
    units = weights.units
    return ScanGrad(
        carry + first[:, :units] @ weights.deter_in[0], first[:, units:] @ weights.stoch_in[0],
        logits, inner, tuple(pairs[: 2 * count : 2]), gates, tuple(pairs[2 * count :: 2]),
        tuple(x.sum(0) for x in scales), act_inner, tuple(pairs[1 : 2 * count : 2]),
        tuple(pairs[2 * count + 1 :: 2]),
    )  # fmt: skip


def low_scan(*args, save=True):
    return scan(*args, save, low=True)


def low_scan_backward(*args):
    return scan_backward(*args, low=True)


LOOPS, LOW_LOOPS = (scan, scan_backward), (low_scan, low_scan_backward)


def wants_low(like: Tensor) -> bool:
    """Whether autocast asks for bfloat16 products where the kernels have them."""
    kind = like.device.type
    return (
        kind == "cuda"
        and torch.is_autocast_enabled(kind)
        and torch.get_autocast_dtype(kind) == torch.bfloat16
    )


def loops(like: Tensor) -> tuple | None:
    """The pair for tensors like this one, None without compiled kernels for them."""
    if like.dtype != torch.float32 or not available(like, "rssm_scan"):
        return None
    return LOW_LOOPS if wants_low(like) else LOOPS


def _sizes(weights: list[Tensor], hidden: int) -> tuple[int, int, int]:
    units, deter = weights[0].shape
    return deter, units, (len(weights) - 13 - 3 * hidden) // 3


@register_fake("rssm_scan")
def _(weights, hidden, deter, stoch, action_part, token_part, is_first, noise, unimix, save,
      low):  # fmt: skip
    size, units, post = _sizes(weights, hidden)
    groups, classes = stoch.shape[1:]
    widths = [2 * units, 3 * size, *[size] * hidden, *[units] * post] if save else []
    out = [deter.new_empty(*is_first.shape, x) for x in (size, groups * classes, *widths)]
    out.insert(2, deter.new_empty(*is_first.shape, groups, dtype=index_dtype(classes)))
    return out


@register_fake("rssm_scan_backward")
def _(weights, hidden, saved, deter, is_first, unimix, grad_deter, grad_logits, grad_stoch,
      low):  # fmt: skip
    size, units, post = _sizes(weights, hidden)
    groups, classes = grad_stoch.shape[2:]
    widths = [groups * classes, 2 * units, 3 * size, 2 * units]
    widths += [size] * (2 * hidden) + [units] * (2 * post)
    scales = [units, units, *[size] * hidden, *[units] * post]
    return [
        torch.empty_like(deter, memory_format=torch.contiguous_format),
        *(deter.new_empty(*is_first.shape, x) for x in widths),
        *(deter.new_empty(deter.shape[0], x) for x in scales),
    ]
