"""Scores and lengths of episodes: by hand, and the compiled call against its numpy twin."""

import numpy as np
import pytest

from fastwm.loops import tally as module
from fastwm.loops.tally import tally, tally_numpy


def rows_of(reward, first, last):
    flags = {"is_first": np.array(first, bool), "is_last": np.array(last, bool)}
    return {"reward": np.array(reward, np.float32), **flags}


@pytest.mark.parametrize("count", [tally, tally_numpy])
def test_an_episode_of_three_decisions(count):
    score, length = np.zeros(2), np.zeros(2, np.int64)
    no, first = [0, 0], [1, 0]
    assert count(rows_of([0, 1], [1, 1], no), score, length) is None
    assert count(rows_of([2, 1], no, no), score, length) is None
    assert count(rows_of([3, 1], no, no), score, length) is None
    assert count(rows_of([4, 1], no, [1, 0]), score, length) == ([9.0], [3])
    assert count(rows_of([0, 1], first, no), score, length) is None
    assert count(rows_of([5, 1], no, [1, 1]), score, length) == ([5.0, 6.0], [1, 5])


@pytest.mark.skipif(module._replay is None, reason="nothing is compiled")
def test_compiled_equals_numpy():
    rng = np.random.default_rng(0)
    ours, theirs = [(np.zeros(13), np.zeros(13, np.int64)) for _ in range(2)]
    last, ends = np.ones(13, bool), 0
    for _ in range(200):
        first, last = last, rng.random(13) < 0.1
        rows = rows_of(rng.normal(size=13) * 1e3, first, last)
        found, wanted = tally(rows, *ours), tally_numpy(rows, *theirs)
        assert found == wanted
        assert np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])
        ends += 0 if found is None else len(found[0])
    assert ends > 100
    with pytest.raises(ValueError, match="expected rows of 13 environments, got 2"):
        tally(rows_of([0, 1], [1, 1], [0, 0]), *ours)
