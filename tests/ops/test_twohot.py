"""The two-hot stem: goldens, reference parity, errors."""

import torch

from fastwm import ops


def groups(data):
    return sorted({key.split("/")[0] for key in data})


def test_golden_symlog(golden, near):
    data = golden("dreamerv3_head_pieces")
    torch.testing.assert_close(ops.symlog(data["symlog/x"]), data["symlog/y"], rtol=2e-6, atol=0)
    torch.testing.assert_close(
        ops.symexp(data["symlog/y"]), data["symlog/symexp"], rtol=5e-6, atol=0)


def test_golden_bins(golden):
    data = golden("dreamerv3_head_pieces")
    names = [key for key in data if key.startswith("bins")]
    assert names
    for name in names:
        bins = ops.symexp_bins(data[name].shape[0])
        torch.testing.assert_close(bins, data[name], rtol=3e-6, atol=0)
        assert torch.equal(bins, -bins.flip(0))


def test_golden_symexp(golden, near):
    data = golden("twohot_symexp")
    for group in groups(data):
        bins, target = data[f"{group}/bins"], data[f"{group}/target"]
        logits = data[f"{group}/logits"].requires_grad_()
        loss = ops.twohot_loss(logits, target, bins)
        torch.testing.assert_close(loss, data[f"{group}/loss"], rtol=2e-6, atol=2e-6)
        expected = data[f"{group}/grad_of_weighted_loss"]
        (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
        # Per row the golden is our gradient times a weight; find the weight by projection.
        weight = (grad * expected).sum(-1, keepdim=True) / grad.square().sum(-1, keepdim=True)
        near(grad * weight, expected, 1e-5, f"{group} grad")
        mean = ops.twohot_mean(logits, bins)
        error = (mean - data[f"{group}/mean"]).abs() / (1 + data[f"{group}/mean"].abs())
        assert error.max() < 1e-4, group


def test_golden_head_pieces(golden, near):
    data = golden("dreamerv3_head_pieces")
    bins = data[f"bins{data['twohot/logits'].shape[-1]}"]
    logits = data["twohot/logits"].requires_grad_()
    loss = ops.twohot_loss(logits, data["twohot/target"], bins)
    torch.testing.assert_close(loss, data["twohot/loss"], rtol=5e-6, atol=5e-6)
    near(torch.autograd.grad(loss.sum(), logits)[0], data["twohot/grad"], 1e-5, "grad")
    mean = ops.twohot_mean(logits, bins)
    error = (mean - data["twohot/pred"]).abs() / (1 + data["twohot/pred"].abs())
    assert error.max() < 1e-4
    row = torch.arange(mean.shape[0], dtype=torch.float32)  # the golden's cotangent
    grad = torch.autograd.grad(mean, logits, row)[0]
    near(grad, data["twohot/pred_grad"], 1e-5, "pred grad")
