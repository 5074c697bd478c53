"""Raw operators refuse arguments that do not fit, instead of reading past their ends.

The calls are recorded while the ready-made cases run, and every argument is spoiled in turn: a new
op is tested as soon as it has a case; one that no case reaches fails. The same tests under
AddressSanitizer (`make asan`) see what a wrong check lets through, and so do the pages around
tensors where the CUDA bindings and kernels are executed on the CPU (tests/emulate.py).
"""

import contextlib
import functools
import shutil
from unittest import mock

import emulate
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastwm import ops
from fastwm.ops import _backend, _rssm_fused, _rssm_rollout
from fastwm.ops._cases import CASES, _run

NO_ARGUMENTS = {"build_info", "cpu_capability"}
NAMES = sorted(_backend._names - NO_ARGUMENTS)
CUDA_NAMES = [name for name in NAMES if name not in _backend.CPU_ONLY]
BOTH = [("cpu", name) for name in NAMES] + [("cuda", name) for name in CUDA_NAMES]
# The loops of the sequence leave out the action branch ([6] to [8]) and the token part of [14].
LOOP = ("[6]", "[7]", "[8]", "[14] shorter -1", "[14] longer -1")
# Rings may hold anything behind (N, L); the first of the case is scaled, and must be bytes.
RINGS = tuple(
    f"[{ring}] {how} {dim}"
    for ring, dim in ((0, -1), (0, -2), (0, -3), (2, -1), (3, -1))
    for how in ("shorter", "longer", "one", "empty")
) + ("[1] torch.", "[2] torch.", "[3] torch.")
# What an argument may be by itself: "any", "leading" sizes, or whatever begins like this.
FREE = {
    ("gather_windows", "offsets"): ("[0] =", "[1] =", "[2] =", "[3] ="),  # a row modulo L
    ("gather_windows", "ids"): "leading",
    ("gather_windows", "rings"): RINGS,
    ("latent_one_hot", "index"): "any",
    ("latent_one_hot", "classes"): "any",
    ("latent_sample", "logits"): "any",  # the noise, where there is any, is checked against it
    ("mlp", "x"): "leading",
    ("mlp", "weights"): ("list longer",),  # the linear output gets a scale
    ("mlp_pack", "weights"): "any",
    ("pool_conv", "x"): "leading",
    ("pool_silu", "x"): "leading",
    ("pool_conv_backward", "x"): ("longer -3", "shorter -2"),  # an edge that pooling drops
    ("rms_silu", "x"): "leading",
    ("sparse_linear", "x"): "leading",
    ("sparse_linear", "bias"): ("shorter", "one", "longer", "flat"),  # as many as are padded
    ("sparse_linear_pack", "weight"): "any",
    ("sparse_linear_backward", "grad_y"): ("shorter -1", "empty -1", "one -1", "longer -1"),
    ("sparse_linear_backward", "x"): ("shorter -1", "empty -1", "one -1", "longer -1"),
    ("twohot_mean", "logits"): "leading",
    ("upsample_conv2d", "x"): "leading",
    ("upsample_conv2d_silu", "x"): "leading",
    ("twohot_mean_linear", "x"): "leading",
    ("twohot_linear", "x"): "leading",
    ("rssm_pack", "weights"): "any",
    ("adam_", "decay"): ("[0] =", "[1] =", "[2] ="),  # flags
    ("laprop_agc_", "decay"): ("[0] =", "[1] =", "[2] ="),
    ("rssm_scan", "weights"): LOOP,
    ("rssm_scan_backward", "weights"): LOOP,
    ("rssm_scan_backward", "saved"): ("[2]",),  # what only the products after the loop read
}
pytestmark = pytest.mark.skipif(not ops.available("cpu"), reason="no compiled kernels")


class Tape(TorchDispatchMode):
    """Keeps a call of every raw op, one for each choice of optional arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, dict[tuple, tuple]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("fastwm", "fastwm_emulated"):
            name, given = func._schema.name.split("::")[1], tuple(a is None for a in args)
            self.calls.setdefault(name, {}).setdefault((given, str(args[-1])[:5]), copy(args))
        return func(*args, **(kwargs or {}))


def copy(args):
    def one(x):
        return x.detach().clone() if isinstance(x, Tensor) else x

    return tuple(tree_map(one, list(args)))


@functools.cache
def recorded(device: str = "cpu") -> dict[str, list[tuple]]:
    tape = Tape()
    for name, make in CASES.items():
        for batch in (1, 5):
            torch.manual_seed(0)
            with tape, as_on_cuda() if device == "cuda" else contextlib.nullcontext():
                _run(getattr(ops, name), make(batch), "cpu", wide=False)
    return {name: list(calls.values()) for name, calls in tape.calls.items()}


@contextlib.contextmanager
def as_on_cuda():
    """Within the block the rssm's loops get the arguments that they would get for CUDA tensors."""
    with contextlib.ExitStack() as stack:
        for module in (_rssm_fused, _rssm_rollout):
            found = {"raw": emulate.load(), "available": lambda *_: True}
            stack.enter_context(mock.patch.multiple(module, **found))
        yield


@pytest.fixture
def kernels(request):
    """device -> the operators: those of the CPU, or the CUDA code on guarded memory of the CPU."""
    if request.param == "cpu":
        yield torch.ops.fastwm
        return
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler (c++)")
    operators, switch = emulate.load(), emulate.switches()
    recorded("cuda")  # in usual memory: the library's convolution wants its own alignment
    switch.emulation_guard(1)
    yield operators
    assert not switch.emulation_guard(0), "a kernel wrote outside of a tensor"


