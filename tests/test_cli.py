"""The command lines: what they print, write and return, and how they take mistakes."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastwm
from fastwm import assemble, checkpoint, play, train
from fastwm import eval as evaluation
from fastwm.config import ConfigError, load

DEBUG = (
    "dreamerv3 debug --log.tensorboard false --log.every_s 0 --threads 1 --steps 80 "
    "--eval.every 40 --eval.episodes 1 --checkpoint.every 40"
).split()


def python(*argv: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run; tests leave it as it is."""
    run = tmp_path_factory.mktemp("cli") / "run"
    assert train.main([*DEBUG, "--logdir", str(run)]) == 0
    return run


# ---- train


def test_train_says_what_a_person_wants_to_know(tmp_path, capsys):
    assert train.main([*DEBUG, "--logdir", str(tmp_path / "run"), "--steps", "8"]) == 0
    text = capsys.readouterr().out
    for part in (
        str(tmp_path / "run"),
        "cartpole: 4 envs",
        "cpu, 1 threads",
        "precision fp32",
        "backend",
        "parameters",
        "\nreplay   ",
        "RAM free",
        "0.25 updates per env_step (train_ratio 8",
    ):
        assert part in text, part


def test_train_leaves_a_complete_folder(finished):
    names = set(content(finished))
    assert {
        "config.toml",
        "metrics.jsonl",
        "checkpoint/latest.pt",
        "checkpoint/best.pt",
        "checkpoint/policy.pt",
    } <= names
    assert load([str(finished / "config.toml")])[0] == load([*DEBUG, "--logdir", str(finished)])[0]
    assert not [name for name in names if "tmp" in name]


