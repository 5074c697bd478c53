"""The mlp stem: a stack of dense layers on packed weights."""

import contextlib

import pytest
import torch

from fastwm.ops import (
    SparseLinear,
    available,
    mlp,
    mlp_ref,
    packed_mlp,
    sparse_linear,
    sparse_linear_ref,
    sparse_weight_grad,
)
from fastwm.ops._backend import raw

SIZES = [(7, 5), (1, 1), (33, 16, 47), (24, 64, 64, 64), (640, 64, 64, 64, 6), (3, 130, 33)]
fused_only = pytest.mark.skipif(not available("cpu", "mlp"), reason="no compiled kernels")


def make(sizes, output=True, dtype=torch.float32):
    weights = []
    for i, o in zip(sizes, sizes[1:], strict=False):
        weights += [torch.randn(o, i) / i**0.5, torch.randn(o), torch.rand(o) + 0.5]
    return [tensor.to(dtype) for tensor in (weights[:-1] if output else weights)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("output", [True, False])
@pytest.mark.parametrize("squash", [True, False])
def test_matches_reference(sizes, output, squash, variant, close):
    weights = make(sizes, output)
    wide = [tensor.double() for tensor in weights]
    packed = packed_mlp(weights, squash)
    assert (packed is None) == (variant == "reference")
    for lead in ((1,), (16,), (3, 43), (0, 2), ()):
        x = 4 * torch.randn(*lead, sizes[0])
        expected = mlp_ref(x.double(), wide, squash=squash)
        close(mlp(x, weights, squash=squash), expected)
        if packed is not None:
            close(packed(x), expected)


def test_any_stride(variant, close):
    weights = make((6, 9, 4))
    x = torch.randn(6, 5, 8).permute(1, 2, 0)[:, ::2]
    turned = [w.t().contiguous().t() if w.dim() == 2 else w for w in weights]
    close(mlp(x, turned), mlp_ref(x.double(), [w.double() for w in weights]))


def test_gradients_and_other_types(variant, close):
    weights = [w.requires_grad_() for w in make((5, 8, 3))]
    x = torch.randn(4, 5, requires_grad=True)
    wide = [t.detach().double().requires_grad_() for t in (x, *weights)]
    got = torch.autograd.grad(mlp(x, weights).sum(), (x, *weights))
    want = torch.autograd.grad(mlp_ref(wide[0], wide[1:]).sum(), wide)
    for a, b in zip(got, want, strict=True):
        close(a, b)
    assert mlp(wide[0].detach(), [w.detach() for w in wide[1:]]).dtype == torch.float64
    assert packed_mlp([w.detach() for w in wide[1:]]) is None


@fused_only
def test_a_row_does_not_depend_on_the_others_or_the_threads():
    weights, before = make((20, 70, 10)), torch.get_num_threads()
    x = torch.randn(1000, 20)
    whole = mlp(x, weights)
    parts = torch.cat([mlp(part, weights) for part in x.split([1, 5, 64, 130, 800])])
    torch.set_num_threads(2)
    shared = mlp(x, weights)
    torch.set_num_threads(before)
    assert torch.equal(whole, parts) and torch.equal(whole, shared)


def test_not_a_number_stays_in_its_row(variant):
    weights, x = make((8, 40, 3)), torch.randn(9, 8)
    x[2, 3] = float("nan")
    assert mlp(x, weights).isnan().any(1).tolist() == [row == 2 for row in range(9)]


@fused_only
def test_opcheck():
    for sizes, output in (((7, 5), True), ((7, 40, 5), True), ((7, 40, 5), False)):
        weights = make(sizes, output)
        torch.library.opcheck(raw.mlp_pack.default, (weights,))
        args = (torch.randn(3, 2, 7), raw.mlp_pack(weights), weights, True)
        torch.library.opcheck(raw.mlp.default, args)


def test_fullgraph_compile(variant, close):
    weights, x = make((7, 5, 3)), torch.randn(4, 7)
    compiled = torch.compile(lambda x: mlp(x, weights), fullgraph=True, backend="aot_eager")
    close(compiled(x), mlp_ref(x, weights))


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (lambda w, x: (w[:4], x), ValueError, r"expected weights of \(weight, bias, scale\)"),
        (lambda w, x: ([], x), ValueError, "got 0 tensors"),
        (lambda w, x: (w, x[:, 1:]), ValueError, r"expected weights\[0\] of shape \(out, 4\)"),
        (lambda w, x: ([*w[:3], w[3][:, 1:], w[4]], x), ValueError, r"weights\[3\] .*\(out, 8\)"),
        (lambda w, x: ([w[0], w[1][1:], *w[2:]], x), ValueError, r"expected weights\[1\] of shape"),
        (lambda w, x: (w, x.int()), TypeError, "expected x"),
    ],
)
def test_bad_input(spoil, error, message, variant):
    weights, x = spoil(make((5, 8, 3)), torch.randn(4, 5))
    with pytest.raises(error, match=message):
        mlp(x, weights)


# ---- layers of one-hots

LAYERS = [((5,), 3, 4, 7), ((), 2, 3, 5), ((2, 70), 4, 8, 64), ((1,), 1, 1, 1), ((0,), 2, 3, 5),
          ((130,), 6, 5, 33), ((3, 1), 2, 2, 321)]  # fmt: skip


