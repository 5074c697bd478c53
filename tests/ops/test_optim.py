"""The optim stem: LaProp with adaptive clipping, Adam, and moving averages of parameters."""

import math

import pytest
import torch

from fastwm import ops
from fastwm.ops import (
    Copies,
    adam_,
    adam_ref_,
    available,
    ema_,
    ema_ref_,
    laprop_agc_,
    laprop_agc_ref_,
)
from fastwm.ops._backend import raw

fused_only = pytest.mark.skipif(not available("cpu"), reason="no compiled kernels")
SHAPES = [(13, 7), (), (0, 3), (1,), (33,), (70000,), (2, 1, 3, 5)]
BOTH = {"laprop": (laprop_agc_, laprop_agc_ref_), "adam": (adam_, adam_ref_)}


class Run:
    """Parameters by name and everything the optimizer keeps about them."""

    def __init__(self, params):
        self.names = list(params)
        self.params = [params[name].clone() for name in self.names]
        self.mu = [torch.zeros_like(p) for p in self.params]
        self.nu = [torch.zeros_like(p) for p in self.params]
        self.step = torch.zeros((), dtype=torch.int64)

    def update(self, grads, lr, **options):
        return ops.laprop_agc_(
            self.params,
            [grads[name] for name in self.names],
            self.mu,
            self.nu,
            self.step,
            torch.tensor(lr, dtype=torch.float32),
            **options,
        )


def under(data, prefix):
    return {k[len(prefix) :]: v for k, v in data.items() if k.startswith(prefix)}


def test_golden_laprop(golden, near, variant):
    data = golden("laprop_agc")
    run = Run(under(data, "params0/"))
    options = {k: float(data[k]) for k in ("agc", "pmin", "beta1", "beta2", "eps")}
    number = 0
    while f"step{number}/grad/{run.names[0]}" in data:
        grads = under(data, f"step{number}/grad/")
        lr = float(data["lr"]) * min(1.0, number / float(data["warmup"]))
        norm, finite = run.update(grads, lr, **options)
        assert finite
        expected = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        assert math.isclose(float(norm), expected, rel_tol=1e-6)
        for name, param in zip(run.names, run.params, strict=True):
            near(param, data[f"step{number}/params/{name}"], 2e-5, f"{number} {name}")
        number += 1
    assert number > 1 and run.step == number


def cosine(number):
    """Two updates of warm-up, then a cosine over four down to alpha = 0.1 * 0.01 of the rate."""
    if number < 2:
        return number / 2
    return 0.999 * 0.5 * (1 + math.cos(math.pi * (number - 2) / 4)) + 0.001


