"""Clocks count steps, keep their grid over jumps and restarts, and never catch up without end."""

import pytest

from fastwm.loops.clock import Every, Once, Ratio, Until


def test_every_fires_once_per_multiple():
    every = Every(10)
    assert [step for step in range(0, 45, 4) if every(step)] == [12, 20, 32, 40]


def test_every_zero_never_fires_and_first_fires_at_once():
    assert not any(Every(0)(step) for step in range(100))
    assert [s for s, every in [(0, Every(5, first=True))] if every(s)] == [0]


def test_every_several_multiples_at_once_are_one():
    every = Every(10)
    assert every(35) and not every(39) and every(40)


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_every_resumes_on_its_grid(cut):
    straight, before = Every(10), Every(10)
    fired = [step for step in range(0, 80, 3) if straight(step)]
    first = [step for step in range(0, cut, 3) if before(step)]
    after = Every(10)
    after.load_state_dict(before.state_dict())
    assert (
        first + [step for step in range(len(range(0, cut, 3)) * 3, 80, 3) if after(step)] == fired
    )


def test_every_with_another_interval_does_not_fire_for_the_past():
    after = Every(7)
    after.load_state_dict({"every": 10, "next": 40})
    assert [step for step in range(32, 60) if after(step)] == [42, 49, 56]


def test_ratio_first_is_one_then_exact():
    ratio = Ratio(0.25)
    assert [ratio(step) for step in range(100, 120)] == [1, 0, 0, 0] + [1, 0, 0, 0] * 4


@pytest.mark.parametrize(
    "value, stride", [(64 / 512, 8), (1 / 3, 1), (0.7, 4), (3.0, 2), (1.1, 16)]
)
def test_ratio_keeps_the_fraction(value, stride):
    ratio = Ratio(value)
    total = sum(ratio(step) for step in range(0, 1000 * stride + 1, stride))
    assert total == 1 + int(1000 * stride * value)


def test_ratio_zero_is_never():
    assert Ratio(0)(5) == 0


def test_ratio_limits_catching_up_and_forgets_the_rest():
    ratio = Ratio(0.5, limit=4)
    ratio(0)
    assert ratio(1000) == 4
    assert [ratio(step) for step in (1002, 1004)] == [1, 1]


def test_ratio_resumes_exactly():
    straight, before = Ratio(0.3), Ratio(0.3)
    expected = [straight(step) for step in range(0, 90, 4)]
    found = [before(step) for step in range(0, 40, 4)]
    after = Ratio(0.3)
    after.load_state_dict(before.state_dict())
    assert found + [after(step) for step in range(40, 90, 4)] == expected


def test_ratio_changed_on_resume_neither_repeats_nor_waits():
    before = Ratio(1.0)
    for step in range(0, 101):
        before(step)
    after = Ratio(0.5)
    after.load_state_dict(before.state_dict())
    assert [after(step) for step in (102, 104, 106)] == [1, 1, 1]


def test_once_and_until():
    once = Once()
    assert [once(), once()] == [True, False]
    again = Once()
    again.load_state_dict(once.state_dict())
    assert not again()
    assert Until(3)(2) and not Until(3)(3) and Until(0)(10**9)
