"""Memory announced and refused; saving, loading, damage, and being killed while saving."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from replay_model import BACKENDS, choose, filled, rows_of, spec

from fastwm import replay_io
from fastwm.replay import Replay

HERE = Path(__file__).resolve().parent


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    choose(monkeypatch, request.param)
    return request.param


def train(replay, times):
    """Add, sample and write back, as a learner does; returns what was sampled."""
    seen = []
    for moment in times:
        envs = range(replay.num_envs)
        replay.add(rows_of(envs, [moment] * replay.num_envs))
        if replay.can_sample(3):
            batch = replay.sample(3)
            rng = np.random.default_rng(moment)
            deter = rng.normal(size=(3, replay.batch_length, 5)).astype(np.float32)
            stoch = rng.integers(0, 200, (3, replay.batch_length, 2)).astype(np.uint8)
            replay.update_latents(batch["ids"], torch.as_tensor(deter), torch.as_tensor(stoch))
            seen.append(batch)
    return seen


def same_batches(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
        for x, y in zip(a, b, strict=True)
    )


def manifest_of(replay, directory):
    """As a checkpoint would keep it."""
    return json.loads(json.dumps(replay.save(directory)))


@pytest.mark.parametrize("rows", [0, 3, 11, 12, 13, 40])
@pytest.mark.parametrize("storage", ["ram", "mmap", "cuda"])
def test_a_loaded_replay_goes_on_bit_for_bit(backend, tmp_path, rows, storage):
    """Content, write cursor, online queue, generator, totals, at every fill of the ring."""
    where = {"storage": storage, "device": "cpu"}
    replay = Replay(spec(), 3, 36, 4, seed=1, directory=tmp_path / "a", **where)
    train(replay, range(rows))
    manifest = manifest_of(replay, tmp_path / "saved")
    again = Replay(spec(), 3, 36, 4, seed=99, directory=tmp_path / "b", **where)
    again.load(tmp_path / "saved", manifest)
    assert again.stats() == replay.stats()
    expected, got = train(replay, range(rows, rows + 30)), train(again, range(rows, rows + 30))
    assert expected and same_batches(expected, got)
    assert again.stats() == replay.stats()


def test_each_save_writes_only_what_is_new(backend, tmp_path):
    replay = filled(num_envs=2, rows=0, capacity=40, length=4)
    written = []
    for start in range(0, 60, 6):
        train(replay, range(start, start + 6))
        manifest = manifest_of(replay, tmp_path)
        written.append(manifest["segments"][-1])
        assert not list(tmp_path.glob("*.tmp"))
        replay.prune(tmp_path, manifest)
        on_disk = {file.name for file in tmp_path.iterdir()}
        assert on_disk == {s["file"] for s in manifest["segments"]} | {manifest["latents"]["file"]}
        # 20 rows per env are alive: at most four segments of six rows, once old ones are evicted
        assert len(manifest["segments"]) <= 4
    assert [entry["start"] for entry in written] == [[t, t] for t in range(0, 60, 6)]
    again = filled(num_envs=2, rows=0, capacity=40, length=4)
    again.load(tmp_path, manifest)
    assert same_batches(train(again, range(60, 80)), train(replay, range(60, 80)))


def test_saving_goes_on_after_a_load(tmp_path):
    """The loaded replay appends to the same segments, and a lost segment is written again."""
    replay = filled(num_envs=2, rows=9, capacity=60, length=4)
    first = manifest_of(replay, tmp_path)
    again = filled(num_envs=2, rows=0, capacity=60, length=4)
    again.load(tmp_path, first)
    train(again, range(9, 12))
    second = manifest_of(again, tmp_path)
    assert second["segments"][0] == first["segments"][0] and len(second["segments"]) == 2
    assert second["segments"][1]["start"] == [9, 9]
    again.prune(tmp_path, first)  # the caller could not store the second manifest
    third = manifest_of(again, tmp_path)
    assert third["segments"][0]["stop"] == [12, 12], "one segment with everything alive"
    last = filled(num_envs=2, rows=0, capacity=60, length=4)
    last.load(tmp_path, third)
    assert same_batches(train(last, range(12, 30)), train(again, range(12, 30)))


def test_large_saves_are_split_so_that_eviction_frees_disk(tmp_path, monkeypatch):
    replay = filled(num_envs=2, rows=20, capacity=40, length=4)
    fixed = replay.bytes_per_row - replay.keys["deter"].record - replay.keys["stoch"].record
    monkeypatch.setattr(replay_io, "SEGMENT_BYTES", 14 * fixed)
    manifest = manifest_of(replay, tmp_path)
    assert [entry["stop"] for entry in manifest["segments"]] == [[7, 7], [14, 14], [20, 20]]
    assert max(entry["bytes"] for entry in manifest["segments"]) == 14 * fixed
    again = filled(num_envs=2, rows=0, capacity=40, length=4)
    again.load(tmp_path, manifest)
    assert same_batches(train(again, range(20, 30)), train(replay, range(20, 30)))


def test_ragged_envs_and_cut_episodes_survive(tmp_path):
    replay = filled(num_envs=2, rows=9, capacity=60, length=3)
    replay.add(rows_of([1], [9]), envs=[1])
    early = manifest_of(replay, tmp_path)
    replay.reset_stream()  # changes rows that are in a segment already
    manifest = manifest_of(replay, tmp_path)
    assert manifest["segments"] == early["segments"]
    again = filled(num_envs=2, rows=0, capacity=60, length=3)
    again.load(tmp_path, manifest)
    assert again._count.tolist() == [9, 10]
    last = again.keys["is_last"].ring
    assert last[0, 8] and last[1, 9]
    assert np.array_equal(last, replay.keys["is_last"].ring)
    with pytest.raises(ValueError, match="expected is_first in the first row"):
        again.add(rows_of([0, 1], [13, 13]))
    for moment in range(12, 60):  # the cut rows are overwritten: nothing may be marked any more
        replay.add(rows_of([0, 1], [moment, moment]) | {"is_first": np.ones(2, bool)})
    assert manifest_of(replay, tmp_path)["cut"] == []


@pytest.mark.parametrize("which", ["segments", "latents"])
@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_damaged_files_are_named_and_left_alone(tmp_path, which, harm):
    replay = filled()
    manifest = manifest_of(replay, tmp_path)
    entry = manifest["latents"] if which == "latents" else manifest["segments"][0]
    file = tmp_path / entry["file"]
    content = file.read_bytes()
    if harm == "truncate":
        file.write_bytes(content[:-1])
    elif harm == "flip":
        file.write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:])
    else:
        file.unlink()
    before = sorted(tmp_path.iterdir())
    again = filled(rows=7)
    with pytest.raises(RuntimeError, match=f"replay: expected .*{file.name} .*resume from another"):
        again.load(tmp_path, manifest)
    assert len(again) == 0 and not again.can_sample(1)
    assert sorted(tmp_path.iterdir()) == before


def test_another_configuration_is_refused(tmp_path):
    manifest = manifest_of(filled(num_envs=2, rows=9, capacity=40, length=4), tmp_path)
    for settings, word in [
        ({"num_envs": 3, "capacity": 60}, "num_envs = 3, got 2"),
        ({"num_envs": 2, "capacity": 42}, "length = 21, got 20"),
        ({"num_envs": 2, "capacity": 40, "length": 5}, "batch_length = 5, got 4"),
    ]:
        other = filled(rows=9, **settings)
        with pytest.raises(ValueError, match=f"expected a saved replay with {word}"):
            other.load(tmp_path, manifest)
        assert other.windows, "refused before anything was touched"
    other = Replay(spec(actions=4), 2, 40, 4)
    with pytest.raises(ValueError, match="expected a saved replay with spec = "):
        other.load(tmp_path, manifest)
    with pytest.raises(ValueError, match="manifest of format 1, got None"):
        other.load(tmp_path, {})


def test_a_failed_save_leaves_the_previous_one(tmp_path, monkeypatch):
    replay = filled(num_envs=2, rows=9, capacity=60, length=4)
    manifest = manifest_of(replay, tmp_path)
    before = sorted(tmp_path.iterdir())
    train(replay, range(9, 12))

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            replay.save(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    again = filled(num_envs=2, rows=0, capacity=60, length=4)
    again.load(tmp_path, manifest)
    after = manifest_of(replay, tmp_path)
    assert after["segments"][-1]["start"] == [9, 9]


def test_prune_touches_only_its_own_files(tmp_path):
    replay = filled()
    manifest = manifest_of(replay, tmp_path)
    for name in ("latest.pt", "rows-mine.bin", "rows-000000000001-0123456789ab.bin.tmp"):
        (tmp_path / name).write_text("x")
    newer = manifest_of(replay, tmp_path)
    Replay.prune(tmp_path, newer)
    left = {file.name for file in tmp_path.iterdir()}
    assert {"latest.pt", "rows-mine.bin", newer["latents"]["file"]} <= left
    assert manifest["latents"]["file"] not in left and not [n for n in left if n.endswith(".tmp")]


VICTIM = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, "tests")
from replay_model import filled
from test_replay_io import train

def commit(folder, manifest):
    aside = folder / "manifest.tmp"
    with open(aside, "w") as out:
        json.dump(manifest, out)
        out.flush()
        os.fsync(out.fileno())
    os.replace(aside, folder / "manifest.json")

def loop(folder):
    replay = filled(num_envs=2, rows=0, capacity=40, length=4)
    if (folder / "manifest.json").exists():
        replay.load(folder, json.loads((folder / "manifest.json").read_text()))
    while True:
        moment = int(replay._count[0])
        train(replay, range(moment, moment + 3))
        manifest = replay.save(folder)
        commit(folder, manifest)
        replay.prune(folder, manifest)

folder = Path(sys.argv[1])
for line in sys.stdin:  # one life per line: fork, so that torch is imported once
    pid = os.fork()
    if pid == 0:
        loop(folder)
    print(pid, flush=True)
    os.waitpid(pid, 0)
"""