SETTINGS = {
    "default": ({}, lambda number: min(1.0, number / 3)),
    "wd": ({"weight_decay": 0.1}, lambda number: 1.0),
    "nesterov": ({"nesterov": True}, lambda number: 1.0),
    "cosine": ({}, cosine),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_golden_head_pieces(golden, near, variant, setting):
    data = golden("dreamerv3_head_pieces")
    options, schedule = SETTINGS[setting]
    run = Run(under(data, "opt/init/"))
    mask = [name.endswith("kernel") for name in run.names]
    number = 0
    while f"opt/grad{number}/{run.names[0]}" in data:
        grads = under(data, f"opt/grad{number}/")
        run.update(grads, 0.01 * schedule(number), decay_mask=mask, **options)
        for name, param in zip(run.names, run.params, strict=True):
            near(param, data[f"opt/{setting}/step{number}/{name}"], 2e-5, f"{number} {name}")
        number += 1
    assert number > 1


def lists(shapes=SHAPES, spread=1.0):
    """params, grads, mu, nu of an optimizer that has run for a while."""
    params, grads, mu = ([torch.randn(shape) for shape in shapes] for _ in range(3))
    return [params, [spread * g for g in grads], mu, [torch.rand(shape) for shape in shapes]]


def copies(groups):
    return [[t.clone() for t in group] for group in groups]


OPTIONS = [
    {},
    {"agc": 0.0},
    {"weight_decay": 0.1},
    {"nesterov": True},
    {"weight_decay": 0.2, "decay_mask": [i % 2 == 0 for i in range(len(SHAPES))]},
    {"grad_scale": 64.0},
    {"grad_scale": torch.tensor(0.25)},
    {"beta1": 0.5, "beta2": 0.9, "eps": 1e-5, "pmin": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "default")
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_matches_reference(options, dtype, variant, close):
    ours = lists(spread=3.0)
    theirs = copies(ours)
    steps = [torch.tensor(4, dtype=dtype) for _ in range(2)]
    lr = torch.tensor(1e-2)
    for _ in range(3):
        norm, finite = laprop_agc_(*ours, steps[0], lr, **options)
        expected, _ = laprop_agc_ref_(*theirs, steps[1], lr, **options)
        close(norm, expected)
        assert finite.dtype == torch.bool and finite
    assert steps[0] == steps[1] == 7
    for name, got, want in zip(("params", "grads", "mu", "nu"), ours, theirs, strict=True):
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            close(a, b, msg=lambda m, name=name, i=i: f"{name}[{i}]: {m}")


ADAM_OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled": False},
    {"weight_decay": 0.2, "decay_mask": [i % 2 == 0 for i in range(len(SHAPES))]},
    {"clip_norm": 1.0},
    {"clip_value": 0.5},
    {"clip_norm": 100.0, "clip_value": 0.1, "grad_scale": 64.0, "decoupled": False},
    {"grad_scale": torch.tensor(0.25), "clip_norm": 1e6},
    {"beta1": 0.5, "beta2": 0.9, "eps": 1e-3},
]


@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=lambda o: "-".join(o) or "default")
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_adam_matches_reference(options, dtype, variant, close):
    ours = lists(spread=3.0)
    theirs = copies(ours)
    steps = [torch.tensor(4, dtype=dtype) for _ in range(2)]
    lr = torch.tensor(1e-2)
    for _ in range(3):
        norm, finite = adam_(*ours, steps[0], lr, **options)
        expected, _ = adam_ref_(*theirs, steps[1], lr, **options)
        close(norm, expected)
        assert finite.dtype == torch.bool and finite
    assert steps[0] == steps[1] == 7
    for name, got, want in zip(("params", "grads", "mu", "nu"), ours, theirs, strict=True):
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            close(a, b, msg=lambda m, name=name, i=i: f"{name}[{i}]: {m}")


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("clip", [None, "norm", "value"])
def test_adam_equals_torch(decoupled, clip, variant, close):
    params, _, _, _ = lists([(13, 7), (33,), ()])
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    other = kind(theirs, lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1)
    mu, nu = ([torch.zeros_like(p) for p in params] for _ in range(2))
    step, lr = torch.tensor(0), torch.tensor(1e-2)
    options = {"beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1}
    options |= {"decoupled": decoupled, "clip_norm": 1.0 if clip == "norm" else 0.0}
    options |= {"clip_value": 0.3 if clip == "value" else 0.0}
    for _ in range(5):
        grads = [torch.randn_like(p) for p in params]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        if clip == "norm":
            torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        elif clip == "value":
            torch.nn.utils.clip_grad_value_(theirs, 0.3)
        other.step()
        adam_(params, grads, mu, nu, step, lr, **options)
        for p, q in zip(params, theirs, strict=True):
            close(p, q.detach())


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("bad", [False, True])
def test_copies_follow_in_the_same_pass(name, bad, variant, close):
    ours = lists()
    if bad:
        ours[1][5][60000] = float("inf")
    slow = [None if i % 2 else torch.randn_like(p) for i, p in enumerate(ours[0])]
    low = [torch.full_like(p, 7.0, dtype=torch.bfloat16) for p in ours[0]]
    before = copies([[s for s in slow if s is not None], low])
    _, finite = BOTH[name][0](
        *ours, torch.tensor(4), torch.tensor(1e-2), copies=Copies(slow, 0.2, low)
    )
    assert finite == (not bad)
    for p, b in zip(ours[0], low, strict=True):
        assert torch.equal(b, torch.full_like(b, 7.0) if bad else p.bfloat16())
    present = [i for i, s in enumerate(slow) if s is not None]
    for i, old in zip(present, before[0], strict=True):
        close(slow[i], old if bad else 0.2 * ours[0][i] + 0.8 * old)


@fused_only
def test_bfloat16_copies_round_like_torch():
    numbers = [1.0, 1.00390625, 1.01171875, -3.4e38, 1e-40, 3.3961775e38, -0.0, float("nan")]
    values, zero = torch.tensor(numbers), torch.zeros(8)
    low = torch.empty_like(values, dtype=torch.bfloat16)
    adam_([values], [zero], [zero.clone()], [zero.clone()], torch.tensor(4), torch.tensor(0.0),
          copies=Copies(low=[low]))  # fmt: skip
    expected = torch.tensor(numbers).bfloat16()
    assert torch.equal(low[:-1].view(torch.int16), expected[:-1].view(torch.int16))
    assert low[-1].isnan()


@pytest.mark.parametrize("name", BOTH)
def test_what_is_written_counts_as_changed(name, variant):
    """Autograd refuses a backward pass through what an update has overwritten since."""
    params, grads, mu, nu = lists()
    slow, low = [p.clone() for p in params], [p.bfloat16() for p in params]
    step = torch.zeros((), dtype=torch.int64)
    written = [*params, *mu, *nu, *slow, *low, step]
    before = [x._version for x in written]
    update = BOTH[name][0]
    update(params, grads, mu, nu, step, torch.tensor(1e-3), copies=ops.Copies(slow, 0.1, low))
    assert all(x._version > old for x, old in zip(written, before, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["gradient", "scale"])
@pytest.mark.parametrize("name", BOTH)
def test_a_non_finite_update_writes_nothing(bad, where, name, variant):
    ours = lists()
    scale = 1.0
    if where == "gradient":
        ours[1][4][17] = bad
    elif not math.isinf(bad):
        scale = bad
    else:
        pytest.skip("an infinite scale makes zeros")
    before, step = copies(ours), torch.tensor(4)
    _, finite = BOTH[name][0](*ours, step, torch.tensor(1e-2), grad_scale=scale)
    assert not finite and step == 4
    for got, want in zip(ours, before, strict=True):
        assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(got, want, strict=True))
    for group in (0, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(ours[group], before[group], strict=True))


@pytest.mark.parametrize("name", BOTH)
def test_huge_gradients_are_finite(name, variant, close):
    ours = lists([(40,), (1030,)], spread=1e30)
    theirs, (step, reference) = copies(ours), BOTH[name]
    options = {} if name == "laprop" else {"clip_norm": 1.0}
    norm, finite = step(*ours, torch.tensor(4), torch.tensor(1e-2), **options)
    reference(*theirs, torch.tensor(4), torch.tensor(1e-2), **options)
    assert finite and norm.isfinite()
    for a, b in zip(ours[0], theirs[0], strict=True):
        close(a, b)


def test_gradients_of_any_stride_and_parameters_of_modules(variant, close):
    ours = lists([(6, 4), (3, 2, 5, 5)])
    theirs = copies(ours)
    ours[1][0] = ours[1][0].t().contiguous().t()
    ours[1][1] = ours[1][1].to(memory_format=torch.channels_last)
    ours[0] = [torch.nn.Parameter(p) for p in ours[0]]
    laprop_agc_(*ours, torch.tensor(4), torch.tensor(1e-2))
    laprop_agc_ref_(*theirs, torch.tensor(4), torch.tensor(1e-2))
    for a, b in zip(ours[0], theirs[0], strict=True):
        close(a.detach(), b)
    (ours[0][0] * 2).sum().backward()  # autograd knows nothing of the update


def test_parameters_of_any_stride(variant, close):
    ours = lists([(6, 4)])
    theirs = copies(ours)
    for group in (0, 2, 3):
        ours[group] = [t.t().contiguous().t() for t in ours[group]]
    laprop_agc_(*ours, torch.tensor(4), torch.tensor(1e-2))
    laprop_agc_ref_(*theirs, torch.tensor(4), torch.tensor(1e-2))
    close(ours[0][0], theirs[0][0])


def test_empty_list(variant):
    for update, _ in BOTH.values():
        step = torch.tensor(4)
        norm, finite = update([], [], [], [], step, torch.tensor(1e-2))
        assert norm == 0 and finite and step == 5
    ema_([], [], 0.5)


@pytest.mark.parametrize("finite", [None, True, False])
def test_ema_matches_reference(finite, variant, close):
    slow, fast = ([torch.randn(shape) for shape in SHAPES] for _ in range(2))
    (theirs,) = copies([slow])
    flag = None if finite is None else torch.tensor(finite)
    ema_(slow, fast, 0.02, flag)
    ema_ref_(theirs, fast, 0.02, flag)
    for a, b in zip(slow, theirs, strict=True):
        close(a, b)


@fused_only
def test_two_runs_are_equal_on_any_number_of_threads():
    start, results, before = lists([(300000,), (5,), (70000,)]), [], torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        ours = copies(start)
        norm, _ = laprop_agc_(*ours, torch.tensor(4), torch.tensor(1e-2))
        results.append([norm, *ours[0], *ours[2], *ours[3]])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def raw_args(groups, step=4, lr=1e-2, op="laprop_agc_"):
    """Arguments of a raw op: groups, step, lr, scale, settings, then what the copies need."""
    count = len(groups[0])
    settings = (0.3, 1e-3, 0.9, 0.999, 1e-20, 0.0, [1] * count, False)
    if op == "adam_":
        settings = (1.0, 0.5, 0.9, 0.999, 1e-8, 0.1, [1] * count, True)
    slow, low = [torch.randn_like(groups[0][0])], [p.bfloat16() for p in groups[0]]
    return [*groups, torch.tensor(step), torch.tensor(lr), None, *settings, slow, [0], 0.1, low]


@fused_only
def test_opcheck():
    groups = lists([(3, 4), (5,)])
    for op in ("laprop_agc_", "adam_"):
        torch.library.opcheck(getattr(raw, op).default, raw_args(groups, op=op))
    torch.library.opcheck(raw.ema_.default, (groups[0], groups[1], 0.02, torch.tensor(True)))


def test_fullgraph_compile(variant, close):
    def update(params, grads, mu, nu, step, lr):
        low = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params]
        norm, finite = laprop_agc_(
            params, grads, mu, nu, step, lr, copies=Copies([None, nu[1]], 0.1, low)
        )
        adam_(params, grads, mu, nu, step, lr)
        ema_(mu, grads, 0.5, finite)
        return norm, low[0].float()

    torch._dynamo.reset()
    ours = lists([(3, 4), (5,)])
    theirs, lr = copies(ours), torch.tensor(1e-2)
    steps = [torch.tensor(4) for _ in range(2)]
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    results = compiled(*ours, steps[0], lr), update(*theirs, steps[1], lr)
    for a, b in zip(*results, strict=True):
        close(a, b)
    assert steps[0] == 6
    for got, want in zip(ours, theirs, strict=True):
        for a, b in zip(got, want, strict=True):
            close(a, b)


