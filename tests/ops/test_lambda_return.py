import pytest
import torch

from fastwm.ops import available, lambda_return, lambda_return_ref
from fastwm.ops._backend import raw

SHAPES = [(3, 7), (1, 1), (1, 2), (5, 1), (0, 4), (17, 16), (33, 3)]
fused_only = pytest.mark.skipif(not available("cpu"), reason="no compiled kernels")


def inputs(shape, dtype=torch.float32, requires_grad=False):
    reward, value = torch.randn(2, *shape, dtype=dtype)
    discount, trace = torch.rand(2, *shape, dtype=dtype)
    trace[torch.rand(shape) < 0.2] = 0
    return [x.detach().requires_grad_(requires_grad) for x in (reward, value, discount)] + [trace]


def grads(function, args, weight):
    wanted = [a for a in args if a.requires_grad]
    return torch.autograd.grad((function(*args) * weight).sum(), wanted, materialize_grads=True)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"B{s[0]}-T{s[1]}")
def test_matches_reference(shape, variant, close):
    args = inputs(shape, requires_grad=True)
    wide = [a.detach().double().requires_grad_(a.requires_grad) for a in args]
    expected = lambda_return_ref(*wide)
    actual = lambda_return(*args)
    assert actual.shape == (shape[0], shape[1] - 1)
    close(actual, expected)
    weight = torch.randn(actual.shape)
    actual, expected = grads(lambda_return, args, weight), grads(lambda_return_ref, wide, weight)
    for name, got, want in zip(("reward", "value", "discount"), actual, expected, strict=True):
        close(got, want, msg=lambda m, name=name: f"grad_{name}: {m}")


def test_any_stride_and_float_trace(variant, close):
    reward, value, discount, _ = (x.t() for x in inputs((7, 19)))
    expanded = discount[:, :1].expand(19, 7)
    expected = lambda_return_ref(reward, value, expanded, torch.full((19, 7), 0.95))
    close(lambda_return(reward, value, expanded, 0.95), expected)


def test_termination_hides_the_future(variant):
    reward, value, discount, trace = inputs((2, 6))
    discount[:, 3] = 0
    later = value.clone()
    later[:, 3:] = 1e6
    before = lambda_return(reward, value, discount, trace)[:, :3]
    assert torch.equal(lambda_return(reward, later, discount, trace)[:, :3], before)


def test_golden(golden, variant, close):
    arrays = golden("lambda_return")
    cases = sorted({key.rsplit("/", 1)[0] for key in arrays})
    assert cases
    for case in cases:
        keys = ("last", "term", "rew", "boot", "ret", "disc_lam")
        last, term, rew, boot, ret, (disc, lam) = (arrays[f"{case}/{key}"] for key in keys)
        discount = (1 - term.float()) * disc.float()
        trace = (1 - last.float()) * lam.float()
        close(lambda_return(rew, boot, discount, trace), ret)


def test_gradcheck_of_reference():
    args = inputs((3, 5), torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda_return_ref, args)


@fused_only
@pytest.mark.parametrize("shape", [(3, 7), (0, 4)], ids=str)
def test_opcheck(shape):
    reward, value, discount, trace = inputs(shape)
    torch.library.opcheck(raw.lambda_return.default, (reward, value, discount, trace))
    returns = raw.lambda_return(reward, value, discount, trace)
    args = (torch.ones_like(returns), returns, value, discount, trace)
    torch.library.opcheck(raw.lambda_return_backward.default, args)


def test_fullgraph_compile(variant, close):
    torch._dynamo.reset()
    compiled = torch.compile(lambda_return, fullgraph=True, backend="aot_eager")
    args = inputs((3, 7), requires_grad=True)
    close(compiled(*args), lambda_return(*args))
    weight = torch.randn(3, 6)
    for got, want in zip(
        grads(compiled, args, weight), grads(lambda_return, args, weight), strict=True
    ):
        close(got, want)


def test_bad_input_messages(variant):
    reward, value, discount, trace = inputs((16, 15))
    with pytest.raises(ValueError, match=r"reward of shape \(B, T\) = \(16, 15\), got \(16, 14\)"):
        lambda_return(reward[:, 1:], value, discount, trace)
    with pytest.raises(ValueError, match="T >= 1"):
        lambda_return(reward[:, :0], value[:, :0], discount[:, :0], trace[:, :0])
    with pytest.raises(TypeError, match="expected discount of dtype float32, got float64"):
        lambda_return(reward, value, discount.double(), trace)
    with pytest.raises(TypeError, match="expected value of dtype a floating type, got int64"):
        lambda_return(reward, value.long(), discount, trace)


@fused_only
def test_raw_ops_refuse_forged_input():
    reward, value, discount, trace = inputs((4, 5))
    with pytest.raises(RuntimeError, match=r"trace of shape \(B, T\) = \(4, 5\), got \(4, 4\)"):
        raw.lambda_return(reward, value, discount, trace[:, 1:])
    with pytest.raises(RuntimeError, match="dtype"):
        raw.lambda_return(reward, value, discount, trace.double())
    with pytest.raises(RuntimeError, match="grad_returns of shape"):
        raw.lambda_return_backward(value, value[:, 1:], value, discount, trace)


@pytest.mark.cuda
def test_cuda_on_another_stream_and_in_a_graph(close):
    if not available("cuda", "lambda_return"):
        pytest.skip("no CUDA kernels")
    args = [x.detach() for x in inputs((1025, 17))]
    expected = lambda_return_ref(*(x.double() for x in args))
    places = [x.cuda() for x in args]
    with torch.cuda.stream(torch.cuda.Stream()):
        close(lambda_return(*places).cpu(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returns = lambda_return(*places)
    places[0].add_(1)
    graph.replay()
    args[0] += 1
    close(returns.cpu(), lambda_return_ref(*(x.double() for x in args)))