def test_killed_at_any_moment_the_last_committed_manifest_loads(tmp_path):
    """Twenty times: kill -9 in the middle of saving, then load and compare with the model."""
    process = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(tmp_path)], cwd=HERE.parent, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    reached = []
    try:
        for life in range(20):
            process.stdin.write("go\n")
            process.stdin.flush()
            pid = int(process.stdout.readline())
            while life == 0 and not (tmp_path / "manifest.json").exists():
                time.sleep(0.005)
            time.sleep(float(rng.uniform(0.01, 0.15)))
            os.kill(pid, signal.SIGKILL)
            replay = filled(num_envs=2, rows=0, capacity=40, length=4)
            replay.load(tmp_path, json.loads((tmp_path / "manifest.json").read_text()))
            reached.append(int(replay._count[0]))
            batch = replay.sample(8, online=False) if replay.can_sample(8) else {}
            if batch:
                moments = batch["ids"][:, 1:].numpy() + np.arange(4)
                assert np.array_equal(batch["reward"].numpy() % 1000, moments % 1000)
    finally:
        process.stdin.close()
        process.wait(timeout=10)
    assert reached == sorted(reached) and reached[-1] > reached[0]
    assert len(list(tmp_path.glob("*.bin*"))) < 20, "what the dead left behind is pruned"


