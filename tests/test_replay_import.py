"""Stored episodes of other programs: the action shift, both formats, training on them alone."""

import numpy as np
import pytest

from fastwm import checkpoint, data, train
from fastwm.checkpoint_partial import load_weights
from fastwm.envs.dummy import DummyEnv
from fastwm.replay import Replay
from fastwm.replay_import import DataError, Folder, episodes, fill, read, write_episode
from fastwm.spaces import Space

OBS = {"vector": Space("vector", (3,))}
ACT = Space("discrete", (), (2,))
SPEC = {name: ((), "bool") for name in ("is_first", "is_last", "is_terminal")}
SPEC |= {"action": ((), "int32"), "reward": ((), "float32"), "vector": ((3,), "float32")}
QUIET = (
    "dreamerv3 debug --log.every_s 0 --log.tensorboard false --threads 1 --log.every 20 ".split()
)


def nm_episode(folder, name, length, terminal=True):
    """As dreamerv3-torch stores it: `action` led to the row; the first one is zeros."""
    action = np.eye(2, dtype=np.float32)[np.arange(length) % 2]
    action[0] = 0
    flags = {"is_first": np.arange(length) == 0, "is_terminal": np.arange(length) == length - 1}
    np.savez_compressed(
        folder / f"{name}-{length}.npz",
        vector=np.arange(3 * length, dtype=np.float64).reshape(length, 3),
        reward=np.arange(length, dtype=np.float32),
        discount=np.ones(length, np.float32) - (flags["is_terminal"] & terminal),
        is_first=flags["is_first"],
        is_terminal=flags["is_terminal"] & terminal,
        action=action,
        logprob=np.zeros(length),
    )


def chunk(folder, name, rows, **more):
    """As danijar/dreamerv3 stores it: `action` was taken after the row."""
    np.savez_compressed(folder / f"{name}-{len(rows['reward'])}.npz", **rows, **more)


def stream(start, stop):
    t = np.arange(start, stop)
    return {
        "vector": np.stack([t, t, t], 1).astype(np.float32),
        "reward": t.astype(np.float32),
        "is_first": t % 5 == 0,
        "is_last": t % 5 == 4,
        "is_terminal": t % 10 == 4,
        "action": (t % 2).astype(np.int32),
    }


def test_the_previous_action_is_shifted(tmp_path):
    """Stored with row t is the action that led to it; the replay wants the one taken after."""
    nm_episode(tmp_path, "20260101T000000-abc", 4)
    (rows,) = Folder(tmp_path).pieces(OBS, ACT)
    assert rows["action"].tolist() == [1, 0, 1, 0]  # stored: -, 1, 0, 1; the last row has none
    assert rows["action"].dtype == np.int32
    assert rows["is_last"].tolist() == rows["is_terminal"].tolist() == [False] * 3 + [True]
    assert rows["reward"].tolist() == [0, 1, 2, 3] and rows["vector"].dtype == np.float32


def test_a_stored_time_limit_is_no_death(tmp_path):
    nm_episode(tmp_path, "20260101T000000-abc", 4, terminal=False)
    (rows,) = Folder(tmp_path).pieces(OBS, ACT)
    assert rows["is_last"][-1] and not rows["is_terminal"].any()


def test_continuous_actions_are_shifted_too(tmp_path):
    action = np.array([[0, 0], [0.1, 0.2], [0.3, 0.4]], np.float32)
    stored = {"vector": np.zeros((3, 3)), "reward": np.zeros(3), "action": action}
    np.savez(tmp_path / "t-a-3.npz", **stored)
    rows = read(tmp_path / "t-a-3.npz", OBS, Space("continuous", (2,)))
    np.testing.assert_array_equal(rows["action"], np.float32([[0.1, 0.2], [0.3, 0.4], [0, 0]]))


def test_chunks_follow_their_successors_and_keep_their_actions(tmp_path):
    chunk(tmp_path, "20260101T2-second-third", stream(5, 9))
    chunk(tmp_path, "20260101T9-first-second", stream(2, 5))  # later, but first in the chain
    chunk(tmp_path, "20260101T1-third-0000", stream(9, 12), stepid=np.zeros((3, 20), np.uint8))
    chunk(tmp_path, "20260101T3-lone-0000", stream(11, 13))
    folder = Folder(tmp_path)
    pieces = list(folder.pieces(OBS, ACT))
    assert folder.rows == 12
    joined = sorted([p["reward"].tolist() for p in pieces], key=lambda p: (p[0] == 11, p[0]))
    assert joined == [[2, 3, 4], [5, 6, 7, 8], [9, 10, 11], [11, 12]]
    order = [p["reward"][0] for p in pieces if p["reward"][0] != 11]
    assert order == sorted(order)
    first = next(p for p in pieces if p["reward"][0] == 2)
    assert first["is_first"].tolist() == [True, False, False]  # what came before is not there
    assert first["action"].tolist() == [0, 1, 0]  # unshifted; row 4 is a last one
    inner = next(p for p in pieces if p["reward"][0] == 9)
    assert not inner["is_first"][0] and inner["action"][0] == 0 and inner["is_first"][1]