def shapes(x: Tensor):
    """The tensor with another shape, each in one way."""
    yield "a dimension more", x.unsqueeze(0)
    if x.dim():
        yield "a dimension less", x.flatten()[0] if x.numel() else x.new_zeros(())
        yield "flat", x.new_zeros(max(1, x.numel()) + 1)
    for dim in range(-x.dim(), 0):
        if x.shape[dim] > 0:
            yield f"shorter {dim}", x.narrow(dim, 0, x.shape[dim] - 1).contiguous()
            yield f"empty {dim}", x.narrow(dim, 0, 0).contiguous()
        if x.shape[dim] > 1:
            yield f"one {dim}", x.narrow(dim, 0, 1).contiguous()
        yield (
            f"longer {dim}",
            x.new_zeros([n + (d == dim % x.dim()) for d, n in enumerate(x.shape)]),
        )


def types(x: Tensor):
    for dtype in (torch.float64, torch.float16, torch.int32, torch.complex64):
        if dtype != x.dtype:
            yield str(dtype), x.to(dtype)


def spoiled(value):
    """(what was done, the spoiled argument), for a tensor, a list of them, or an integer."""
    if isinstance(value, Tensor):
        yield from shapes(value)
        yield from types(value)
    elif isinstance(value, (list, tuple)):
        if len(value):
            yield "list shorter", list(value)[:-1]
            yield "list empty", []
            yield "list longer", [*value, value[-1]]
        for i, item in enumerate(value):
            for what, bad in spoiled(item):
                yield f"[{i}] {what}", [*value[:i], bad, *value[i + 1 :]]
    elif isinstance(value, int) and not isinstance(value, bool):
        for bad in (-1, -(2**40), 2**40):
            yield f"= {bad}", bad


def is_free(op: str, argument: str, what: str) -> bool:
    rule = FREE.get((op, argument), ())
    if isinstance(rule, tuple):
        return what.startswith(rule)
    return "torch." not in what and (rule == "any" or not what.endswith("-1"))


@pytest.mark.parametrize("kernels, name", BOTH, indirect=["kernels"])
def test_spoiled_arguments_raise(kernels, name):
    calls = recorded("cpu" if kernels is torch.ops.fastwm else "cuda")
    assert name in calls, "add a case to fastwm/ops/_cases.py that reaches this op"
    op = getattr(kernels, name).default
    accepted, tried = [], 0
    for args in calls[name]:
        for place, argument in enumerate(op._schema.arguments):
            for what, bad in spoiled(args[place]):
                if is_free(name, argument.name, what) and isinstance(bad, int) and bad > 2**30:
                    continue  # a legal request for more memory than there is
                forged = [*copy(args[:place]), bad, *copy(args[place + 1 :])]
                tried += 1
                try:
                    op(*forged)
                except (RuntimeError, ValueError, TypeError, IndexError) as error:
                    if "launch failed" not in str(error):
                        continue  # refused, and not by the page behind a tensor
                if not is_free(name, argument.name, what):
                    accepted.append(f"{argument.name} {what}")
    assert tried > 3
    assert accepted == []


@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter_or_are_refused(name, close):
    op = getattr(torch.ops.fastwm, name).default
    for args in recorded()[name]:
        for place in range(len(args)):
            turned = tree_map(turn, args[place])
            straight, twisted = (
                list(copy(args)),
                [*copy(args[:place]), turned, *copy(args[place + 1 :])],
            )
            expected = tree_leaves([op(*straight), straight])
            try:
                results = op(*twisted)
            except RuntimeError as error:
                assert "expected" in str(error)
                continue
            for a, b in zip(tree_leaves([results, twisted]), expected, strict=True):
                if isinstance(a, Tensor):
                    close(a, b) if a.is_floating_point() else torch.testing.assert_close(a, b)


def turn(x):
    """The same values, not row-major: in every second place of a larger array."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    wide = torch.stack([x, torch.zeros_like(x)], -1).flatten(-2)
    return wide[..., ::2]


def raw_ops_of(case: str) -> set[str]:
    with Tape() as tape:
        _run(getattr(ops, case), CASES[case](2), "cpu", wide=False)
    return set(tape.calls)


@pytest.mark.parametrize("case", CASES)
def test_a_build_without_one_kernel_does_without_it(case, monkeypatch):
    kernels = _backend._kernels["cpu"]
    in_one_file_with_another = {"latent_backward", "mlp_pack", "rssm_pack", "sparse_linear_pack"}
    for name in raw_ops_of(case) - in_one_file_with_another:
        if not name.endswith("_backward"):
            monkeypatch.setitem(_backend._kernels, "cpu", kernels - {name, f"{name}_backward"})
            assert name not in raw_ops_of(case)


@pytest.mark.cuda
@pytest.mark.parametrize("name", NAMES)
def test_a_mix_of_devices_is_refused(name):
    op = getattr(torch.ops.fastwm, name).default
    args = recorded()[name][0]
    if sum(isinstance(x, Tensor) for x in tree_leaves(list(args))) < 2:
        pytest.skip("one tensor only")
    for place, value in enumerate(args):
        if not any(isinstance(x, Tensor) for x in tree_leaves(value)):
            continue
        moved = tree_map(lambda x: x.cuda() if isinstance(x, Tensor) else x, value)
        with pytest.raises((RuntimeError, NotImplementedError)):
            op(*copy(args[:place]), moved, *copy(args[place + 1 :]))
