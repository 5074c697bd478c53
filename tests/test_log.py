"""What a run writes: rows, names, shares, pictures; and where it goes on after a restart."""

import io
import json
import math
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fastwm import log as log_module
from fastwm.log import SECTIONS, SHORT, Logger, Mean, Stopwatch, gif


def rows(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def logger(run, **options) -> Logger:
    return Logger(run, **{"steps": 100, "every_s": 0, "tensorboard": False} | options)


def test_mean_is_the_mean_since_the_last_read():
    mean = Mean()
    assert mean.read() == {}
    for value in (1.0, 2.0, 6.0):
        mean.add({"a": torch.tensor(value), "flag": torch.tensor(value > 1), "n": torch.tensor(3)})
    assert mean.read() == {"a": 3.0, "flag": pytest.approx(2 / 3), "n": 3.0}
    mean.add({"a": torch.tensor(5.0)})
    assert mean.read() == {"a": 5.0}


def test_mean_keeps_nothing_of_the_tensors_it_saw():
    """An agent may reuse its metric buffers."""
    mean, buffer = Mean(), torch.tensor(1.0)
    mean.add({"a": buffer})
    buffer.fill_(9.0)
    mean.add({"a": buffer})
    assert mean.read() == {"a": 5.0} and buffer == 9.0


def test_mean_resumes():
    mean, again = Mean(), Mean()
    mean.add({"a": torch.tensor(1.0)})
    again.load_state_dict(mean.state_dict())
    again.add({"a": torch.tensor(2.0)})
    assert again.read() == {"a": 1.5}
    assert mean.read() == {"a": 1.0}


def test_time_shares_sum_to_one():
    watch = Stopwatch()
    with watch("env"):
        time.sleep(0.02)
    with watch("learner"):
        time.sleep(0.04)
    time.sleep(0.02)
    seconds, shares = watch.read()
    assert set(shares) == {*SECTIONS, "other"}
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-6)
    assert shares["learner"] > shares["env"] > 0 and shares["other"] > 0
    assert seconds >= 0.08
    assert watch.read()[1]["learner"] == 0.0


def test_a_row_has_everything(tmp_path):
    log = logger(tmp_path, action_repeat=4, batch_rows=8)
    log.train.add(
        {
            "loss/policy": torch.tensor(2.0),
            "loss/recon/image": torch.tensor(3.0),
            "loss/recon/vector": torch.tensor(1.0),
            "loss/dyn": torch.tensor(1.5),
        }
    )
    log.ended([10.0], [5])
    log.ended([20.0], [7])
    log.set({"eval/return": 300.0, "replay/rows": 64})
    log.write(10, 2)
    log.write(20, 4)
    first, second = rows(tmp_path)
    assert (first["env_steps"], first["updates"], first["frames"]) == (10, 2, 40)
    assert first["train/loss/policy"] == first["actor_loss"] == 2.0
    assert first["model_loss"] == 5.5 and first["kl_divergence"] == 1.5
    assert first["episode/score"] == 15.0 and first["episode/score_max"] == 20.0
    assert first["episode/length"] == 6.0 and first["episode/count"] == 2
    assert first["eval_return"] == 300.0
    assert sum(v for k, v in first.items() if "share_" in k) == pytest.approx(1.0, abs=0.01)
    assert second["speed/updates_per_env_step"] == 0.2
    assert second["speed/rows_per_s"] == pytest.approx(8 * second["speed/updates_per_s"], rel=1e-4)
    assert "episode/score" not in second and "eval/return" not in second


def test_what_json_cannot_say_is_null(tmp_path):
    log = logger(tmp_path)
    log.set({"a": math.nan, "b": math.inf, "c": 1 / 3})
    log.write(1, 0)
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row["a"] is None and row["b"] is None and row["c"] == 0.333333


def test_deterministic_rows_hold_no_times(tmp_path):
    log = logger(tmp_path, deterministic=True)
    log.write(10, 1)
    assert not [name for name in rows(tmp_path)[0] if name.startswith("speed/")]


