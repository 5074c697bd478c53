"""check_env: the report, its warnings, its exit code, and that it notices every breach."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

from fastwm import check_env, envs
from fastwm.envs.base import VecEnv
from fastwm.envs.check import check
from fastwm.envs.dummy import DummyEnv, DummyImageEnv
from fastwm.spaces import Space


def journal(kind, *args, **options):
    return envs.Journal(lambda: kind(*args, **options))


def test_report_of_a_sound_environment():
    report = check(journal(DummyEnv, 2, lengths=(3, 5)), 60)
    text = str(report)
    assert report.errors == [] and report.warnings == []
    # Rows 0 to 60: rows 3, 7, ... and 5, 11, ... end episodes; row 60 opens number 15.
    assert "episodes: 25 finished (12 terminated, 13 truncated), mean return" in text
    assert "observation vector: vector float32 (3,), from 0 to 15" in text
    assert "restore: exact" in text and text.endswith("ok: 0 errors, 0 warnings")


class Spoiled(DummyEnv):
    """Counts like the dummy, then `spoil` changes every row from the 5th on."""

    def __init__(self, spoil):
        super().__init__(2)
        self.spoil, self.rows = spoil, 0

    def step(self, action):
        rows = super().step(action)
        self.rows += 1
        if self.rows >= 5:
            self.spoil(self, rows)
        return rows


def put(name, value):
    def spoil(env, rows):
        rows[name] = np.broadcast_to(np.asarray(value, rows[name].dtype), rows[name].shape).copy()

    return spoil


def put_as(name, change):
    return lambda env, rows: rows.update({name: change(rows[name])})


BREACHES = {
    "a key is missing": (lambda env, rows: rows.pop("vector"), "rows: expected the keys"),
    "a key too many": (lambda env, rows: rows.update(extra=rows["reward"]), "rows: expected"),
    "wrong dtype": (put_as("vector", np.float64), r"vector: expected float32 .*got float64"),
    "wrong shape": (put_as("vector", lambda x: x[:, :2]), r"of shape \(2, 3\), got .*\(2, 2\)"),
    "reward in float64": (put_as("reward", np.float64), "reward: expected float32"),
    "no first row": (put("is_first", False), "is_first: expected"),
    "always first": (put("is_first", True), "is_first: expected"),
    "first and last": (
        lambda env, rows: rows.update(is_last=rows["is_last"] | rows["is_first"]),
        "is_last: expected an episode of at least one decision",
    ),
    "terminal in between": (put("is_terminal", True), "is_terminal: expected only where is_last"),
    "reward of a reset": (put("reward", 1), "reward: expected 0 where is_first"),
    "not a number": (put("vector", np.nan), "vector: expected finite"),
    "infinite reward": (
        lambda env, rows: rows["reward"].__setitem__(~rows["is_first"], np.inf),
        "reward: expected finite",
    ),
}


@pytest.mark.parametrize("name", BREACHES)
def test_breaches_are_errors(name):
    spoil, message = BREACHES[name]
    report = check(journal(Spoiled, spoil), 40)
    assert any(re.search(message, error) for error in report.errors), report
    assert "FAILED" in str(report)


def test_overwritten_rows_are_an_error():
    class Reusing(DummyEnv):
        def step(self, action):
            rows = super().step(action)
            if not hasattr(self, "buffer"):
                self.buffer = np.zeros_like(rows["vector"])
            self.buffer[:] = rows["vector"]
            return {**rows, "vector": self.buffer}

    report = check(journal(Reusing, 2), 20)
    assert report.errors == ["vector: expected rows that stay as they are, got them overwritten"]


class Picture(DummyImageEnv):
    """One picture for ever: `value` of shape (H, W)."""

    def __init__(self, side, value):
        super().__init__(1, size=side)
        self.value = value

    def _observe(self):
        return {"image": np.full((1, self._size, self._size, 3), self.value, np.uint8)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: journal(Picture, 64, 9), "image: the same in every environment"),
        (lambda: journal(Picture, 64, 1), "image: values from 0 to 1; uint8 images reach 255"),
        (lambda: journal(Picture, 50, 9), "image: 50 x 50 is no multiple of 16 px"),
        (lambda: journal(Spoiled, put("reward", 0)), None),
        (lambda: journal(DummyEnv, 1, lengths=(99,)), "no episode ended"),
        (lambda: journal(Scaled, 1e5), "reward: largest size 3e.05; scale it"),
        (lambda: journal(Scaled, 1e-6), "reward: largest size 3e-06; scale it"),
        (lambda: journal(Scaled, 0.0), "reward: always 0"),
        (lambda: journal(Bounded, 2.0), "vector: outside its declared bounds 0 to 2"),
        (lambda: journal(Bounded, 99.0), None),
        (lambda: journal(FloatImage, 1), "vector: looks like a float image"),
    ],
)
def test_warnings(make, message):
    report = check(make(), 30)
    if message is None:
        assert report.warnings == []
        return
    assert not report.errors
    assert any(re.search(message, w) for w in report.warnings), report


class Scaled(DummyEnv):
    def __init__(self, scale):
        super().__init__(1)
        self.scale = scale

    def _reward(self, action):
        return self._count * self.scale


class Bounded(DummyEnv):
    def __init__(self, high):
        super().__init__(1)
        self.obs_bounds = {"vector": (np.zeros(3), np.full(3, high))}


class FloatImage(DummyEnv):
    def __init__(self, num_envs):
        super().__init__(num_envs)
        self.obs_space = {"vector": Space("vector", (16, 16, 3))}

    def _observe(self):
        rng = np.random.default_rng(self._count)
        return {"vector": rng.random((self.num_envs, 16, 16, 3), dtype=np.float32)}


def test_chance_is_a_warning():
    class Dice(DummyEnv):
        def _observe(self):
            return {"vector": np.random.default_rng().random((2, 3), dtype=np.float32)}

    report = check(journal(Dice, 2), 30)
    assert not report.errors and any("not restorable" in w for w in report.warnings)


def broken(num_envs):
    """A factory of environments that break the contract."""
    return Spoiled(put("reward", 1))


def test_exit_codes(capsys):
    assert check_env.main(["dummy", "--steps", "20", "--envs", "2"]) == 0
    assert "ok: 0 errors" in capsys.readouterr().out
    assert check_env.main([f"{__name__}:broken", "--steps", "20", "--envs", "2"]) == 1
    assert "error: reward: expected 0 where is_first" in capsys.readouterr().out
    assert check_env.main(["dumy"]) == 1
    assert "did you mean dummy" in capsys.readouterr().err
    options = ["--option", "size=(32, 32)", "--option", "length=7"]
    assert check_env.main(["dummy_image", "--steps", "9", *options]) == 0
    assert "(32, 32, 3)" in capsys.readouterr().out
    assert check_env.main(["dummy", "--option", "lengths"]) == 1
    assert "expected --option NAME=VALUE, got 'lengths'" in capsys.readouterr().err
    assert isinstance(broken(2), VecEnv)


def test_command_line():
    command = [sys.executable, "-m", "fastwm.check_env", "dummy", "--steps", "10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "episodes:" in done.stdout