@contextlib.contextmanager
def on_threads(count):
    kept = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(kept)


def one_hots(lead, groups, classes):
    index = torch.randint(0, classes, (*lead, groups))
    return torch.nn.functional.one_hot(index, classes).flatten(-2).float()


@pytest.mark.parametrize("lead, groups, classes, out", LAYERS, ids=str)
def test_sparse_linear_matches_reference(lead, groups, classes, out, variant, close):
    weight, bias = torch.randn(out, groups * classes), torch.randn(out)
    for x in (one_hots(lead, groups, classes), torch.randn(*lead, groups * classes)):
        expected = sparse_linear_ref(x.double(), weight.double(), bias.double())
        assert expected.shape == (*lead, out)
        close(sparse_linear(x, weight, bias), expected)
        close(SparseLinear(weight, bias)(x), expected)


def test_sparse_linear_reads_columns_of_wider_rows(variant, close):
    """A view of features (N, T, F), as imagination has them, weights that are columns too."""
    features = torch.cat([torch.randn(9, 4, 30), one_hots((9, 4), 5, 6)], -1)
    weight, bias = torch.randn(40, 60), torch.randn(40)
    layer = SparseLinear(weight[:, 30:], bias)
    for t in range(4):
        close(layer(features[:, t, 30:]), features[:, t, 30:] @ weight[:, 30:].t() + bias)


def test_sparse_linear_lets_not_a_number_through(variant):
    x = torch.zeros(2, 6)
    x[1, 3] = float("nan")
    y = sparse_linear(x, torch.randn(4, 6), torch.zeros(4))
    assert torch.isfinite(y[0]).all() and torch.isnan(y[1]).all()


@pytest.mark.parametrize("lead, groups, classes, out", LAYERS, ids=str)
def test_sparse_linear_has_gradients(lead, groups, classes, out, variant, close):
    width = groups * classes
    parts = one_hots(lead, groups, classes), torch.randn(out, width), torch.randn(out)
    narrow, wide = ([t.detach().to(d).requires_grad_() for t in parts] for d in (torch.float32,
                    torch.float64))  # fmt: skip
    got = torch.autograd.grad(sparse_linear(*narrow).square().sum(), narrow)
    want = torch.autograd.grad(sparse_linear_ref(*wide).square().sum(), wide)
    for mine, exact in zip(got, want, strict=True):
        close(mine, exact)


@pytest.mark.parametrize("groups, classes", [(3, 4), (32, 16)])
def test_gradient_of_a_weight_that_reads_one_hots(groups, classes, variant, close):
    x = torch.cat([torch.randn(150, 20), one_hots((150,), groups, classes)], 1)
    grad = torch.randn(150, 33)
    found = []
    for threads in (1, 2):
        with on_threads(threads):
            found.append(sparse_weight_grad(grad, x, groups * classes))
    assert torch.equal(found[0][:, 20:], found[1][:, 20:]) or variant == "reference"
    close(found[0], grad.double().t() @ x.double())
    compiled = torch.compile(sparse_weight_grad, fullgraph=True, backend="aot_eager")
    close(compiled(grad, x, groups * classes), found[0])


def test_sparse_linear_under_autocast_is_the_product(variant):
    parts = [t.requires_grad_() for t in (one_hots((6,), 3, 4), torch.randn(5, 12), torch.randn(5))]
    with torch.autocast("cpu", torch.bfloat16):
        low = sparse_linear(*parts)
    assert low.dtype == torch.bfloat16
    torch.autograd.grad(low.float().sum(), parts)


def test_sparse_linear_refuses_what_does_not_fit():
    weight, bias = torch.randn(4, 6), torch.randn(4)
    with pytest.raises(ValueError, match=r"sparse_linear: expected x of shape \(..., in\)"):
        sparse_linear(torch.zeros(2, 5), weight, bias)
    with pytest.raises(ValueError, match=r"sparse_linear: expected x of shape \(..., in\)"):
        SparseLinear(weight, bias)(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"sparse_linear: expected bias of shape \(out,\)"):
        SparseLinear(weight, bias[:3])
    with pytest.raises(TypeError, match="sparse_linear: expected x"):
        sparse_linear(torch.zeros(2, 6).long(), weight, bias)


@fused_only
def test_opcheck_and_compile_of_layers_of_one_hots(close):
    x, weight, bias = one_hots((6,), 3, 4), torch.randn(5, 12), torch.randn(5)
    packed = raw.sparse_linear_pack(weight)
    torch.library.opcheck(raw.sparse_linear_pack.default, (weight,))
    torch.library.opcheck(raw.sparse_linear.default, (x, packed, bias))
    torch.library.opcheck(raw.sparse_linear_backward.default, (torch.randn(6, 5), x))
    compiled = torch.compile(sparse_linear, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, sparse_linear):
        parts = [part.detach().requires_grad_() for part in (x, weight, bias)]
        value = function(*parts)
        results.append([value, *torch.autograd.grad(value.square().sum(), parts)])
    for mine, eager in zip(*results, strict=True):
        close(mine, eager)
