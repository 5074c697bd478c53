"""Checkpoints: complete or absent, never half; damage is named and nothing is made worse."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from trees import same

from fastwm import checkpoint
from fastwm.checkpoint import CheckpointError

PARTS = {
    "agent": {
        "weight": torch.arange(6.0).reshape(2, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
    },
    "rows": {
        "image": np.arange(8, dtype=np.uint8).reshape(2, 2, 2),
        "last": np.array([True, False]),
    },
    "counters": {"env_steps": 3, "best": -np.inf, "score": np.float64(1.5)},
    "list": [1, (2, None), "text", 2**70, np.zeros((2, 0), np.float32)],
}


def test_reads_what_it_wrote(tmp_path):
    checkpoint.save(tmp_path / "new" / "x.pt", PARTS)
    expected = {**PARTS, "counters": {**PARTS["counters"], "score": 1.5}}
    same(checkpoint.load(tmp_path / "new" / "x.pt"), expected)
    assert os.listdir(tmp_path / "new") == ["x.pt"]


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_one_clear_error_and_stays(tmp_path, keep):
    path = tmp_path / "latest.pt"
    checkpoint.save(path, PARTS)
    data = path.read_bytes()
    cut = data[: int(keep if keep >= 1 else keep * len(data))]
    path.write_bytes(cut)
    with pytest.raises(CheckpointError, match="latest.pt is cut off or damaged") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == cut


def test_flipped_bits_are_noticed(tmp_path):
    path = tmp_path / "latest.pt"
    checkpoint.save(path, {"weight": torch.arange(4096.0)})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"x": Evil()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match="found none"):
        checkpoint.load(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="expected a run folder"):
        checkpoint.load_any(tmp_path, "best")


def test_a_damaged_best_falls_back_to_latest(tmp_path):
    folder = tmp_path / "checkpoint"
    checkpoint.save(folder / "latest.pt", {"name": "latest"})
    (folder / "best.pt").write_bytes(b"not a checkpoint")
    parts, path, troubles = checkpoint.load_any(tmp_path, "best")
    assert parts == {"name": "latest"} and path.name == "latest.pt"
    assert len(troubles) == 1 and "best.pt is cut off or damaged" in troubles[0]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "latest.pt"
    checkpoint.save(path, {"x": 1})
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(path, {"x": lambda: None})
    assert checkpoint.load(path) == {"x": 1} and os.listdir(tmp_path) == ["latest.pt"]


def test_compare_refuses_what_cannot_change():
    changes = [("optim.lr", 1.0, 2.0, False), ("rssm.deter", 8, 16, True), ("task", "a", "b", True)]
    with pytest.raises(CheckpointError, match=r"rssm.deter 8 -> 16, task 'a' -> 'b'"):
        checkpoint.compare(changes, checkpoint.Path("run"))
    notes = checkpoint.compare(changes[:1], checkpoint.Path("run"))
    assert notes == ["changed on resume: optim.lr 1.0 -> 2.0"]


def test_a_folder_in_use_is_refused(tmp_path):
    code = (
        "import sys, pathlib\nfrom fastwm import checkpoint\n"
        "with checkpoint.lock(pathlib.Path(sys.argv[1])): print('mine')"
    )
    run = tmp_path / "run"
    with checkpoint.lock(run):
        (run / "something").touch()
        found = subprocess.run([sys.executable, "-c", code, run], capture_output=True, text=True)
        assert "in use by another process" in found.stderr
    found = subprocess.run([sys.executable, "-c", code, run], capture_output=True, text=True)
    assert found.stdout == "mine\n"


def test_a_folder_that_stays_empty_is_removed(tmp_path):
    with checkpoint.lock(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
