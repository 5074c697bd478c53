"""The loop: what is stored, when updates and evaluations happen, and how a run ends."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from fastwm import assemble, checkpoint, config
from fastwm.agents.random import RandomAgent
from fastwm.envs.dummy import DummyEnv
from fastwm.loops import online
from fastwm.loops import transfer as transfer_module
from fastwm.loops.evaluate import evaluate, seed_of, summarize
from fastwm.loops.finite import FiniteWatch, NonFiniteError
from fastwm.loops.transfer import Transfer
from fastwm.spaces import Space

QUIET = (
    "--log.tensorboard false --log.every_s 0 --threads 1 --eval.every 0 --log.every 32 "
    "--log.video_every 0 --checkpoint.every 0 --task dummy"
).split()


def make(folder, *more: str):
    settings = config.load(["dreamerv3", "debug", *QUIET, *more])[0]
    return assemble.online_run(settings, folder)


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- evaluation


@pytest.mark.parametrize("episodes, envs, quota", [(7, 3, (3, 2, 2)), (2, 4, (1, 1)), (4, 1, (4,))])
def test_every_environment_plays_its_quota(episodes, envs, quota):
    """Environment i's episodes last 3 + i steps; the short ones must not crowd out the long."""
    agent = RandomAgent({"vector": Space("vector", (3,))}, Space("discrete", (), (2,)))
    found = evaluate(agent, DummyEnv, episodes=episodes, envs=envs, mode="greedy", seed=0)
    expected = [3 + i for i, count in enumerate(quota) for _ in range(count)]
    assert found["lengths"] == expected
    assert found["scores"] == [n * (n + 1) / 2 for n in expected]  # rewards 1 .. n


def test_short_episodes_do_not_crowd_out_long_ones():
    agent = RandomAgent({"vector": Space("vector", (3,))}, Space("discrete", (), (2,)))

    def two_envs(num_envs: int, seed: int) -> DummyEnv:
        return DummyEnv(num_envs, seed, lengths=(1, 20))

    found = evaluate(agent, two_envs, episodes=5, envs=2, mode="greedy", seed=0)
    assert found["lengths"] == [1, 1, 1, 20, 20]


def test_an_episode_that_does_not_end_counts_as_it_stands(tmp_path):
    agent = RandomAgent({"vector": Space("vector", (3,))}, Space("discrete", (), (2,)))

    def endless(num_envs: int, seed: int) -> DummyEnv:
        return DummyEnv(num_envs, seed, lengths=(3, 10**6)[:num_envs])

    options = {"envs": 2, "mode": "greedy", "seed": 0, "max_steps": 5}
    found = evaluate(agent, endless, episodes=4, **options)
    assert found["lengths"] == [3, 3, 5, 5] and found["cut"] == [False, False, True, True]
    assert found["scores"] == [6, 6, 15, 6 + 7 + 8 + 9 + 10]  # rewards 1, 2, 3 ...
    assert summarize(found)["cut"] == 2


def test_evaluation_leaves_the_agent_alone_and_repeats(tmp_path):
    run = make(tmp_path, "--task", "cartpole")
    before = checkpoint._pack(run.agent.state_dict())
    before = torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, before)
    state = torch.get_rng_state()
    found = [
        evaluate(run.agent, run.make_envs, episodes=2, envs=2, mode=mode, seed=5)
        for mode in ("sample", "sample", "greedy", "greedy")
    ]
    assert found[0] == found[1] and found[2] == found[3]
    assert torch.equal(state, torch.get_rng_state())
    from trees import same

    same(before, checkpoint._pack(run.agent.state_dict()))


def test_seeds_differ_by_branch():
    assert len({seed_of(s, b, n) for s in range(3) for b in range(3) for n in range(3)}) == 27


# ---- the loop


def test_rows_and_actions_are_stored_as_they_happened(tmp_path):
    run = make(tmp_path, "--envs", "2", "--steps", "24", "--train_ratio", "0")
    stored = []
    add = run.replay.add
    run.replay.add = lambda given: (stored.append(given), add(given))
    assert online.train(run) == 0
    assert run.env_steps == 24 and len(stored) == 12
    first = np.array([given["is_first"] for given in stored])
    last = np.array([given["is_last"] for given in stored])
    assert first[:, 0].nonzero()[0].tolist() == [0, 4, 8]  # 3 decisions: 4 rows
    assert last[:, 0].nonzero()[0].tolist() == [3, 7, 11]
    assert first[:, 1].nonzero()[0].tolist() == [0, 5, 10]
    actions = np.array([given["action"] for given in stored])
    assert not actions[last].any()
    assert stored[0]["deter"].dtype == torch.bfloat16


