"""The modular recipe from the command line: train, resume, evaluate, play, diagnose."""

import json
import re

import numpy as np
import pytest
import torch
from test_replay_import import cartpole_data
from test_resume import assert_same_run, latest

import fastwm
from fastwm import diagnose, play, train
from fastwm import eval as evaluation

TINY = (
    "modular --envs 4 --batch_size 4 --batch_length 8 --train_ratio 8 --imagination_horizon 5 "
    "--world_model_warmup_steps 72 --openloop_every 3 --deterministic true --threads 1 "
    "--log.tensorboard false --log.every_s 0 --eval.every 0 --eval.episodes 1 --eval.envs 1 "
    "--log.every 32 --log.video_every 0 --checkpoint.every 80"
).split()


def argv(folder, task, steps, *more):
    return [*TINY, "--task", task, "--logdir", str(folder), "--steps", str(steps), *more]


MORE = {
    "cartpole": ["--representation.name", "gru", "--multi_step_loss_weight", "0.5"],
    "pendulum": ["--dynamics.name", "mlp_gauss", "--actor_updates_per_batch", "2"],
    "dummy_image": ["--log.video_every", "80", "--env.size", "64,64"]
    + ["--encoder.options.depths", "[4, 4, 4, 4]", "--decoder.options.depths", "[4, 4, 4, 4]"],
}


@pytest.mark.parametrize("task", MORE)
def test_stopped_and_resumed_equals_straight(tmp_path, task):
    """Stopped within the log interval in which the warm-up ended: schedule and sums go on too."""
    straight, two = tmp_path / "straight", tmp_path / "two"
    assert train.main(argv(straight, task, 128, *MORE[task])) == 0
    for steps in (80, 128):
        assert train.main(argv(two, task, steps, *MORE[task])) == 0
    config = [argv(folder, task, 128, *MORE[task]) for folder in (straight, two)]
    assert_same_run(straight, two, *config)
    assert latest(two)["updates"] > 10
    rows = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert "train/actor_loss" not in rows[1] and "train/actor_loss" in rows[-1]
    assert rows[-1]["model_loss"] == rows[-1]["train/world_model_loss"]
    if task == "dummy_image":
        assert list(two.glob("videos/*.gif"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("modular") / "run"
    assert train.main(argv(run, "cartpole", 80, "--eval.every", "80")) == 0
    return run


def test_eval_play_and_the_loaded_policy(finished, tmp_path, capsys):
    assert evaluation.main([str(finished), "--episodes", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 2 and 8 <= found["mean"] <= 500
    folder = tmp_path / "gifs"
    assert (
        play.main([str(finished), "--episodes", "1", "--save-gif", "--gif-dir", str(folder)]) == 0
    )
    assert len(list(folder.glob("*.gif"))) == 1
    policy = fastwm.load_policy(finished)
    action, state = policy({"vector": np.zeros((3, 4), np.float32)})
    assert action.shape == (3,) and set(state) == {"carry", "action"}
    policy({"vector": torch.zeros(3, 4)}, state)


def test_diagnose_reads_the_run(finished, capsys):
    assert diagnose.main([str(finished), "--all"]) == 0
    text = capsys.readouterr().out
    assert re.match(r"modular on cartpole: env_steps 80, updates \d+\n", text)
    assert re.search(r"^fine +numbers +0 updates skipped$", text, re.M)


def test_what_a_person_gets_wrong_is_one_line(tmp_path, capsys):
    cases = {
        "unknown key 'imagination_horizn'": ["--imagination_horizn", "5"],
        "dynamics.name: expected one of": ["--dynamics.name", "rssm"],
        "dynamics.options: expected options": ["--dynamics.options.units", "5"],
    }
    for words, more in cases.items():
        assert train.main(argv(tmp_path / "run", "cartpole", 8, *more)) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_example_runs_from_the_command_line(tmp_path):
    name = "examples.custom_component:GatedDynamics"
    more = ["--dynamics.name", name, "--dynamics.options.hidden", "16"]
    assert train.main(argv(tmp_path / "run", "cartpole", 80, *more)) == 0
    assert "GatedDynamics" in (tmp_path / "run" / "config.toml").read_text()
    fastwm.load_policy(tmp_path / "run")


def test_the_warm_up_ends_on_stored_episodes_too(tmp_path):
    (tmp_path / "data").mkdir()
    cartpole_data(tmp_path / "data")
    source = ["--offline_traindir", str(tmp_path / "data"), "--eval.every", "0"]
    assert train.main(argv(tmp_path / "run", "offline", 96, *source)) == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in rows]
    assert rows[0]["train/warmup_phase"] == 1 and "train/actor_loss" not in rows[0]
    assert rows[-1]["train/warmup_phase"] == 0 and "train/actor_loss" in rows[-1]


def test_a_run_keeps_its_components(finished, capsys):
    assert train.main(argv(finished, "cartpole", 96, "--dynamics.name", "mlp_gauss")) == 2
    assert "dynamics.name 'auto' -> 'mlp_gauss'" in capsys.readouterr().err
