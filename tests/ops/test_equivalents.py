"""The lines under "Equivalent to" of a docstring, run as they stand, do what the op does."""

import textwrap

import torch

from fastwm import ops


def run(op, **names):
    """The names after the lines have run."""
    text = op.__doc__.split("Equivalent to:\n")[1].split("    Numerics:")[0]
    exec(textwrap.dedent(text), {"torch": torch}, names)
    return names


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_lambda_return():
    r, v = torch.randn(2, 4, 7)
    d, trace = torch.rand(2, 4, 7)
    near(
        ops.lambda_return(r, v, d, trace), run(ops.lambda_return, r=r, v=v, d=d, l=trace, T=7)["R"]
    )


def test_gather_windows():
    ring, ids = torch.randn(3, 9, 4), torch.tensor([[2, 7], [0, 40]])
    (out,) = ops.gather_windows([ring], ids, [-1], [5])
    found = run(ops.gather_windows, ring=ring, ids=ids, offset=-1, rows=5, L=9)
    assert torch.equal(out, found["out"])


SETTINGS = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


def state():
    return [torch.randn(6, 5), 9 * torch.randn(6, 5), torch.randn(6, 5), torch.rand(6, 5)]


def test_laprop_agc():
    p, g, m, n = state()
    found = [x.clone() for x in (p, g, m, n)]
    names = dict(zip("pgmn", found, strict=True))
    run(ops.laprop_agc_, **names, t=4, lr=0.01, agc=0.3, pmin=1e-3, **SETTINGS)
    lists = [[x] for x in (p, g, m, n)]
    ops.laprop_agc_(*lists, torch.tensor(3), torch.tensor(0.01), **SETTINGS)
    for got, want in zip((p, m, n), (found[0], *found[2:]), strict=True):
        near(got, want)


def test_adam():
    p, g = state()[:2]
    leaf = p.clone().requires_grad_()
    leaf.grad = g.clone()
    run(ops.adam_, params=[leaf], lr=0.01, clip_norm=2.0, **SETTINGS)
    mu, nu = [torch.zeros_like(p)], [torch.zeros_like(p)]
    step, lr = torch.tensor(0), torch.tensor(0.01)
    ops.adam_([p], [g], mu, nu, step, lr, clip_norm=2.0, **SETTINGS)
    near(p, leaf.detach())


def test_ema():
    slow, fast = state()[:2]
    expected = [slow.clone()]
    run(ops.ema_, slow=expected, fast=[fast], rate=0.02)
    ops.ema_([slow], [fast], 0.02)
    near(slow, expected[0])
