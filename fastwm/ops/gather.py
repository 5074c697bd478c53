"""Windows of consecutive rows out of ring buffers: what sampling from a replay on a device is.

Letters: N envs, L rows per ring, B windows. Kernels: csrc/cpu/gather.cpp, csrc/cuda/gather.cu.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastwm.ops._backend import available, raw, register_fake
from fastwm.ops._check import check_dtype, check_same_device, check_shape

__all__ = ["gather_windows", "gather_windows_ref"]

_KINDS = {None: 0, torch.float32: 1, torch.bfloat16: 2}
Types = Sequence[torch.dtype | None]


def gather_windows_ref(
    rings: Sequence[Tensor],  # (N, L, …) each
    ids: Tensor,  # (B, 2)
    offsets: Sequence[int],
    rows: Sequence[int],
    dtypes: Types | None = None,
) -> list[Tensor]:  # (B, rows, …) each
    """`gather_windows` in plain PyTorch."""
    result, length = [], rings[0].shape[1]
    for ring, offset, count, dtype in zip(
        rings, offsets, rows, dtypes or [None] * len(rings), strict=True
    ):
        slots = (ids[:, 1:] + offset + torch.arange(count, device=ids.device)) % length
        index = (ids[:, :1] * length + slots).flatten()
        window = ring.flatten(0, 1).index_select(0, index).unflatten(0, slots.shape)
        result.append(window if dtype is None else (window.float() / 255).to(dtype))
    return result


def gather_windows(
    rings: Sequence[Tensor],  # (N, L, …) each
    ids: Tensor,  # (B, 2) int64
    offsets: Sequence[int],
    rows: Sequence[int],
    dtypes: Types | None = None,
) -> list[Tensor]:  # (B, rows, …) each
    """out[k][b, t] = rings[k][env, (row + offsets[k] + t) % L] for ids[b] = (env, row).

    All rings in one launch. An offset of -1 hands out the row before: the action that led to it.

    Args:
        rings: contiguous tensors (N, L, …) of any types, one per stored key.
        ids: (B, 2) int64 on their device: env in [0, N), and a row number, which may grow for ever.
        offsets: of each ring, added to the row. rows: of each ring, how many, in [1, L].
        dtypes: of each ring, None as it is stored; float32 or bfloat16 for bytes / 255. None for
            all as they are stored.
    Returns: (B, rows, …) per ring, without gradient.
    Raises: ValueError on shapes and numbers, TypeError on dtypes or devices; on the CPU an error
        for an env outside of [0, N). On CUDA the nearest env is read: to look would be to wait.
    Equivalent to:
        slots = (ids[:, 1:] + offset + torch.arange(rows)) % L
        out = ring[ids[:, :1], slots]
    Numerics: bytes / 255 is rounded once to float32, and once more to bfloat16.
    """
    dtypes = list(dtypes) if dtypes is not None else [None] * len(rings)
    _check(rings, ids, offsets, rows, dtypes)
    if not available(ids, "gather_windows"):
        return gather_windows_ref([ring.detach() for ring in rings], ids, offsets, rows, dtypes)
    kinds = [_KINDS[dtype] for dtype in dtypes]
    return raw.gather_windows(
        [ring.detach() for ring in rings], ids, list(offsets), list(rows), kinds
    )


def _check(
    rings: Sequence[Tensor], ids: Tensor, offsets: Sequence[int], rows: Sequence[int], dtypes: Types
) -> None:
    op = "gather_windows"
    if not len(rings) == len(offsets) == len(rows) == len(dtypes) > 0:
        raise ValueError(
            f"{op}: expected one entry of offsets, rows and dtypes for each of {len(rings)} rings, "
            f"and a ring, got {len(offsets)}, {len(rows)} and {len(dtypes)}"
        )
    check_shape(op, "ids", ids, "(B, 2)", (*ids.shape[:1], 2))
    check_dtype(op, "ids", ids, torch.int64)
    lead = tuple(rings[0].shape[:2])
    for i, (ring, count, dtype) in enumerate(zip(rings, rows, dtypes, strict=True)):
        name = f"rings[{i}]"
        if ring.dim() < 2 or tuple(ring.shape[:2]) != lead:
            raise ValueError(
                f"{op}: expected {name} of shape (N, L, ...) = ({lead}, ...), got "
                f"{tuple(ring.shape)}"
            )
        if not ring.is_contiguous():
            raise ValueError(f"{op}: expected {name} contiguous, got strides {ring.stride()}")
        check_same_device(op, ids=ids, **{name: ring})
        if not 1 <= count <= lead[1]:
            raise ValueError(f"{op}: expected rows[{i}] in [1, L = {lead[1]}], got {count}")
        if dtype not in _KINDS:
            raise TypeError(f"{op}: expected dtypes[{i}] None, float32 or bfloat16, got {dtype}")
        if dtype is not None:
            check_dtype(op, name, ring, torch.uint8)


@register_fake("gather_windows")
def _(rings, ids, offsets, rows, kinds):
    types = {kind: dtype for dtype, kind in _KINDS.items()}
    return [
        ring.new_empty((ids.shape[0], count, *ring.shape[2:]), dtype=types[kind] or ring.dtype)
        for ring, count, kind in zip(rings, rows, kinds, strict=True)
    ]
