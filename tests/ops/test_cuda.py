"""On a GPU: every op against the reference, on other streams, in graphs, twice the same bits."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from fastwm import ops
from fastwm.ops import _cases

pytestmark = pytest.mark.cuda
LIMIT = 1e-4  # as in fastwm.selftest: difference in norm, relative


@pytest.fixture(autouse=True)
def full_precision():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def place(x):
    return x.cuda() if isinstance(x, torch.Tensor) else x


class Call:
    """A case on the device: run() gives results, what was overwritten, and gradients."""

    def __init__(self, name: str, seed: int, batch: int = 37):
        torch.manual_seed(seed)
        case = _cases.CASES[name](batch)
        self.function, self.in_place = getattr(ops, name), case.in_place
        self.args = tree_map(place, list(case.args))
        self.wanted = [x.requires_grad_() for i in case.wrt for x in tree_leaves(self.args[i])]

    def run(self) -> list[torch.Tensor]:
        results = tree_leaves([self.function(*self.args), [self.args[i] for i in self.in_place]])
        results = [x for x in results if isinstance(x, torch.Tensor)]
        loss = sum(x.float().square().sum() for x in results if x.grad_fn)
        if not self.wanted:
            return results
        return results + list(torch.autograd.grad(loss, self.wanted, materialize_grads=True))

    def take(self, other: "Call") -> None:
        """Copy the other call's arguments into this one's memory."""
        pairs = zip(tree_leaves(self.args), tree_leaves(other.args), strict=True)
        with torch.no_grad():
            for mine, new in pairs:
                if isinstance(mine, torch.Tensor):
                    mine.copy_(new)


def test_every_raw_op_has_a_cuda_kernel():
    missing = [n for n in ops._backend._names if not ops.available("cuda", n)]
    assert set(missing) == ops._backend.CPU_ONLY


@pytest.mark.parametrize("name", _cases.CASES)
def test_matches_reference(name):
    results, gradients, _ = _cases.compare(name, "cuda")
    assert max(results, gradients) <= LIMIT


@pytest.mark.parametrize("name", _cases.CASES)
def test_two_runs_are_bit_equal(name):
    first, second = Call(name, 0).run(), Call(name, 0).run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", _cases.CASES)
def test_on_another_stream(name):
    """Arguments that arrive late on a side stream: a launch elsewhere would read too early."""
    expected, late, call = Call(name, 1).run(), Call(name, 1), Call(name, 2)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)  # about 10 ms
        call.take(late)
        actual = call.run()
        torch.cuda.current_stream().synchronize()
    assert _cases._difference(actual, expected) <= LIMIT


@pytest.mark.parametrize("name", _cases.CASES)
def test_in_a_graph(name):
    call, other = Call(name, 1), Call(name, 2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call.run()
    call.take(other)
    graph.replay()
    torch.cuda.synchronize()
    assert _cases._difference(results, other.run()) <= LIMIT


@pytest.mark.parametrize("op", ["twohot_loss", "twohot_mean", "rms_silu"])
def test_bfloat16_is_read_by_the_kernels(op):
    x = torch.randn(300, 255, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bins, target = ops.symexp_bins(255, device="cuda"), torch.randn(300, device="cuda")
    rest = {"twohot_loss": (target, bins), "twohot_mean": (bins,), "rms_silu": (bins.abs(),)}[op]
    wide = x.detach().double().requires_grad_()
    low_out = getattr(ops, op)(x, *rest)
    out = getattr(ops, f"{op}_ref")(wide, *rest)
    torch.testing.assert_close(low_out.double(), out, rtol=2e-2, atol=2e-2)
    (low_grad,) = torch.autograd.grad(low_out.float().sum(), x)
    (grad,) = torch.autograd.grad(out.sum(), wide)
    assert low_grad.dtype == torch.bfloat16
    assert torch.linalg.vector_norm(low_grad - grad) <= 2e-2 * torch.linalg.vector_norm(grad)
