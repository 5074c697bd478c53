"""The image stem: squared errors of images given as logits."""

import pytest
import torch

from fastwm.ops import available, image_loss, image_loss_ref
from fastwm.ops._backend import raw

SHAPES = [(2, 3, 4, 5, 3), (1, 1, 1), (0, 4, 4, 3), (3, 33, 21, 1), (2, 64, 64, 3)]
fused_only = pytest.mark.skipif(not available("cpu"), reason="no compiled kernels")


def inputs(shape, dtype=torch.float32):
    logits = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    return logits, torch.randint(256, shape, dtype=torch.uint8)


def gradient(op, logits, target):
    loss = op(logits, target)
    weight = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(loss.dtype)
    return loss, torch.autograd.grad((loss * weight).sum(), logits)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, variant, near):
    logits, target = inputs(shape)
    wide = logits.detach().double().requires_grad_()
    for got, want in zip(
        gradient(image_loss, logits, target), gradient(image_loss_ref, wide, target), strict=True
    ):
        near(got.double(), want, 1e-5)
    with torch.no_grad():
        near(image_loss(logits, target).double(), image_loss_ref(wide, target), 1e-5)


def test_any_stride(variant, near):
    logits, target = inputs((3, 4, 6, 5))
    got = gradient(lambda x, y: image_loss(x.permute(1, 3, 2, 0), y.permute(1, 3, 2, 0)),
                   logits, target)  # fmt: skip
    want = gradient(lambda x, y: image_loss_ref(x.permute(1, 3, 2, 0), y.permute(1, 3, 2, 0)),
                    logits, target)  # fmt: skip
    for a, b in zip(got, want, strict=True):
        near(a, b, 1e-5)


def test_extremes(variant, close):
    logits = torch.tensor([-200.0, -100.0, 0.0, 100.0, 200.0, float("nan")]).reshape(6, 1, 1, 1)
    target = torch.tensor([0, 255, 255, 255, 0, 7], dtype=torch.uint8).reshape(6, 1, 1, 1)
    logits.requires_grad_()
    loss, grad = gradient(image_loss, logits, target)
    close(loss[:5], torch.tensor([0.0, 1.0, 0.25, 0.0, 1.0]))
    assert loss[5].isnan() and grad[5].isnan() and grad[:5].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype, variant, close):
    logits, target = inputs((2, 4, 4, 3), dtype)
    loss, grad = gradient(image_loss, logits, target)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    close(loss, image_loss_ref(logits.double(), target), rtol=1e-5, atol=1e-5)


def test_gradcheck_of_reference():
    logits, target = inputs((2, 2, 3, 1), torch.float64)
    assert torch.autograd.gradcheck(lambda x: image_loss_ref(x, target), logits)


@fused_only
def test_opcheck():
    logits, target = inputs((2, 3, 3, 1))
    torch.library.opcheck(raw.image_loss.default, (logits.detach(), target))
    args = (torch.randn(2), logits.detach(), target)
    torch.library.opcheck(raw.image_loss_backward.default, args)


def test_fullgraph_compile(variant, close):
    torch._dynamo.reset()
    compiled = torch.compile(image_loss, fullgraph=True, backend="aot_eager")
    args = inputs((2, 3, 3, 1))
    for got, want in zip(gradient(compiled, *args), gradient(image_loss, *args), strict=True):
        close(got, want)


def test_autocast(variant):
    logits, target = inputs((2, 3, 3, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert image_loss(logits.bfloat16(), target).dtype == torch.float32


def test_bad_input_messages(variant):
    logits, target = inputs((2, 3, 3, 1))
    with pytest.raises(ValueError, match=r"target of shape .* \(2, 3, 3, 1\), got \(1, 3"):
        image_loss(logits, target[:1])
    with pytest.raises(ValueError, match=r"logits of shape \(..., H, W, C\), got \(3, 1\)"):
        image_loss(logits[0, 0], target[0, 0])
    with pytest.raises(TypeError, match="expected target of dtype uint8, got float32"):
        image_loss(logits, target.float())


@fused_only
def test_raw_ops_refuse_forged_input():
    logits, target = inputs((2, 3, 3, 1))
    with pytest.raises(RuntimeError, match="target of shape"):
        raw.image_loss(logits.detach(), target[:1])
    with pytest.raises(RuntimeError, match=r"grad_loss of shape \(N,\) = \(2,\), got \(3,\)"):
        raw.image_loss_backward(torch.ones(3), logits.detach(), target)
