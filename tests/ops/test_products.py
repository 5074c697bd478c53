"""Who multiplies on a CPU: what the probe decides, and that the libraries agree."""

import itertools

import pytest
import torch
from test_rssm import all_gradients, make_inputs, make_weights

from fastwm import ops
from fastwm.agents import defaults
from fastwm.ops import _products as P
from fastwm.ops._rssm_rollout import FusedRollout, LibraryRollout, _rollout

with_onednn = pytest.mark.skipif(not P.has_onednn(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def settle(monkeypatch):
    """settle(onednn=…, low=…): the choice of this process, for one test."""

    def give(onednn=(), low=False):
        monkeypatch.setattr(P, "_made", [P.Choice(frozenset(onednn), low, "test", {})])

    return give


class Clock:
    """A timer that knows how long each of the timed calls takes, in their order."""

    def __init__(self, *seconds):
        self.now, self.next = 0.0, itertools.cycle(seconds)
        self.running = False

    def __call__(self):
        self.now += next(self.next) if self.running else 0.0
        self.running = not self.running
        return self.now


def probe(*seconds, **kwargs):
    return P.probe(Clock(*seconds), **kwargs)


@with_onednn
def test_a_library_is_taken_for_a_clear_gain_only():
    assert probe(2.0, 1.0).onednn == frozenset(P.LAYOUTS)
    assert probe(1.2, 1.0).onednn == frozenset()  # within the margin
    assert probe(1.0, 2.0).onednn == frozenset()
    assert probe(2.0, 1.0, onednn=False).onednn == frozenset()


@with_onednn
def test_bfloat16_must_beat_the_better_library():
    assert probe(4.0, 2.0, 1.0, low=True).low
    assert not probe(4.0, 2.0, 1.9, low=True).low
    assert not probe(4.0, 2.0, 3.0, low=True).low
    assert not probe(4.0, 2.0).low  # no instructions: not even timed


def test_noise_does_not_decide():
    fast, slow = [1.0] * P.ROUNDS, [2.0] * P.ROUNDS
    assert P.pays(fast, slow) and not P.pays(slow, fast)
    assert P.pays([9.0, *fast[1:]], slow)  # one bad round
    assert not P.pays([9.0, 9.0, *fast[2:]], slow)
    lucky = [1.0, 5.0] * P.ROUNDS  # half of all rounds were disturbed: equal, really
    assert not P.pays(lucky[: P.ROUNDS], lucky[1 : P.ROUNDS + 1])


def test_the_setting_pins_the_choice_without_timing():
    def forbidden(**kwargs):
        raise AssertionError("timed")

    assert P.decide("blas", forbidden).onednn == frozenset()
    if P.has_onednn():
        assert P.decide("onednn", forbidden).onednn == frozenset(P.LAYOUTS)
    made = P.Choice(frozenset(), False, "timed", {})
    assert P.decide("auto", lambda **kwargs: made) is made
    with pytest.warns(RuntimeWarning, match="expected auto, blas or onednn, got 'mkl'"):
        assert P.decide("mkl", lambda **kwargs: made) is made


def test_the_choice_is_made_once(monkeypatch):
    monkeypatch.setattr(P, "_made", [])
    monkeypatch.setattr(P, "decide", lambda setting: P.Choice(frozenset(), False, setting, {}))
    monkeypatch.setenv("FASTWM_PRODUCTS", "")
    torch.use_deterministic_algorithms(False)
    first = P.choice()
    monkeypatch.setenv("FASTWM_PRODUCTS", "onednn")
    assert P.choice() is first and first.reason == "auto"
    assert ops.backend_info()["products"] == "blas"


def test_no_clock_decides_in_a_deterministic_run(monkeypatch):
    monkeypatch.setattr(P, "decide", lambda setting: P.Choice(frozenset(), False, setting, {}))
    torch.use_deterministic_algorithms(True)
    for value, taken in (("", "blas"), ("auto", "blas"), ("onednn", "onednn")):
        monkeypatch.setattr(P, "_made", [])
        monkeypatch.setenv("FASTWM_PRODUCTS", value)
        assert P.choice().reason == taken


@with_onednn
def test_the_probe_does_not_follow_the_defaults_of_torch():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = {(x.dtype, x.device.type) for key in P.LAYOUTS for x in P.operands(key)}
            assert found == {(torch.float32, "cpu")}
            assert probe(2.0, 1.0).onednn == frozenset(P.LAYOUTS)
    finally:
        torch.set_default_dtype(before)


@with_onednn
@pytest.mark.parametrize("layout", [*P.LAYOUTS, "tt"])
@pytest.mark.parametrize("sizes", [(5, 7, 3), (1, 1, 1), (33, 64, 17), (2, 3, 4)])
def test_both_libraries_agree_in_every_layout(settle, layout, sizes):
    rows, inner, columns = sizes
    a = torch.randn(inner, rows).t() if layout[0] == "t" else torch.randn(rows, inner)
    b = torch.randn(columns, inner).t() if layout[1] == "t" else torch.randn(inner, columns)
    want = (a.double() @ b.double()).float()
    for taken in ((), P.LAYOUTS):
        settle(onednn=taken)
        got = P.times(a, b)
        assert got.is_contiguous() and got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(P.by_onednn(a, b), want, rtol=1e-5, atol=1e-5)


@with_onednn
def test_what_onednn_does_not_take(settle, monkeypatch):
    settle(onednn=P.LAYOUTS)
    monkeypatch.setattr(P, "by_onednn", lambda a, b: pytest.fail("taken"))
    wide, batch = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 3, 5)
    assert P.times(wide, wide.t()).dtype == torch.float64
    assert P.times(torch.randn(2, 4, 3), batch).shape == (2, 4, 5)
    assert P.times(torch.randn(0, 3), torch.randn(3, 5)).shape == (0, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert P.times(wide.float(), wide.float().t()).dtype == torch.bfloat16


@with_onednn
@pytest.mark.parametrize("compile", [False, True])
def test_the_sequence_by_onednn(settle, near, compile):
    """Values and every gradient, as by the BLAS; traced, too."""
    torch._dynamo.reset()
    weights, inputs = make_weights(), make_inputs()
    settle()
    cotangents = [torch.randn(x.shape) for x in ops.rssm_observe(weights, **inputs)]
    expected, wanted = all_gradients(ops.rssm_observe, weights, inputs, cotangents)
    settle(onednn=P.LAYOUTS)
    observe = ops.rssm_observe
    if compile:
        observe = torch.compile(observe, fullgraph=True, backend="aot_eager")
    actual, grads = all_gradients(observe, weights, inputs, cotangents)
    for got, want in zip(actual, expected, strict=True):
        near(got, want)
    for name, want in wanted.items():
        near(grads[name], want, who=name)


@pytest.mark.parametrize("low", [False, True])
def test_rollouts_read_bfloat16_only_where_that_pays(settle, low):
    settle(low=low)
    weights, inputs = make_weights(), make_inputs()
    states = torch.zeros(3, 2, inputs["deter"].shape[1]), torch.zeros(3, 2, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        taken = _rollout(weights, *states, 0.01)
    if not low and ops.available("cpu", "rssm_step_"):
        assert isinstance(taken, FusedRollout)
    else:
        assert isinstance(taken, LibraryRollout)
        assert taken.stepper.low == (torch.bfloat16 if low else None)


def test_a_person_is_told_what_bfloat16_costs_on_this_cpu(settle, monkeypatch):
    cpu = torch.device("cpu")
    settle(low=False)
    monkeypatch.setattr(P, "multiplies_low", lambda: False)
    assert "no instructions for bfloat16" in defaults.precision(cpu).reason
    assert "slower" in defaults.caution("bf16", cpu)
    monkeypatch.setattr(P, "multiplies_low", lambda: True)
    settle(low=True)
    assert "--precision bf16" in defaults.precision(cpu).reason
    assert defaults.caution("bf16", cpu) == ""
    assert defaults.caution("fp32", cpu) == ""
