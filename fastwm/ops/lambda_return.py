"""Bootstrapped lambda-returns along time.

    R[t] = r[t+1] + d[t+1] ((1 - l[t+1]) v[t+1] + l[t+1] R[t+1]),     R[T-1] = v[T-1]

for t = 0 … T-2, with reward r, discount d, value v and trace l. Kernels:
csrc/cpu/lambda_return.cpp, csrc/cuda/lambda_return.cu.
Source: Hafner et al., arXiv:2301.04104, eq. 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastwm.ops._backend import available, raw, register_fake, wants_grad
from fastwm.ops._check import check_dim, check_dtype, check_same_device, check_shape


def lambda_return_ref(
    reward: Tensor,  # (B, T)
    value: Tensor,  # (B, T)
    discount: Tensor,  # (B, T)
    trace: Tensor | float,  # (B, T)
) -> Tensor:  # (B, T-1)
    """The same in plain PyTorch, any floating dtype."""
    trace = _as_tensor(trace, value).detach()
    returns, last = [], value[:, -1]
    for t in range(value.shape[1] - 1, 0, -1):
        mixed = value[:, t] + trace[:, t] * (last - value[:, t])
        last = reward[:, t] + discount[:, t] * mixed
        returns.append(last)
    return torch.stack(returns[::-1], 1) if returns else value[:, :0] * 1


def lambda_return(
    reward: Tensor,  # (B, T)
    value: Tensor,  # (B, T)
    discount: Tensor,  # (B, T)
    trace: Tensor | float,  # (B, T)
) -> Tensor:  # (B, T-1)
    """Bootstrapped lambda-return of every step but the last.

    R[t] = r[t+1] + d[t+1] ((1 - l[t+1]) v[t+1] + l[t+1] R[t+1]),   R[T-1] = v[T-1]

    Args:
        reward: (B, T) float, arrived with observation t.
        value: (B, T) float, the critic's estimate at t.
        discount: (B, T) float in [0, 1], 0 where the episode terminated at t.
        trace: (B, T) float in [0, 1] or one number: lambda, 0 where an episode ended at t.
    Returns: (B, T-1), differentiable with respect to reward, value and discount, not trace.
    Raises: ValueError on shapes, TypeError on dtypes or devices.
    Equivalent to:
        R = v.clone()
        for t in reversed(range(T - 1)):
            R[:, t] = r[:, t+1] + d[:, t+1] * torch.lerp(v[:, t+1], R[:, t+1], l[:, t+1])
        R = R[:, :-1]
    Numerics: float32 has fused kernels; other floating dtypes run the reference.
    """
    trace = _check(reward, value, discount, trace)
    if value.dtype != torch.float32 or not available(value, "lambda_return"):
        return lambda_return_ref(reward, value, discount, trace)
    if wants_grad(reward, value, discount):
        return _LambdaReturn.apply(reward, value, discount, trace)
    return raw.lambda_return(reward, value, discount, trace)


def _as_tensor(trace: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(trace, Tensor):
        return trace
    return like.new_full((), trace).expand(like.shape)


def _check(reward: Tensor, value: Tensor, discount: Tensor, trace: Tensor | float) -> Tensor:
    op = "lambda_return"
    check_dim(op, "value", value, "(B, T)", 2)
    if value.shape[1] < 1:
        raise ValueError(f"{op}: expected value of shape (B, T) with T >= 1, got {value.shape}")
    check_dtype(op, "value", value)
    trace = _as_tensor(trace, value)
    check_same_device(op, value=value, reward=reward, discount=discount, trace=trace)
    for name, tensor in (("reward", reward), ("discount", discount), ("trace", trace)):
        check_shape(op, name, tensor, "(B, T)", tuple(value.shape))
        check_dtype(op, name, tensor, value.dtype)
    return trace.detach() if trace.requires_grad else trace


class _LambdaReturn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reward, value, discount, trace):
        returns = raw.lambda_return(reward, value, discount, trace)
        ctx.save_for_backward(returns, value, discount, trace)
        return returns

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_returns):
        return *raw.lambda_return_backward(grad_returns, *ctx.saved_tensors), None


@register_fake("lambda_return")
def _(reward, value, discount, trace):
    return value.new_empty(value.shape[0], value.shape[1] - 1)


@register_fake("lambda_return_backward")
def _(grad_returns, returns, value, discount, trace):
    return tuple(value.new_empty(value.shape) for _ in range(3))