def test_resume_cuts_off_what_came_after(tmp_path):
    log = logger(tmp_path, deterministic=True)
    log.write(10, 1)
    log.ended([5.0], [5])
    log.train.add({"a": torch.tensor(1.0)})
    state = log.state_dict()
    log.write(20, 2)
    log.write(30, 3)
    expected = (tmp_path / "metrics.jsonl").read_bytes()
    log.close()
    again = logger(tmp_path, deterministic=True, resume=state)
    assert len(rows(tmp_path)) == 1
    again.write(20, 2)
    again.write(30, 3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == expected


def test_a_half_written_line_is_cut_off_too(tmp_path):
    log = logger(tmp_path)
    log.write(10, 1)
    state = log.state_dict()
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"env_steps": 2')
    logger(tmp_path, resume=state).write(20, 2)
    assert [row["env_steps"] for row in rows(tmp_path)] == [10, 20]


def test_a_new_run_starts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    logger(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_gif_keeps_every_frame_and_the_speed():
    frames = np.zeros((5, 12, 20, 3), np.uint8)
    for i in range(5):
        frames[i, :, 4 * i : 4 * i + 4] = (250, 10 * i, 0)
    image = Image.open(io.BytesIO(gif(frames, fps=10)))
    assert image.n_frames == 5 and image.size == (20, 12)
    assert image.info["duration"] == 100 and image.info["loop"] == 0
    for i in range(5):
        image.seek(i)
        shown = np.asarray(image.convert("RGB")).astype(int)
        assert np.abs(shown - frames[i]).max() < 20


def test_gif_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one frame"):
        gif([])


def test_tensorboard_has_scalars_short_names_and_video(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = logger(tmp_path, tensorboard=True)
    log.set({"eval/return": 3.0})
    log.write(10, 1)
    frames = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), dtype=np.uint8)
    path = log.video("train_openl/image", frames, 10)
    other = log.picture("train_openl/top", frames[0], 10)
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.arange(3.0)
    log.histograms([("net.weight", weight), ("net.bias", torch.zeros(2))], 10)
    log.close()
    assert path == tmp_path / "videos" / "train_openl_image-000000010.gif"
    assert other.name == "train_openl_top-000000010.png"
    found = events.EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    tags = found.Tags()
    assert {"eval/return", "eval_return", "speed/env_steps_per_s"} <= set(tags["scalars"])
    assert found.Scalars("eval_return")[0].step == 10
    assert found.Images("train_openl")[0].encoded_image_string == path.read_bytes()
    assert found.Images("train_openl/top/strip")[0].encoded_image_string == other.read_bytes()
    histograms = {"weight/net/weight", "gradient/net/weight", "weight/net/bias"}
    assert set(tags["histograms"]) == histograms
    assert found.Histograms("gradient/net/weight")[0].histogram_value.max == 2.0


def test_tensorboard_gets_the_newest_of_rows_that_follow_close(tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    now = [100.0]
    log = logger(tmp_path, tensorboard=True)
    monkeypatch.setattr(log_module.time, "perf_counter", lambda: now[0])

    def write(step, **values):
        log.set({f"episode/{name}": value for name, value in values.items()})
        log.write(step, 0)
        now[0] += 0.06

    for step in range(1, 6):
        write(step, score=step, **({"length": 7.0} if step == 3 else {}))
    log.set({"eval/return": 9.0})
    write(6, score=6)
    write(7, score=7)
    log.state_dict()
    write(8, score=8)
    log.close()
    found = events.EventAccumulator(str(tmp_path)).Reload()
    tags = found.Tags()["scalars"]
    points = {tag: [(point.step, point.value) for point in found.Scalars(tag)] for tag in tags}
    assert points["episode/score"] == [(n, float(n)) for n in (1, 5, 6, 7, 8)]
    assert points["episode/length"] == [(5, 7.0)], "of a row that was not drawn"
    assert points["eval/return"] == [(6, 9.0)]
    assert [row["env_steps"] for row in rows(tmp_path)] == list(range(1, 9))


def test_missing_tensorboard_warns_once_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.warns(UserWarning, match="pip install tensorboard"):
        log = logger(tmp_path, tensorboard=True)
    log.write(1, 0)
    assert len(rows(tmp_path)) == 1


def test_the_bar_tells_what_matters(tmp_path, capsys):
    log = logger(tmp_path, every_s=0.001)
    log.ended([12.5], [3])
    with log.time("learner"):
        time.sleep(0.01)
    log.write(50, 5)
    time.sleep(0.01)
    log.bar.mininterval = 0
    log.tick(50, 5)
    log.bar.refresh()
    text = capsys.readouterr().err
    for part in ("50%", "ETA", "updates 5 (0.1 per env_step)", "return 12.5", "learner"):
        assert part in text
    log.close()


def test_a_file_gets_whole_lines_and_keeps_the_end(tmp_path, capfd):
    """Neither carriage returns nor the bar again with every message; the end stays known."""
    log = logger(tmp_path, every_s=0.001)
    log.say("hello")
    log.bar.mininterval = 0
    time.sleep(0.01)
    log.tick(50, 5)
    log.say("there")
    log.tick(log.steps + 7, 9)
    log.close()
    out, err = capfd.readouterr()
    assert out == "hello\nthere\n"
    lines = err.splitlines()
    assert "\r" not in err and all("ETA" in line for line in lines) and "50%" in lines[0]
    assert "100%" in lines[-1] and "?" not in lines[-1].split("env_steps")[0]


def test_short_names_are_those_that_readers_look_for():
    promised = {"eval_return", "model_loss", "actor_loss", "value_loss", "kl_divergence"}
    assert set(SHORT) >= promised | {"train_return", "train_length", "eval_length"}
