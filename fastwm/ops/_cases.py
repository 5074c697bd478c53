"""One ready-made call per public op, for whoever runs them all: selftest, coverage tests.

Every `X` of `fastwm.ops` that has an `X_ref` needs a case here; tests/test_selftest.py says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastwm import ops


@dataclass
class Case:
    """Arguments of a call: nested tuples and lists of tensors on the CPU, float32 where float."""

    args: tuple[Any, ...]
    wrt: tuple[int, ...] = ()  # positions of the arguments to differentiate
    in_place: tuple[int, ...] = ()  # positions of the arguments that the op overwrites
    wide: bool = True  # the reference takes float64


class Recorder(TorchDispatchMode):
    """Within the block, `names` collects the raw ops of the extension that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastwm":
            self.names.add(func._schema.name.removeprefix("fastwm::"))
        return func(*args, **(kwargs or {}))


CASES: dict[str, Callable[[int], Case]] = {}  # op name -> case of a given batch size


def _case(function: Callable[[int], Case]) -> Callable[[int], Case]:
    CASES[function.__name__] = function
    return function


@_case
def lambda_return(batch: int) -> Case:
    reward, value = torch.randn(2, batch, 9)
    return Case((reward, value, *torch.rand(2, batch, 9)), wrt=(0, 1, 2))


@_case
def sparse_linear(batch: int) -> Case:
    x = torch.nn.functional.one_hot(torch.randint(0, 5, (batch, 3)), 5).flatten(1).float()
    return Case((x, torch.randn(9, 15), torch.randn(9)), wrt=(0, 1, 2))


@_case
def twohot_loss(batch: int) -> Case:
    bins = ops.symexp_bins(255)
    return Case((torch.randn(batch, 3, 255), 30 * torch.randn(batch, 3), bins), wrt=(0,))


@_case
def twohot_loss_linear(batch: int) -> Case:
    head = (torch.randn(255, 9) / 9, torch.randn(255) / 9)
    args = (torch.randn(batch, 3, 9), *head, 30 * torch.randn(batch, 3), ops.symexp_bins(255))
    return Case(args, wrt=(0, 1, 2))


@_case
def twohot_mean(batch: int) -> Case:
    return Case((torch.randn(batch, 3, 255), ops.symexp_bins(255)), wrt=(0,))


@_case
def twohot_mean_linear(batch: int) -> Case:
    head = (torch.randn(255, 9) / 9, torch.randn(255) / 9)
    wrt = (0, 1, 2) if batch == 1 else ()  # without gradients the logits are never written
    return Case((torch.randn(batch, 3, 9), *head, ops.symexp_bins(255)), wrt=wrt)


@_case
def gmm_nll(batch: int) -> Case:
    if batch == 1:  # one mixture over vectors
        shapes, layout = ((2, 1, 7), (2, 1, 4, 7), (2, 1, 4, 7), (2, 1, 4)), "joint"
    else:  # one mixture per latent
        shapes, layout = ((batch, 7), *((batch, 7, 5) for _ in range(3))), "factored"
    return Case((*(torch.randn(shape) for shape in shapes), layout), wrt=(1, 2, 3))


@_case
def latent_sample(batch: int) -> Case:
    return Case((torch.randn(batch, 5, 7), torch.rand(batch, 5), 0.01), wrt=(0,))


@_case
def straight_through(batch: int) -> Case:
    return Case((torch.randint(7, (batch, 5)), torch.randn(batch, 5, 7), 0.01), wrt=(1,))


@_case
def kl_balance(batch: int) -> Case:
    return Case((*(2 * torch.randn(2, batch, 5, 7)), 0.01, 1.0), wrt=(0, 1))


@_case
def rms_silu(batch: int) -> Case:
    return Case((torch.randn(batch, 3, 33), torch.rand(33) + 0.5), wrt=(0, 1))


@_case
def mlp(batch: int) -> Case:
    sizes = ((33, 5), (33,), (33,), (7, 33), (7,))
    weights = [torch.randn(size) / 4 for size in sizes]
    wrt = () if batch > 1 else (0, 1)  # with a gradient the layers run one by one
    return Case((torch.randn(batch, 3, 5), weights), wrt=wrt)


@_case
def image_loss(batch: int) -> Case:
    target = torch.randint(256, (batch, 2, 3, 5, 3), dtype=torch.uint8)
    return Case((torch.randn(batch, 2, 3, 5, 3), target), wrt=(0,))


@_case
def pool_silu(batch: int) -> Case:
    return Case((torch.randn(batch, 9, 6, 5), torch.randn(9), torch.rand(9) + 0.5), wrt=(0, 1, 2))


@_case
def conv_pool_silu(batch: int) -> Case:
    images, weight = torch.randn(batch, 3, 6, 5), torch.randn(9, 3, 5, 5) / 9
    return Case((images, weight, torch.randn(9), torch.rand(9) + 0.5), wrt=(0, 1, 2, 3))


@_case
def upsample_conv2d(batch: int) -> Case:
    images, weight = torch.randn(batch, 3, 5, 7), torch.randn(4, 3, 5, 5) / 9
    return Case((images, weight, torch.randn(4)), wrt=(0, 1, 2))


@_case
def upsample_conv2d_silu(batch: int) -> Case:
    images, weight = torch.randn(batch, 9, 5, 3), torch.randn(12, 9, 5, 5) / 15
    return Case((images, weight, torch.randn(12), torch.rand(12) + 0.5), wrt=(0, 1, 2, 3))