@pytest.mark.parametrize(
    "rows, parts",
    [
        ({"vector": np.zeros((2, 4)), "action": np.zeros(2, int)}, ["vector", "(L, *(3,))"]),
        ({"other": np.zeros((2, 3)), "action": np.zeros(2, int)}, ["missing ['vector']"]),
        ({"vector": np.zeros((2, 3)), "action": np.zeros((2, 5))}, ["discrete", "(2,) classes"]),
        ({"vector": np.zeros((2, 3)), "action": np.zeros(3, int)}, ["equally many rewards"]),
        ({"vector": np.zeros((2, 3))}, ["equally many rewards"]),
    ],
)
def test_bad_files_are_named(tmp_path, rows, parts):
    np.savez(tmp_path / "t-a-2.npz", reward=np.zeros(2), **rows)
    with pytest.raises(DataError) as error:
        read(tmp_path / "t-a-2.npz", OBS, ACT)
    for part in (*parts, "t-a-2.npz"):
        assert part in str(error.value)


def test_folders_without_episodes(tmp_path):
    with pytest.raises(DataError, match="expected a folder with files"):
        Folder(tmp_path)
    (tmp_path / "t-a-2.npz").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match="readable npz"):
        read(tmp_path / "t-a-2.npz", OBS, ACT)


def test_out_and_in_again(tmp_path):
    """What the replay holds comes back bit for bit, but for the unfinished last episodes."""
    env, replay = DummyEnv(2, 0), Replay(SPEC, 2, 40, 4)
    rows, rng = env.reset(), np.random.default_rng(0)
    for _ in range(15):
        action = rng.integers(0, 2, 2).astype(np.int32)
        stored = np.where(rows["is_last"], 0, action).astype(np.int32)
        replay.add({**rows, "action": stored})
        rows = env.step(action)
    whole = list(episodes(replay))
    for number, episode in enumerate(whole):
        write_episode(tmp_path, number, episode, ACT)
    back = list(Folder(tmp_path).pieces(OBS, ACT))
    assert len(back) == len(whole) > 4
    for old, new in zip(whole, back, strict=True):
        assert set(old) == set(new)
        for name in old:
            np.testing.assert_array_equal(old[name], new[name])
    other = Replay(SPEC, 1, sum(len(e["reward"]) for e in whole), 4)
    for piece in back:
        fill(other, piece)
    assert len(other) == Folder(tmp_path).rows
    batch = other.sample(2, online=False)
    env_of, row = batch["ids"][0].tolist()
    assert env_of == 0
    actions = np.concatenate([piece["action"] for piece in back])
    assert batch["prev_action"][0].tolist() == actions[row - 1 : row + 3].tolist()
    with pytest.raises(DataError, match="at most 0 more rows"):
        fill(other, back[0])


def test_spaces_from_the_data_alone(tmp_path):
    nm_episode(tmp_path, "t-a", 4)
    assert Folder(tmp_path).spaces() == (OBS, ACT)
    stored = {"image": np.zeros((3, 8, 8, 3), np.uint8), "reward": np.zeros(3)}
    other = tmp_path / "other"
    other.mkdir()
    chunk(
        other, "t-a-b", {**stored, "action": np.int32([0, 4, 1])}, **{"dyn/deter": np.zeros((3, 2))}
    )
    found = Folder(other).spaces()
    assert found == ({"image": Space("image", (8, 8, 3))}, Space("discrete", (), (5,)))


# ---- training


def cartpole_data(folder, count=4):
    rng = np.random.default_rng(0)
    for number in range(count):
        length = 20
        action = np.eye(2, dtype=np.float32)[rng.integers(0, 2, length)]
        action[0] = 0
        np.savez(
            folder / f"t{number}-a-{length}.npz",
            vector=rng.normal(size=(length, 4)),
            reward=np.ones(length, np.float32),
            is_first=np.arange(length) == 0,
            is_terminal=np.arange(length) == length - 1,
            action=action,
        )


