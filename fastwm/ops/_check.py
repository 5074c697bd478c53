"""Argument checks with the house's four facts: who, what was expected, what came, what to do.

lambda_return: expected value of shape (B, T) = (16, 15), got (16, 14)
"""

from __future__ import annotations

from torch import Tensor, dtype


def check_shape(op: str, name: str, tensor: Tensor, letters: str, sizes: tuple[int, ...]) -> None:
    """Raise ValueError unless the shape is `sizes`; `letters` names them, as in "(B, T)"."""
    if tuple(tensor.shape) != tuple(sizes):
        raise ValueError(
            f"{op}: expected {name} of shape {letters} = {tuple(sizes)}, got {tuple(tensor.shape)}"
        )


def check_dim(op: str, name: str, tensor: Tensor, letters: str, dims: int) -> None:
    """Raise ValueError unless the tensor has `dims` dimensions."""
    if tensor.dim() != dims:
        raise ValueError(
            f"{op}: expected {name} of shape {letters} with {dims} dimensions, "
            f"got {tuple(tensor.shape)}"
        )


def check_dtype(op: str, name: str, tensor: Tensor, *allowed: dtype) -> None:
    """Raise TypeError unless the dtype is among `allowed`; without any: unless it is floating."""
    if tensor.dtype in allowed or (not allowed and tensor.is_floating_point()):
        return
    wanted = " or ".join(str(d).removeprefix("torch.") for d in allowed) or "a floating type"
    raise TypeError(
        f"{op}: expected {name} of dtype {wanted}, got {str(tensor.dtype).removeprefix('torch.')}"
    )


def check_same_device(op: str, **tensors: Tensor) -> None:
    """Raise TypeError unless all tensors share a device."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != reference.device:
            raise TypeError(
                f"{op}: expected {name} on {reference.device} like {first}, got {tensor.device}; "
                f"move it with .to({first}.device)"
            )
