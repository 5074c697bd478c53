"""Rings on a device against rings in memory: the same batches, files and runs. Here on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from replay_model import DEVICE, filled, ring_of, rows_of, spec
from test_replay_io import manifest_of, same_batches, train
from torch.utils._python_dispatch import TorchDispatchMode
from trees import same

from fastwm import assemble, checkpoint, config, ops, replay_rows
from fastwm import train as train_command
from fastwm.replay import Replay
from fastwm.replay_device import DeviceRings

GATHERS = {"one launch": ops.gather_windows, "a launch a key": None}


def moved(rows, step):
    """Latents as an agent hands them over: tensors, in the stored type or wider."""
    latents = {name: torch.from_numpy(rows[name]) for name in ("deter", "stoch")}
    return rows | (latents if step % 2 else {})


def compare(one, two, steps=120):
    """Wraps, ragged adds, online windows and overlapping write-backs in both; then all equals."""
    rng, times = np.random.default_rng(0), np.zeros(3, int)
    for step in range(steps):
        envs = np.arange(3) if step % 3 else rng.permutation(3)[:2]
        for replay in (one, two):
            rows = moved(rows_of(envs, times[envs]), step)
            replay.add(rows, None if step % 3 else envs)
        times[envs] += 1
        if not two.can_sample(9):
            continue
        batches = [replay.sample(9, online=step % 5 > 0) for replay in (one, two)]
        assert list(batches[0]) != [] and batches[0].keys() == batches[1].keys()
        for name in batches[0]:
            assert torch.equal(batches[0][name].cpu(), batches[1][name].cpu()), name
        deter, stoch = torch.randn(9, 4, 5), torch.randint(0, 9, (9, 4, 2), dtype=torch.uint8)
        for replay in (one, two):
            keep = None if step % 2 else torch.tensor(step % 4 == 0)
            ids = batches[0]["ids"]
            for late in range(8 * (step > 100)):  # of the oldest windows some rows are gone by now
                replay.add(rows_of(range(3), times + late))
            replay.update_latents(ids, deter, stoch, keep)
        times += 8 * (step > 100)
    assert two.stats()["latents_dropped"] >= one.stats()["latents_dropped"] > 0
    for name in one.keys:
        assert np.array_equal(ring_of(one, name), ring_of(two, name)), name


@pytest.mark.parametrize("gather", GATHERS.values(), ids=GATHERS)
def test_the_same_batches_as_from_memory(gather):
    compare(
        Replay(spec(), 3, 51, 4, seed=2),
        Replay(spec(), 3, 51, 4, seed=2, storage="cuda", device="cpu", gather=gather),
    )


@pytest.mark.cuda
@pytest.mark.parametrize("gather", GATHERS.values(), ids=GATHERS)
def test_the_same_batches_from_a_gpu(gather):
    compare(
        Replay(spec(), 3, 51, 4, seed=2),
        Replay(spec(), 3, 51, 4, seed=2, storage="cuda", gather=gather),
    )


class Waits(TorchDispatchMode):
    """Fails on what would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"), name
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    replay = filled(**DEVICE)
    keep = torch.tensor(True)
    with Waits():
        replay.add(rows_of(range(3), [20] * 3))
        batch = replay.sample(5)
        replay.update_latents(batch["ids"], batch["deter"][:, None].expand(-1, 4, -1),
                              batch["stoch"][:, None].expand(-1, 4, -1), keep)  # fmt: skip


@pytest.mark.parametrize("pair", [("ram", "cuda"), ("cuda", "ram"), ("cuda", "cuda")], ids=str)
def test_one_storage_loads_what_another_saved(tmp_path, monkeypatch, pair):
    """The same files to the byte, also where rows pass through memory in pieces."""
    monkeypatch.setattr(DeviceRings, "chunk", 50)
    first, second = (Replay(spec(), 3, 36, 4, seed=1, storage=s, device="cpu") for s in pair)
    train(first, range(40))
    first.reset_stream()
    manifest = manifest_of(first, tmp_path)
    plain = Replay(spec(), 3, 36, 4, seed=1)
    train(plain, range(40))
    plain.reset_stream()
    want = manifest_of(plain, tmp_path / "plain")
    for mine, other in [*zip(manifest["segments"], want["segments"], strict=True),
                        (manifest["latents"], want["latents"])]:  # fmt: skip
        assert mine["crc32"] == other["crc32"] and mine["bytes"] == other["bytes"]
    second.load(tmp_path, manifest)
    for replay in (plain, second):
        fresh = rows_of(range(3), [40] * 3) | {"is_first": np.ones(3, bool)}
        replay.add(fresh)
    assert same_batches(train(plain, range(41, 60)), train(second, range(41, 60)))


def test_out_is_filled_on_the_device():
    replay = filled(**DEVICE)
    out = replay.empty_batch(3)
    places = {name: value.data_ptr() for name, value in out.items()}
    plain = filled()
    for _ in range(3):
        assert replay.sample(3, out=out) is out
        assert same_batches([out], [plain.sample(3)])
    assert places == {name: value.data_ptr() for name, value in out.items()}


def test_what_does_not_fit_a_gpu_is_refused(monkeypatch):
    record = filled().bytes_per_row
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * record, 200 * record))
    with pytest.raises(ValueError) as caught:
        Replay(spec(), 1, 81, 4, storage="cuda")
    for part in ("replay.capacity: expected at most 0.8 of the free GPU memory", "81 rows of",
                 "lower --replay.capacity to 80", "--replay.storage ram",
                 "--replay.force true"):  # fmt: skip
        assert part in str(caught.value)
    line = replay_rows.announce(filled().keys, 10**6, "GPU memory", 10**10)
    assert line.endswith("; GPU memory free 10 GB")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused():
    with pytest.raises(ValueError, match="expected a CUDA device for 'cuda', found none; use"):
        Replay(spec(), 1, 80, 4, storage="cuda")


QUIET = (
    "dreamerv3 debug --task dummy --device cpu --threads 1 --deterministic true "
    "--log.tensorboard false --log.every_s 0 --eval.every 0 --log.video_every 0"
).split()


def test_a_run_on_the_cpu_ends_in_one_line(tmp_path, capsys):
    arguments = [*QUIET, "--replay.storage", "cuda", "--logdir", str(tmp_path / "run")]
    assert train_command.main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert (
        len(said) == 1 and "expected a run on a CUDA device for 'cuda', got device cpu" in said[0]
    )
    assert "--replay.storage ram" in said[0]


def test_a_run_learns_and_resumes_to_the_bit(tmp_path, monkeypatch):
    """Straight in memory; and from the device's rings, stopped half way and gone on from there."""
    plain, device = tmp_path / "ram", tmp_path / "device"
    assert train_command.main([*QUIET, "--steps", "96", "--logdir", str(plain)]) == 0
    where = assemble.storage_of
    monkeypatch.setattr(assemble, "storage_of", lambda *args: where(*args) | DEVICE)
    assert train_command.main([*QUIET, "--steps", "48", "--logdir", str(device)]) == 0
    assert train_command.main([*QUIET, "--steps", "96", "--logdir", str(device)]) == 0
    one, two = (checkpoint.load(f / "checkpoint" / "latest.pt") for f in (plain, device))
    assert one["updates"] == two["updates"] > 3
    same(one["agent"], two["agent"])
    assert one["replay"]["latents"]["crc32"] == two["replay"]["latents"]["crc32"]


def test_the_setting_is_there():
    assert config.load([*QUIET, "--replay.storage", "cuda"])[0].replay.storage == "cuda"