def test_updates_follow_the_train_ratio_after_the_start_gate(tmp_path):
    run = make(tmp_path, "--steps", "200", "--train_ratio", "8")
    assert online.train(run) == 0
    gate = 8 * (4 + 4)  # T * (B + N) rows
    assert run.updates == 1 + (200 - gate) * 8 // (4 * 8)
    assert rows(tmp_path)[-1]["train/opt/skipped"] == 0


def test_prefill_acts_at_random_and_pretrain_comes_once(tmp_path):
    options = ["--replay.prefill", "64", "--replay.pretrain", "3", "--train_ratio", "1"]
    run = make(tmp_path, *options)
    run.begin(None)
    modes, act = [], run.agent.act

    def watched(rows, state, mode):
        modes.append(mode)
        return act(rows, state, mode)

    run.agent.act = watched
    counts = []
    while run.env_steps < 128:
        run.act()
        run.learn()
        run.receive()
        counts.append((run.env_steps, run.updates))
    assert modes == ["random"] * 16 + ["train"] * 16
    assert all(updates == 0 for steps, updates in counts if steps < 64)
    assert dict(counts)[64] == 1 + 3
    assert counts[-1][1] == 4 + 64 // 32  # then as the train ratio says


@pytest.mark.parametrize("task", ["cartpole", "pendulum"])
def test_overlap_changes_nothing_but_the_order(tmp_path, task):
    """The learner runs while the environments step; rows, draws, weights and log are the same."""
    found = {}
    for overlap in ("true", "false"):
        folder = tmp_path / overlap
        run = make(
            folder, "--task", task, "--steps", "112", "--train_ratio", "8", "--overlap", overlap,
            "--deterministic", "true", "--checkpoint.every", "48",
        )  # fmt: skip
        order = []
        for part, name in ((run.envs, "send"), (run.envs, "receive"), (run.agent, "update")):
            part.__dict__[name] = watch(order, name, getattr(part, name))
        try:
            assert online.train(run) == 0
        finally:
            torch.use_deterministic_algorithms(False)
        stored = checkpoint.load(folder / "checkpoint" / "latest.pt")
        stored.pop("replay"), stored.pop("config")  # names of files and of the folder
        rings = {name: key.ring.copy() for name, key in run.replay.keys.items()}
        found[overlap] = order, stored, rings, (folder / "metrics.jsonl").read_bytes()
    order, *outcome = found["true"]
    inside = [order[i - 1] for i, name in enumerate(order) if name == "update" and i]
    assert order.count("update") > 10 and "receive" not in inside
    plain, *expected = found["false"]
    assert sorted(plain) == sorted(order) and plain[:4] == ["send", "receive"] * 2
    from trees import same

    same(outcome, expected)


def watch(order: list, name: str, function):
    return lambda *given: (order.append(name), function(*given))[1]


@pytest.mark.parametrize("task", ["cartpole", "pendulum"])
def test_random_actions_do_not_look(tmp_path, task):
    run = make(tmp_path, "--task", task)
    run.begin(None)
    found = []
    for _ in range(200):
        action, run.state, _ = run.agent.act(run.rows, run.state, "random")
        found.append(action)
        if task == "pendulum":
            assert np.allclose(run.state["action"].cpu().numpy(), action)
        run.rows = run.envs.step(action)
    values = np.concatenate(found).ravel()
    if task == "pendulum":
        assert abs(values.mean()) < 0.1 and 0.5 < values.std() < 0.65  # uniform on [-1, 1]: 0.577
    else:
        assert 0.4 < values.mean() < 0.6


def test_evaluation_saves_the_best_and_stops(tmp_path):
    run = make(
        tmp_path,
        "--steps",
        "400",
        "--eval.every",
        "40",
        "--eval.stop_at",
        "6.5",
        "--eval.episodes",
        "2",
        "--eval.envs",
        "2",
    )
    assert online.train(run) == 0
    assert run.env_steps == 40 and run.best == 8.0  # scores 6 and 10
    best = checkpoint.load(tmp_path / "checkpoint" / "best.pt")
    assert best["return"] == 8.0 and best["env_steps"] == 40
    assert (tmp_path / "checkpoint" / "policy.pt").is_file()
    row = rows(tmp_path)[-1]
    assert row["env_steps"] == 40 and row["eval_return"] == row["eval/return"] == 8.0


def test_the_end_is_evaluated_and_saved(tmp_path):
    run = make(tmp_path, "--steps", "36", "--eval.every", "1000", "--eval.episodes", "1")
    online.train(run)
    assert rows(tmp_path)[-1]["eval/episodes"] == 1
    assert checkpoint.load(tmp_path / "checkpoint" / "latest.pt")["env_steps"] == 36


def test_no_env_steps_are_logged_twice(tmp_path):
    run = make(tmp_path, "--steps", "96", "--eval.every", "32", "--eval.episodes", "1")
    online.train(run)
    assert [row["env_steps"] for row in rows(tmp_path)] == [32, 64, 96]