def test_the_folder_name_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(["random", "debug", *DEBUG[2:], "--task", "gymnasium:CartPole-v1"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("random-gymnasium_CartPole-v1-20")


def test_two_runs_of_one_second_have_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assemble.time, "strftime", lambda form: "20260101-000000")
    folders = [assemble.run_folder(load(DEBUG)[0]) for _ in range(3)]
    assert [folder.name[-6:] for folder in folders] == ["000000", "0000-2", "0000-3"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assemble.run_folder(load([*DEBUG, "--logdir", "~/x"])[0]) == tmp_path / "x"


def test_a_run_goes_on_with_only_its_folder_named(finished, tmp_path, capsys):
    run = copy(finished, tmp_path)
    assert train.main(["--logdir", str(run), "--steps", "96", "--optim.lr", "1e-3"]) == 0
    text = capsys.readouterr().out
    assert "changed on resume: steps 80 -> 96" in text
    assert "changed on resume: optim.lr 4e-05 -> 0.001" in text
    assert "from env_steps 80" in text
    assert load([str(run / "config.toml")])[0].optim.lr == 1e-3


def test_the_policy_loads_with_the_public_name(finished):
    policy = fastwm.load_policy(finished)
    action, state = policy({"vector": torch.zeros(3, 4)})
    assert action.shape == (3,)
    policy({"vector": torch.zeros(3, 4)}, state)


@pytest.mark.parametrize(
    "module, argv, word",
    [
        ("train", ["--help", "retnorm"], "--retnorm.rate"),
        ("doctor", ["--help"], "installed"),
        ("selftest", ["--help"], "--device"),
        ("eval", ["--help"], "--episodes"),
        ("play", ["--help"], "--save-gif"),
    ],
)
def test_help_is_fast_and_needs_no_torch(module, argv, word):
    code = (
        f"import sys\nfrom fastwm import {module}\n"
        f"try: {module}.main({argv})\n"
        "except SystemExit: sys.exit(3 * ('torch' in sys.modules or 'numpy' in sys.modules))"
    )
    found = python("-c", code)
    assert found.returncode == 0 and word in found.stdout


# ---- eval and play


@pytest.mark.parametrize("checkpoint", ["best", "latest", "path"])
def test_eval_prints_and_writes_json(finished, tmp_path, capsys, checkpoint):
    run = copy(finished, tmp_path)
    path = str(run / "checkpoint" / "best.pt") if checkpoint == "path" else checkpoint
    argv = [str(run), "--episodes", "3", "--checkpoint", path, "--seed", "4"]
    before = content(run)
    assert evaluation.main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["n"] == 3 and result["seeds"] == [4] and result["mode"] == "greedy"
    assert {"mean", "std", "task", "checkpoint"} <= set(result)
    stored = json.loads((run / "eval.json").read_text())
    assert stored.keys() == result.keys()
    for key, value in stored.items():  # what is printed has six digits
        assert value == result[key] or f"{value:.6g}" == f"{result[key]:.6g}"
    assert all(len(f"{v}") <= 12 for v in result.values() if isinstance(v, float))
    after = content(run)
    after.pop("eval.json")
    assert after == before
    assert evaluation.main(argv) == 0
    assert json.loads(capsys.readouterr().out) == result


@pytest.mark.parametrize("command", [evaluation, play])
def test_evaluations_show_how_far_they_are(finished, tmp_path, capsys, monkeypatch, command):
    """On a terminal, on stderr, and nothing of it stays."""
    argv = [str(finished), "--episodes", "2"]
    argv += ["--output", str(tmp_path / "x.json")] if command is evaluation else []
    assert command.main(argv) == 0
    plain = capsys.readouterr()
    assert plain.err == ""  # a log file hears of it every 20 s
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("tqdm.std.time", itertools.count().__next__)  # a second a look
    assert command.main(argv) == 0
    shown = capsys.readouterr()
    assert shown.out == plain.out
    assert re.search(r"50% 1/2 episodes .* \d+ steps", shown.err)
    assert shown.err.endswith("\r") and "\n" not in shown.err


def test_eval_can_sample(finished, tmp_path, capsys):
    argv = [str(finished), "--episodes", "2", "--mode", "sample"]
    assert evaluation.main([*argv, "--output", str(tmp_path / "x.json")]) == 0
    assert json.loads((tmp_path / "x.json").read_text())["mode"] == "sample"


def test_play_films_every_episode(finished, tmp_path, capsys):
    from PIL import Image

    argv = [
        str(finished),
        "--episodes",
        "2",
        "--save-gif",
        "--gif-dir",
        str(tmp_path / "gif"),
        "--gif-fps",
        "20",
        "--action-mode",
        "sample",
    ]
    assert play.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for i, line in enumerate(lines):
        steps = int(line.split(", ")[1].split()[0])
        image = Image.open(tmp_path / "gif" / f"episode-00{i}.gif")
        assert image.size == (600, 400)
        durations = []  # Pillow joins equal pictures, and adds their times
        for frame in range(image.n_frames):
            image.seek(frame)
            durations.append(image.info["duration"])
        assert sum(durations) == 50 * (steps + 1)


@pytest.mark.parametrize(
    "argv, mode",
    [
        ([], "sample"),
        (["--action-mode"], "greedy"),
        (["--action-mode", "greedy"], "greedy"),
        (["--action-mode", "sample"], "sample"),
        (["--deterministic"], "greedy"),
    ],
)
def test_play_chooses_actions_as_told(finished, monkeypatch, argv, mode):
    seen = []

    def note(*args, mode, **options):
        seen.append(mode)
        return {"scores": [1.0], "lengths": [2]}

    monkeypatch.setattr("fastwm.loops.evaluate.evaluate", note)
    assert play.main(["--logdir", str(finished), *argv]) == 0
    assert seen == [mode]


@pytest.mark.parametrize(
    "argv, which",
    [
        ([], "best"),
        (["--use-best"], "best"),
        (["--use-best", "True"], "best"),
        (["--use-best", "False"], "latest"),
        (["--checkpoint", "latest"], "latest"),
    ],
)
def test_use_best_is_a_name_for_the_checkpoint(argv, which):
    args = play.options().parse_args(["run", *argv])
    assert args.checkpoint == which and (args.episodes, args.gif_fps) == (5, 20)
    with pytest.raises(SystemExit):
        play.options().parse_args(["run", "--use-best", "maybe"])


def test_the_folder_is_given_once(finished, capsys):
    for argv in ([], [str(finished), "--logdir", str(finished)]):
        with pytest.raises(SystemExit) as stop:
            play.main(argv)
        assert stop.value.code == 2 and "expected one run folder" in capsys.readouterr().err


def test_play_stops_after_max_steps(finished, capsys):
    assert play.main([str(finished), "--episodes", "2", "--max-steps", "3"]) == 0
    assert capsys.readouterr().out.count(", 3 steps") == 2


def test_play_without_gif_writes_nothing(finished, capsys):
    before = content(finished)
    assert play.main([str(finished), "--episodes", "1"]) == 0
    assert "episode 0: return" in capsys.readouterr().out
    assert content(finished) == before


def test_play_without_pictures_says_so(tmp_path, capsys):
    run = tmp_path / "run"
    train.main([*DEBUG, "--task", "dummy", "--steps", "8", "--logdir", str(run)])
    assert play.main([str(run), "--save-gif"]) == 2
    assert "expected pictures from dummy" in capsys.readouterr().err


# ---- once more as a person would


def test_the_verbs_run_as_modules(tmp_path):
    run = str(tmp_path / "run")
    found = python("-m", "fastwm.train", *DEBUG, "--steps", "16", "--logdir", run)
    assert found.returncode == 0, found.stderr
    found = python("-m", "fastwm.eval", run, "--episodes", "1")
    assert found.returncode == 0 and json.loads(found.stdout)["n"] == 1, found.stderr
    found = python("-m", "fastwm.play", run, "--episodes", "1", "--save-gif")
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "run" / "play" / "episode-000.gif").is_file()


# ---- mistakes: one clear line, exit code 2, nothing harmed


def copy(run: Path, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(run, folder / "copy"))


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--rssm.detr", "5"], ["unknown key 'rssm.detr'", "rssm.deter"]),
        (["--batch_size", "x"], ["batch_size: expected an integer, got 'x'"]),
        (["--task", "cartpol"], ["'cartpol'", "did you mean cartpole?"]),
        (["--task", "nothing.like:this"], ["nothing.like"]),
        (["--env.options.colour", "red"], ["colour"]),
        (["--env.action_repeat", "2", "--task", "dummy"], ["dummy: expected action_repeat of 1"]),
        (["--replay.capacity", "1e15"], ["replay", "GB"]),
        (["--task", "dummy_image", "--env.size", "50,50"], ["divisible by 16", "50x50"]),
        (["atari10k"], ["unknown preset 'atari10k'"]),
    ],
)
def test_bad_settings(tmp_path, capsys, argv, parts):
    run = tmp_path / "run"
    assert train.main([*DEBUG, *argv, "--logdir", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastwm.train: ") and len(error.splitlines()) == 1
    for part in parts:
        assert part in error
    assert not run.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_missing_device(tmp_path, capsys):
    assert train.main([*DEBUG, "--device", "cuda", "--logdir", str(tmp_path / "run")]) == 2
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_run_of_another_machine_is_evaluated_here(finished, tmp_path, capsys):
    run = copy(finished, tmp_path)
    stored = checkpoint.load(run / "checkpoint" / "best.pt")
    stored["config"] = stored["config"].replace('device = "cpu"', 'device = "cuda"')
    checkpoint.save(run / "checkpoint" / "best.pt", stored)
    assert evaluation.main([str(run), "--episodes", "1"]) == 2
    assert "--device cpu" in capsys.readouterr().err
    assert evaluation.main([str(run), "--episodes", "1", "--device", "cpu"]) == 0


def test_a_run_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert train.main([*DEBUG, "--logdir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "expected a folder to write to, got File exists" in error
    assert len(error.splitlines()) == 1 and (tmp_path / "run").read_text() == "mine"


def test_the_folder_of_another_configuration_is_refused_unharmed(finished, tmp_path, capsys):
    run = copy(finished, tmp_path)
    before = content(run)
    other = ["--rssm.deter", "32", "--optim.lr", "1", "--task", "pendulum"]
    assert train.main([*DEBUG, *other, "--logdir", str(run)]) == 2
    error = capsys.readouterr().err
    assert "task 'cartpole' -> 'pendulum', rssm.deter 16 -> 32" in error and "optim" not in error
    assert "another --logdir" in error
    assert train.main(["random", *DEBUG[1:], "--logdir", str(run)]) == 2
    assert content(run) == before


def test_a_folder_without_checkpoint_is_checked_too(finished, tmp_path, capsys):
    """Killed before its first checkpoint: its config.toml says what it is."""
    run = copy(finished, tmp_path)
    for path in (run / "checkpoint").iterdir():
        path.unlink()
    assert train.main([*DEBUG, "--rssm.deter", "32", "--logdir", str(run)]) == 2
    assert "rssm.deter 16 -> 32" in capsys.readouterr().err
    assert train.main([*DEBUG, "--logdir", str(run), "--steps", "8"]) == 0


def test_a_truncated_checkpoint_is_refused_unharmed(finished, tmp_path, capsys):
    run = copy(finished, tmp_path)
    path = run / "checkpoint" / "latest.pt"
    path.write_bytes(path.read_bytes()[:1000])
    before = content(run)
    assert train.main([*DEBUG, "--logdir", str(run)]) == 2
    error = capsys.readouterr().err
    assert "latest.pt is cut off or damaged" in error and len(error.splitlines()) == 1
    assert content(run) == before


def test_a_damaged_replay_is_refused_unharmed(finished, tmp_path, capsys):
    run = copy(finished, tmp_path)
    path = next((run / "replay").glob("rows-*"))
    path.write_bytes(path.read_bytes()[:-7])
    before = content(run)
    assert train.main([*DEBUG, "--logdir", str(run)]) == 2
    error = capsys.readouterr().err
    assert path.name in error and len(error.splitlines()) == 1
    assert content(run) == before


def test_eval_falls_back_with_a_word(finished, tmp_path, capsys):
    run = copy(finished, tmp_path)
    path = run / "checkpoint" / "best.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert evaluation.main([str(run), "--episodes", "1"]) == 0
    shown = capsys.readouterr()
    assert "best.pt is cut off" in shown.err and "latest.pt" in json.loads(shown.out)["checkpoint"]


@pytest.mark.parametrize("command", [evaluation, play])
def test_a_folder_that_is_no_run(tmp_path, capsys, command):
    assert command.main([str(tmp_path)]) == 2
    assert "expected a run folder" in capsys.readouterr().err
    assert command.main([str(tmp_path), "--checkpoint", str(tmp_path / "x.pt")]) == 2
    assert "found none" in capsys.readouterr().err


def test_a_policy_file_is_no_checkpoint(finished, capsys):
    path = str(finished / "checkpoint" / "policy.pt")
    assert evaluation.main([str(finished), "--checkpoint", path]) == 2
    assert "fastwm.load_policy" in capsys.readouterr().err


def test_errors_are_of_the_right_kind():
    assert issubclass(ConfigError, ValueError)