def _weights(deter=16, hidden=8, groups=3, classes=4, action=2, embed=5, blocks=2):
    def dense(inputs: int, outputs: int = hidden) -> tuple[Tensor, Tensor, Tensor]:
        weight = torch.randn(outputs, inputs) / inputs**0.5
        return weight, 0.1 * torch.randn(outputs), torch.rand(outputs) + 0.5

    part, logits = deter // blocks, groups * classes
    core = torch.randn(blocks, part + 3 * hidden, part) / (part + 3 * hidden) ** 0.5
    gru = torch.randn(blocks, part, 3 * part) / part**0.5
    return ops.RSSMWeights(
        deter_in=dense(deter),
        stoch_in=dense(logits),
        action_in=dense(action),
        hidden=((core, 0.1 * torch.randn(deter), torch.rand(deter) + 0.5),),
        gru=(gru, 0.1 * torch.randn(3 * deter)),
        post=(dense(deter + embed),),
        post_logit=dense(hidden, logits)[:2],
        prior=(dense(deter), dense(hidden)),
        prior_logit=dense(hidden, logits)[:2],
    )


def _one_hot(batch: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.randint(4, (batch, 3)), 4).float()


@_case
def gru_step(batch: int) -> Case:
    stoch = _one_hot(batch).flatten(1)
    wrt = (0, 1, 2, 3) if batch > 1 else ()  # without gradients it takes the acting path
    return Case((_weights(), torch.randn(batch, 16), stoch, torch.randn(batch, 2)), wrt)


@_case
def gru_step_layernorm(batch: int) -> Case:
    weight = torch.randn(3 * 16, 5 + 16) / 21**0.5
    affine = (torch.rand(3 * 16) + 0.5, 0.3 * torch.randn(3 * 16))
    return Case((torch.randn(batch, 5), torch.randn(batch, 16), weight, *affine), (0, 1, 2, 3, 4))


@_case
def rssm_observe(batch: int) -> Case:
    length = 6
    tokens, action = torch.randn(batch, length, 5), torch.randn(batch, length, 2)
    is_first, noise = torch.rand(batch, length) < 0.3, torch.rand(batch, length, 3)
    start = (torch.randn(batch, 16), _one_hot(batch))
    return Case((_weights(), *start, tokens, action, is_first, noise, 0.01), wrt=(0, 1, 3))


@_case
def rssm_prior(batch: int) -> Case:
    return Case((_weights(), torch.randn(batch, 4, 16), 3), wrt=(0, 1))


@_case
def rssm_imagine(batch: int) -> Case:
    def policy(deter: Tensor, stoch: Tensor) -> Tensor:
        return deter[:, :2] + stoch[:, 0, :2]

    noise = torch.rand(5, batch, 3)
    return Case((_weights(), torch.randn(batch, 16), _one_hot(batch), policy, 5, noise, 0.01))


@_case
def gather_windows(batch: int) -> Case:
    image = torch.randint(256, (3, 9, 4, 2, 2), dtype=torch.uint8)
    rings = [image, torch.randn(3, 9), image[..., 0, 0].clone(), torch.randint(9, (3, 9, 3))]
    ids = torch.stack([torch.randint(3, (batch,)), torch.randint(1, 99, (batch,))], -1)
    return Case((rings, ids, [0, -1, 0, 2], [5, 9, 1, 4], [torch.float32, None, None, None]))


def _optimizer(batch: int) -> Case:
    shapes = [(batch, 3), (7,), (2, 3, 5)]
    lists = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    nu = [torch.rand(shape) for shape in shapes]
    args = (*lists, nu, torch.tensor(3), torch.tensor(1e-2))
    return Case(args, in_place=(0, 2, 3, 4), wide=False)


@_case
def laprop_agc_(batch: int) -> Case:
    return _optimizer(batch)


@_case
def adam_(batch: int) -> Case:
    return _optimizer(batch)


@_case
def ema_(batch: int) -> Case:
    slow, fast = ([torch.randn(batch, 3), torch.randn(7)] for _ in range(2))
    return Case((slow, fast, 0.02), in_place=(0,), wide=False)


def _run(function, case: Case, device: str, wide: bool) -> tuple[list, list]:
    """Results (outputs, then what was overwritten) and gradients of one call."""

    def place(x):
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(device, torch.float64 if wide and x.is_floating_point() else x.dtype, copy=True)

    args = tree_map(place, list(case.args))
    wanted = [x.requires_grad_() for i in case.wrt for x in tree_leaves(args[i])]
    results = tree_leaves([function(*args), [args[i] for i in case.in_place]])
    results = [x for x in results if isinstance(x, torch.Tensor)]
    if not wanted:
        return results, []
    noise = torch.Generator().manual_seed(1)
    parts = [(x * torch.randn(x.shape, generator=noise).to(x)).sum() for x in results if x.grad_fn]
    return results, list(torch.autograd.grad(sum(parts), wanted, materialize_grads=True))


def _difference(actual: list, expected: list) -> float:
    """Largest over the tensors of |actual - expected| / |expected|, by norm; NaN counts as inf."""
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        a, e = a.detach().cpu().double(), e.detach().cpu().double()
        gap = float(torch.linalg.vector_norm(a - e) / torch.linalg.vector_norm(e).clamp(min=1e-6))
        worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def compare(name: str, device: str) -> tuple[float, float, set[str]]:
    """Worst difference of results and gradients over batch sizes, and the raw ops that ran."""
    stem = name.rstrip("_")
    reference = getattr(ops, f"{stem}_ref{name.removeprefix(stem)}")
    worst, seen = [0.0, 0.0], set()
    for batch in (1, 5, 37):
        torch.manual_seed(batch)
        case = CASES[name](batch)
        with Recorder() as recorder:
            actual = _run(getattr(ops, name), case, device, wide=False)
        expected = _run(reference, case, "cpu", wide=case.wide)
        for kind in (0, 1):
            worst[kind] = max(worst[kind], _difference(actual[kind], expected[kind]))
        seen |= recorder.names
    return *worst, seen
