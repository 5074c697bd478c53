"""TakeCover against envpool's own game, driven by hand."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastwm import envs
from fastwm.envs import envpool as adapter
from fastwm.envs.base import spread_seeds

try:
    envpool = adapter.load_envpool("test_takecover")
except envs.MissingPackageError as error:
    pytest.skip(str(error), allow_module_level=True)

from fastwm.envs.lanes import make_lanes  # noqa: E402
from fastwm.envs.vizdoom import LEFT, RIGHT, STAY, buttons, sandboxed  # noqa: E402

STEPS = 130  # whoever stays in place dies after about 95 tics


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Whatever Doom writes into the current folder shows up here."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert os.listdir(tmp_path) == []


def play(played, count=2, **options):
    with envs.make("takecover", count, seed=3, **options) as env:
        return [env.reset(), *(env.step(action) for action in played)]


def stay(count=2):
    return [np.zeros(count, np.int32)] * STEPS


def test_rows_are_those_of_the_game():
    """Same pictures, deaths are terminal, and every decision earns 1."""
    settings, folder = sandboxed("TakeCover-v1")
    pool = envpool.make_gymnasium(
        "TakeCover-v1",
        num_envs=2,
        seed=spread_seeds(3, 2),
        use_combined_action=True,
        frame_skip=1,
        stack_num=1,
        max_episode_steps=2100,
        img_width=64,
        img_height=77,
        **settings,
    )
    wanted = [(pool.reset()[0], np.zeros(2, bool))]
    wanted += [pool.step(action)[:3:2] for action in stay()]
    rows = play(stay())
    for t, (image, dead) in enumerate(wanted):
        assert (rows[t]["image"] == image[:, :, :64].transpose(0, 2, 3, 1)).all(), t
        assert (rows[t]["is_terminal"] == dead).all() and (rows[t]["is_last"] == dead).all(), t
        assert (rows[t]["reward"] == ~rows[t]["is_first"]).all(), t
    ends = np.array([row["is_last"] for row in rows])
    assert ends[:, 0].any()
    # No picture of the death exists: the last one is the one before.
    t = int(ends[:, 0].argmax())
    assert (rows[t]["image"][0] == rows[t - 1]["image"][0]).all()
    assert not (rows[t + 1]["image"][0] == rows[t]["image"][0]).all()
    del pool, folder


def test_time_limit_is_not_terminal():
    rows = play(stay()[:8], length=6)
    assert [bool(row["is_last"][0]) for row in rows] == [t in (6,) for t in range(9)]
    assert not any(row["is_terminal"].any() for row in rows)
    assert rows[7]["is_first"].all()


def test_thirds_of_the_interval_are_the_buttons():
    values = np.array([-1, -0.34, -0.33, 0, 0.33, 0.34, 1], np.float32)
    assert buttons(values).tolist() == [LEFT, LEFT, STAY, STAY, STAY, RIGHT, RIGHT]
    for button, value in ((STAY, 0.2), (RIGHT, 0.9), (LEFT, -0.9)):
        discrete = play([np.full(1, button, np.int32)] * 20, 1)
        continuous = play([np.full((1, 1), value, np.float32)] * 20, 1, actions="continuous")
        assert all(
            (a["image"] == b["image"]).all() for a, b in zip(discrete, continuous, strict=True)
        )


def test_right_moves_the_wall_to_the_left():
    """The brightest column of the far wall's row, seen from the two ends of the room."""
    edges = {}
    for button in (LEFT, RIGHT):
        image = play([np.full(1, button, np.int32)] * 60, 1)[-1]["image"][0].astype(float)
        row = image[34].mean(-1)  # brick, between floor and ceiling
        edges[button] = row[:8].mean() - row[-8:].mean()  # a near side wall is darker or brighter
    still = play([np.zeros(1, np.int32)] * 2, 1)[-1]["image"][0][34].mean(-1)
    assert abs(still[:8].mean() - still[-8:].mean()) < 10
    assert edges[LEFT] * edges[RIGHT] < 0


def test_repeated_actions_sum_the_tics():
    once, twice = play(stay()), play(stay()[:60], action_repeat=2)
    lengths = [int(np.argmax([row["is_last"][0] for row in rows])) for rows in (once, twice)]
    assert lengths[1] == -(-lengths[0] // 2)
    assert sum(row["reward"][0] for row in twice[: lengths[1] + 1]) == lengths[0]


def test_sizes():
    rows = play([], size=(32, 48), gray=True)
    assert rows[0]["image"].shape == (2, 32, 48, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"actions": "both"}, "expected actions to be 'discrete' or 'continuous', got 'both'"),
        ({"length": 0}, "expected length of at least 1 tic, got 0"),
        ({"frame_skip": 4}, "expected one of the options .* got 'frame_skip'"),
    ],
)
def test_options(options, message):
    with pytest.raises(envs.EnvOptionError, match=message):
        envs.make("takecover", 1, **options)


def test_the_folder_of_doom_goes_with_the_environments():
    env = envs.make("takecover", 2)
    folder = env.env._folder.name
    env.reset()
    # Each Doom writes into its own: two that create one folder at the same time crash.
    assert len(list(Path(folder).glob("*/_vizdoom"))) == 2
    env.close()
    gc.collect()
    time.sleep(0.1)
    assert not os.path.isdir(folder)


def test_leaving_without_close_is_silent():
    """Doom saves its settings when it ends, so its folder must go last."""
    code = "from fastwm import envs; env = envs.make('takecover', 1); env.reset()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_lanes_with_equal_seeds_play_the_same_game():
    lanes = make_lanes("takecover", [5, 5, 6], actions="continuous")
    assert lanes.common
    first = lanes.reset()["image"]
    ended = False
    for _ in range(110):
        lanes.send(np.zeros((2, 1), np.float32), np.array([1, 2]))
        rows = lanes.receive()
        if rows["is_last"][0]:
            ended = True
            break
        assert rows["reward"].tolist() == [1, 1]
    assert ended and rows["is_terminal"][0]
    lanes.close()
    pair = make_lanes("takecover", [5, 5, 6], actions="continuous")
    assert (pair.reset()["image"] == first).all()
    different = False
    for _ in range(60):
        pair.send(np.zeros((3, 1), np.float32), np.arange(3))
        image = pair.receive()["image"]
        assert (image[0] == image[1]).all()
        different |= bool((image[0] != image[2]).any())
    assert different
    pair.close()
