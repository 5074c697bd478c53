"""`--profile N`: a trace of N updates in the run folder."""

import json

import torch

from fastwm import train
from fastwm.loops.profile import WARMUP, gpu_busy

RUN = "dreamerv3 debug --log.tensorboard false --log.every_s 0 --threads 1 --eval.every 0 ".split()
UPDATES = 3


def test_trace_holds_as_many_updates_as_asked(tmp_path, capsys):
    more = ["--steps", "160", "--train_ratio", "64", "--checkpoint.every", "0"]
    logdir = ["--logdir", str(tmp_path / "run")]
    assert train.main([*RUN, *more, *logdir, "--profile", str(UPDATES)]) == 0
    events = json.loads((tmp_path / "run/profile/trace.json").read_text())["traceEvents"]
    names = [event.get("name", "") for event in events]
    steps = [name for name in names if "laprop_agc_" in name or "_foreach_norm" in name]
    assert len(steps) == UPDATES
    assert "Self CPU" in (tmp_path / "run/profile/summary.txt").read_text()
    assert f"{UPDATES} updates" in capsys.readouterr().out


def test_short_run_writes_what_there_is(tmp_path, capsys):
    more = ["--steps", "160", "--train_ratio", "64", "--checkpoint.every", "0"]
    logdir = ["--logdir", str(tmp_path / "run")]
    assert train.main([*RUN, *more, *logdir, "--profile", "1000000"]) == 0
    assert (tmp_path / "run/profile/trace.json").stat().st_size > 1000
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["updates"] > WARMUP


def test_a_cpu_is_no_gpu():
    assert gpu_busy(torch.device("cpu")) == {}