def test_open_loop_video_of_image_tasks(tmp_path):
    run = make(
        tmp_path, "--task", "dummy_image", "--log.video_every", "80", "--steps", "80", "--envs", "2"
    )
    online.train(run)
    names = sorted(os.listdir(tmp_path / "videos"))
    assert names == [f"train_openl_image-000000080.{ending}" for ending in ("gif", "png")]


STOP = """
    import os, signal, sys
    from fastwm import log, train
    tick = log.Logger.tick
    def stopping_tick(self, env_steps, updates):
        tick(self, env_steps, updates)
        if env_steps == 20:
            os.kill(os.getpid(), int(sys.argv[1]))
    log.Logger.tick = stopping_tick
    sys.exit(train.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(tmp_path, number):
    script = [
        sys.executable,
        "-c",
        textwrap.dedent(STOP),
        str(int(number)),
        "random",
        "debug",
        *QUIET,
        "--logdir",
        str(tmp_path / "run"),
        "--steps",
        "100000",
    ]
    found = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert found.returncode == 128 + number, found.stderr
    assert "stopped at env_steps 20" in found.stdout
    assert checkpoint.load(tmp_path / "run" / "checkpoint" / "latest.pt")["env_steps"] == 20


# ---- NaN and infinity


def poisoned(run, updates: set[int], value: float, key: str = "reward"):
    """Puts `value` into the batches of these updates (the first is 0)."""
    sample = run.replay.sample

    def bad_sample(batch_size):
        batch = sample(batch_size)
        if run.updates in updates:
            batch[key][0, 2] = value
        return batch

    run.replay.sample = bad_sample


@pytest.mark.parametrize("key, value", [("reward", float("nan")), ("vector", float("inf"))])
def test_three_bad_updates_in_a_row_stop_the_run_with_a_dump(tmp_path, capsys, key, value):
    run = make(tmp_path, "--steps", "400")
    poisoned(run, {5, 6, 7}, value, key)
    before = {}
    update = run.agent.update

    def watched(batch):
        if run.updates == 5:
            before.update({n: p.clone() for n, p in run.agent.model.named_parameters()})
        return update(batch)

    run.agent.update = watched
    assert online.train(run) == 3
    assert run.updates == 8
    for name, parameter in run.agent.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    dump = checkpoint.load(tmp_path / "nan_dump.pt")
    assert dump["first_nonfinite"] == f"batch/{key}" and dump["seed"] == 0
    assert not dump["batch"][key].isfinite().all()
    assert dump["updates"] == 8 and "agent" in dump
    said = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert len(said) == 1 and f"batch/{key}" in said[0] and "nan_dump.pt" in said[0]
    ring = torch.from_numpy(run.replay.keys["deter"].ring.view(np.int16)).view(torch.bfloat16)
    assert ring.isfinite().all()  # broken states were not written back


def test_fewer_are_skipped_and_counted(tmp_path):
    run = make(tmp_path, "--steps", "160")
    poisoned(run, {2, 3, 5, 6, 9}, float("nan"))
    assert online.train(run) == 0
    assert run.finite.skipped == 5
    assert rows(tmp_path)[-1]["train/opt/skipped"] == 5
    assert not (tmp_path / "nan_dump.pt").exists()
    for name, parameter in run.agent.model.named_parameters():
        assert parameter.isfinite().all(), name


def test_the_count_of_bad_updates_survives_a_resume(tmp_path):
    run = make(tmp_path, "--steps", "88")
    poisoned(run, {4, 5}, float("nan"))
    online.train(run)
    assert run.updates == 7 and run.finite.skipped == 2
    stored = checkpoint.load(tmp_path / "checkpoint" / "latest.pt")
    again = assemble.online_run(replace(run.config, steps=96), tmp_path, stored)
    online.train(again, stored)
    assert again.updates == 9 and again.finite.skipped == 2


def test_latents_of_a_bad_update_are_not_stored():
    class Replay:
        device = torch.device("cpu")
        stored: ClassVar[list] = []

        def update_latents(self, ids, deter, stoch, keep):
            if keep:
                self.stored.append(int(ids))

    transfer = Transfer(Replay(), torch.device("cpu"), 1)
    for i, finite in enumerate([True, False, True]):
        latents = {"deter": torch.zeros(1), "stoch": torch.zeros(1)}
        transfer.write_back(torch.tensor(i), latents, torch.tensor(finite))
    transfer.flush()
    assert Replay.stored == [0, 2]


def test_updates_share_launches_where_so_many_are_due(tmp_path):
    """5 are due after every step of the environments: two launches of 2, and one update alone."""
    run = make(tmp_path, "--train_ratio", "80", "--steps", "96")
    run.agent.updates_at_once, sizes, ids = 2, [], []
    update_many, write_back = run.agent.update_many, run.transfer.write_back

    def counted(batches):
        sizes.append(len(batches))
        return update_many(batches)

    def spied(found, latents, finite, first):
        ids.append((found, first))
        write_back(found, latents, finite, first)

    run.agent.update_many, run.transfer.write_back = counted, spied
    before = run.learn
    due = []

    def learn():
        updates = run.updates
        before()
        due.append(run.updates - updates)

    run.learn = learn
    online.train(run)
    assert run.updates == run.agent.updates == sum(sizes) == len(ids) == sum(due)
    expected = [size for count in due for size in [2] * (count // 2) + [1] * (count % 2)]
    assert sizes == expected and {1, 2} == set(sizes)
    assert [first for _, first in ids] == [i == 0 for size in sizes for i in range(size)]
    assert len({id(found) for found, _ in ids}) == len(ids)  # none in a buffer that is used again


def test_on_a_cpu_a_batch_is_not_copied(tmp_path):
    """From the gathering to the networks its tensors stay where they are."""
    run = make(tmp_path, "--train_ratio", "0", "--steps", "96")
    online.train(run)
    sampled = run.transfer.sample()
    moved = run.agent.to_device(run.transfer.to_device(sampled))
    assert {k: v.data_ptr() for k, v in moved.items()} == {
        k: v.data_ptr() for k, v in sampled.items()
    }


def test_latents_of_a_launch_are_stored_with_the_next(monkeypatch):
    """As on a GPU, where they are on their way until then."""
    stored = []

    class Replay:
        device = torch.device("cpu")

        def update_latents(self, ids, deter, stoch):
            stored.append(int(ids))

    class Event:
        def record(self):
            pass

        synchronize = record

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(transfer_module, "_to_pinned", torch.clone)
    transfer = Transfer(Replay(), torch.device("cpu"), 1)
    transfer.pinned = [({}, Event())] * 2
    latents = {"deter": torch.zeros(1), "stoch": torch.zeros(1)}
    for i in range(6):  # three launches of two
        transfer.write_back(torch.tensor(i), latents, torch.tensor(i != 1), first=i % 2 == 0)
    assert stored == [0, 2, 3]
    transfer.flush()
    assert stored == [0, 2, 3, 4, 5]


@pytest.mark.cuda
def test_transfers_through_a_gpu_lose_nothing(tmp_path):
    """The same draws and the same stored latents as on a CPU, one update later."""
    runs = [make(tmp_path / name, "--train_ratio", "0", "--steps", "96") for name in "ab"]
    for run in runs:
        online.train(run)
    plain, fast = (
        Transfer(run.replay, torch.device(d), 4)
        for run, d in zip(runs, ("cpu", "cuda"), strict=True)
    )
    yes = torch.tensor(True)
    for _ in range(5):
        one, two = plain.sample(), fast.sample()
        ids = two["ids"]
        moved = fast.to_device(two)
        for key in one:
            assert torch.equal(one[key], moved[key].cpu()), key
        shape = one["reward"].shape
        latents = {
            "deter": torch.randn(*shape, one["deter"].shape[-1]).bfloat16(),
            "stoch": torch.randint(4, (*shape, one["stoch"].shape[-1])).to(torch.uint8),
        }
        plain.write_back(one["ids"], latents, yes)
        fast.wait()
        fast.write_back(ids, {key: value.cuda() for key, value in latents.items()}, yes.cuda())
        fast.flush()  # draws see what was written, so both must have written it
    for key in ("deter", "stoch"):
        rings = [run.replay.keys[key].ring for run in runs]
        assert rings[0].tobytes() == rings[1].tobytes()


def test_the_exit_code_reaches_the_shell(tmp_path, monkeypatch):
    from fastwm import train

    begin = online.OnlineRun.begin
    monkeypatch.setattr(
        online.OnlineRun,
        "begin",
        lambda run, stored: (begin(run, stored), poisoned(run, set(range(100)), float("nan")))[0],
    )
    argv = ["dreamerv3", "debug", *QUIET, "--logdir", str(tmp_path / "run")]
    assert train.main(argv) == 3


def test_the_watch_counts_only_what_is_in_a_row():
    watch = FiniteWatch(limit=3)
    for flag in (False, False, True, False, False, True):
        watch(torch.tensor(flag), None)
    assert watch.state_dict() == {"skipped": 4, "in_a_row": 0}
    watch(torch.tensor(False), None)
    again = FiniteWatch(limit=3)
    again.load_state_dict(watch.state_dict())
    again(torch.tensor(False), None)
    with pytest.raises(NonFiniteError) as error:
        again(torch.tensor(False), "the batch")
    assert error.value.context == "the batch"