def test_bad_input_messages(variant):
    params, grads, mu, nu = lists([(3, 4), (5,)])
    step, lr = torch.tensor(4), torch.tensor(1e-2)
    with pytest.raises(ValueError, match="expected as many grads as params = 2, got 1"):
        laprop_agc_(params, grads[1:], mu, nu, step, lr)
    with pytest.raises(ValueError, match=r"expected mu\[0\] of shape \(3, 4\), got \(5,\)"):
        laprop_agc_(params, grads, mu[::-1], nu, step, lr)
    with pytest.raises(TypeError, match=r"expected nu\[1\] in torch.float32, got torch.float64"):
        laprop_agc_(params, grads, mu, [nu[0], nu[1].double()], step, lr)
    with pytest.raises(TypeError, match="step as a 0-d int64 or float32"):
        laprop_agc_(params, grads, mu, nu, torch.tensor([4]), lr)
    with pytest.raises(TypeError, match="lr as a 0-d float32"):
        laprop_agc_(params, grads, mu, nu, step, lr.double())
    with pytest.raises(ValueError, match="decay_mask of length 2, got 1"):
        laprop_agc_(params, grads, mu, nu, step, lr, decay_mask=[True])
    with pytest.raises(
        ValueError, match=r"adam_: expected as many slow copies as params = 2, got 1"
    ):
        adam_(params, grads, mu, nu, step, lr, copies=Copies([None]))
    with pytest.raises(TypeError, match=r"low copies\[0\] in torch.bfloat16, got torch.float32"):
        adam_(params, grads, mu, nu, step, lr, copies=Copies(low=nu))
    with pytest.raises(ValueError, match=r"expected fast\[0\] of shape"):
        ema_(params, params[::-1], 0.5)