@pytest.mark.parametrize("task", ["cartpole", "offline"])
def test_training_on_episodes_alone(tmp_path, task, capsys):
    source, run = tmp_path / "data", tmp_path / "run"
    source.mkdir()
    cartpole_data(source)
    argv = [*QUIET, "--task", task, "--offline_traindir", str(source), "--logdir", str(run)]
    argv += ["--eval.every", "40", "--eval.episodes", "1"]
    assert train.main([*argv, "--steps", "40"]) == 0
    text = capsys.readouterr().out
    assert "80 rows in 4 files" in text and ("evaluation" in text) == (task == "cartpole")
    lines = (run / "metrics.jsonl").read_text()
    assert '"train/loss/recon/vector"' in lines and '"replay/rows": 80' in lines
    stored = checkpoint.load(run / "checkpoint" / "latest.pt")
    assert stored["updates"] == 10
    assert train.main([*argv, "--steps", "80"]) == 0  # goes on
    assert "from env_steps 40, updates 10" in capsys.readouterr().out
    assert checkpoint.load(run / "checkpoint" / "latest.pt")["updates"] == 20


def test_offline_mistakes(tmp_path, capsys):
    run = ["--logdir", str(tmp_path / "run")]
    assert train.main([*QUIET, "--offline", str(tmp_path), *run]) == 2
    assert "expected a folder with files" in capsys.readouterr().err
    cartpole_data(tmp_path, 1)
    argv = [*QUIET, "--offline", str(tmp_path), *run]
    assert train.main([*argv, "--batch_length", "30"]) == 2
    assert "offline_traindir: " in capsys.readouterr().err
    assert train.main([*argv, "--task", "pendulum"]) == 2
    assert "episodes: expected vector of shape" in capsys.readouterr().err
    assert train.main(["random", *argv[1:]]) == 2
    assert "expected an algorithm that learns" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_shows_and_exports(tmp_path, capsys):
    run, folder = tmp_path / "run", tmp_path / "data"
    argv = [*QUIET, "--steps", "200", "--train_ratio", "0", "--eval.every", "0"]
    assert train.main([*argv, "--logdir", str(run)]) == 0
    assert data.main(["export", str(run), str(folder)]) == 0
    files = list(folder.glob("*.npz"))
    assert f"wrote {len(files)} episodes" in capsys.readouterr().out and len(files) > 2
    assert data.main(["show", str(folder)]) == 0
    text = capsys.readouterr().out
    assert f"{len(files)} whole episodes" in text and "action: discrete (2,)" in text
    assert "vector: vector (4,)" in text
    assert data.main(["show", str(tmp_path)]) == 2
    assert data.main(["export", str(tmp_path), str(folder)]) == 2
    assert "fastwm.data: " in capsys.readouterr().err


# ---- weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("weights") / "run"
    argv = [*QUIET, "--steps", "8", "--eval.every", "0", "--logdir", str(run)]
    assert train.main([*argv, "--seed", "5"]) == 0
    return run


def agent_of(*more):
    from fastwm import config
    from fastwm.agents.dreamer import DreamerAgent

    settings = config.load([*QUIET, *more])[0]
    return DreamerAgent({"vector": Space("vector", (4,))}, ACT, settings, seed=1)


def test_weights_by_regex(trained):
    agent = agent_of()
    before = {name: value.clone() for name, value in agent.model.state_dict().items()}
    lines = load_weights(agent.model, trained, r"^world\.rssm")
    theirs = checkpoint.load(trained / "checkpoint" / "latest.pt")["agent"]["model"]
    changed = set()
    for name, value in agent.model.state_dict().items():
        if name.startswith("world.rssm"):
            assert value.equal(theirs[name])
            changed.add(name)
        else:
            assert value.equal(before[name])
    assert f"weights  {len(changed)} of {len(before)} tensors" in lines[0]
    assert f"{len(before) - len(changed)} kept new" in lines[1]


def test_weights_of_other_shapes_stay_new(trained):
    lines = load_weights(agent_of("--actor.units", "16").model, trained)
    (line,) = [line for line in lines if "of another shape" in line]
    assert "actor." in line


def test_no_weights_is_an_error(trained):
    with pytest.raises(checkpoint.CheckpointError, match="got none"):
        load_weights(agent_of().model, trained, "nothing_like_it")
    with pytest.raises(checkpoint.CheckpointError, match="regular expression"):
        load_weights(agent_of().model, trained, "(")


def test_a_run_starts_from_weights_once(trained, tmp_path, capsys):
    argv = [*QUIET, "--from_checkpoint", str(trained), "--from_checkpoint_regex", "actor"]
    argv += ["--eval.every", "0", "--logdir", str(tmp_path / "run")]
    assert train.main([*argv, "--steps", "8"]) == 0
    assert "weights  " in capsys.readouterr().out
    assert train.main([*argv, "--steps", "16"]) == 0
    assert "weights  " not in capsys.readouterr().out
    other = ["--from_checkpoint", str(tmp_path), "--logdir", str(tmp_path / "other")]
    assert train.main([*QUIET, *other]) == 2
    assert "expected a run folder with checkpoint/latest.pt" in capsys.readouterr().err