def test_memory_is_announced(monkeypatch):
    monkeypatch.setattr(replay_io, "free_ram", lambda: 24_600_000_000)
    row_spec = spec(deter=2048, stoch=32) | {"image": ((64, 64, 3), "uint8")}
    replay = Replay(row_spec, 4, 1e6, 64)
    assert replay.announce() == (
        "replay   16.4 GB at capacity (images 12.3, latents 4.13, other 0.031); RAM free 24.6 GB"
    )
    monkeypatch.setattr(replay_io, "free_ram", lambda: None)
    assert Replay(spec(), 1, 10, 4).announce().endswith("RAM free unknown")


def test_what_cannot_fit_is_refused(monkeypatch, tmp_path):
    record = filled().bytes_per_row
    monkeypatch.setattr(replay_io, "free_ram", lambda: 100 * record)
    assert Replay(spec(), 1, 80, 4).length == 80
    with pytest.raises(ValueError) as caught:
        Replay(spec(), 1, 81, 4)
    message = str(caught.value)
    for part in ("replay.capacity: expected at most 0.8 of the free RAM", "81 rows of",
                 "lower --replay.capacity to 80", "--replay.storage mmap",
                 "--replay.force true"):  # fmt: skip
        assert part in message
    assert Replay(spec(), 1, 81, 4, force=True).length == 81
    monkeypatch.setattr(replay_io, "free_disk", lambda directory: 100 * record)
    assert Replay(spec(), 1, 80, 4, storage="mmap", directory=tmp_path).length == 80
    with pytest.raises(ValueError, match="0.8 of the free disk"):
        Replay(spec(), 1, 81, 4, storage="mmap", directory=tmp_path)


def test_free_memory_is_plausible(tmp_path):
    assert replay_io.free_ram() > 10_000_000
    assert replay_io.free_disk(tmp_path / "not" / "there") > 1_000_000
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200\n")
    assert replay_io._cgroup_available(str(tmp_path)) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert replay_io._cgroup_available(str(tmp_path)) is None


def resident():
    """Bytes of this process that are in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow_once_the_ring_is_full(backend):
    """Ten times the capacity goes in and batches come out, while the process stays as it is."""
    row_spec = {name: s for name, s in spec(deter=0).items() if name != "position"}
    replay = Replay(row_spec | {"image": ((64, 64, 3), "uint8")}, 4, 2000, 8)
    rows = rows_of(range(4), range(4)) | {"image": np.zeros((4, 64, 64, 3), np.uint8)}
    rows = {name: rows[name] for name in replay.keys}
    untouched = resident()
    soak(replay, rows, 1000)  # two times round: the ring is full, the allocator has settled
    full = resident()
    assert full - untouched < replay.nbytes + 16e6
    soak(replay, rows, 5000)
    # 20,000 rows: remembering 200 bytes of each would show
    assert resident() - full < 4e6


def soak(replay, rows, steps):
    for step in range(steps):
        replay.add(rows)
        if step % 50 == 49:
            replay.sample(4)