@fused_only
def test_raw_ops_refuse_forged_input():
    groups = lists([(3, 4), (5,)])
    params, grads, mu, nu = groups
    wrong = torch.zeros(2)
    forged = [
        (params, grads[:1], mu, nu),
        (params, [grads[0], wrong], mu, nu),
        (params, grads, [wrong, mu[1]], nu),
        (params, grads, mu, [nu[0].double(), nu[1]]),
        ([params[0].t().contiguous().t(), params[1]], grads, mu, nu),
    ]
    for broken in forged:
        with pytest.raises(RuntimeError, match="expected"):
            raw.laprop_agc_(*raw_args(broken))
    args = raw_args(groups)
    twisted = [wrong.bfloat16(), groups[0][1].bfloat16()]
    for place, value in ((13, [1]), (5, torch.ones(2)), (4, torch.ones(1)), (15, [wrong]),
                         (16, []), (16, [2]), (16, [-1]), (18, groups[0]), (18, twisted),
                         (18, args[18][:1])):  # fmt: skip
        for op in ("laprop_agc_", "adam_"):
            broken = raw_args(groups, op=op)
            broken[place] = value
            with pytest.raises(RuntimeError, match="expected"):
                getattr(raw, op)(*broken)
    with pytest.raises(RuntimeError, match="expected"):
        raw.ema_(params, [params[0], wrong], 0.5, None)
