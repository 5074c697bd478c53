"""A run that was killed and goes on does exactly what it would have done."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from trees import same

from fastwm import assemble, checkpoint, train
from fastwm.config import load
from fastwm.ops import _products

STEPS = 128
TINY = (
    "dreamerv3 debug --deterministic true --threads 1 --log.tensorboard false --log.every_s 0 "
    "--eval.every 60 --eval.episodes 1 --log.every 32 --log.video_every 0 --checkpoint.every 80"
).split()


def argv(folder: Path, task: str, steps: int = STEPS, *more: str) -> list[str]:
    return [*TINY, "--task", task, "--logdir", str(folder), "--steps", str(steps), *more]


def latest(folder: Path) -> dict:
    return checkpoint.load(folder / "checkpoint" / "latest.pt")


def stored_replay(folder: Path, arguments: list[str]) -> dict:
    """Rings, cursors, and what the next draws would be."""
    config = load(arguments)[0]
    run = assemble.online_run(config, folder, latest(folder))
    run.begin(latest(folder))
    rings = {name: torch.from_numpy(key.ring.copy()) for name, key in run.replay.keys.items()}
    draws = [run.replay.sample(4) for _ in range(3)]
    run.logger.close()
    run.envs.close()
    return {"rings": rings, "draws": draws, "stats": run.replay.stats(), "rows": len(run.replay)}


def assert_same_run(one: Path, two: Path, arguments: list[str], other: list[str]) -> None:
    first, second = latest(one), latest(two)
    first.pop("replay"), second.pop("replay")  # names of files; the content is compared below
    first.pop("config"), second.pop("config")  # holds the folder's name
    same(first, second)
    assert (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
    same(stored_replay(one, arguments), stored_replay(two, other))


KILL = """
    import os, signal, sys
    from fastwm import log, train
    tick = log.Logger.tick
    def killing_tick(self, env_steps, updates):
        tick(self, env_steps, updates)
        if env_steps >= 112:
            os.kill(os.getpid(), signal.SIGKILL)
    log.Logger.tick = killing_tick
    train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("task, evaluate", [("cartpole", "60"), ("pendulum", "0")])
def test_killed_and_resumed_equals_straight(tmp_path, task, evaluate):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    arguments = argv(straight, task, STEPS, "--eval.every", evaluate)
    other = argv(killed, task, STEPS, "--eval.every", evaluate)
    assert train.main(arguments) == 0
    script = [sys.executable, "-c", textwrap.dedent(KILL), *other]
    assert subprocess.run(script).returncode == -signal.SIGKILL
    assert latest(killed)["env_steps"] == 80
    assert len((killed / "metrics.jsonl").read_text().splitlines()) > 2  # more than it saved
    assert train.main(other) == 0
    assert latest(killed)["env_steps"] == STEPS
    assert_same_run(straight, killed, arguments, other)


def test_images_and_their_videos_resume_too(tmp_path):
    straight, two = tmp_path / "straight", tmp_path / "two"
    more = ["--eval.every", "0", "--log.video_every", "80", "--envs", "2"]
    assert train.main(argv(straight, "dummy_image", 120, *more)) == 0
    assert train.main(argv(two, "dummy_image", 80, *more)) == 0
    assert train.main(argv(two, "dummy_image", 120, *more)) == 0
    config_of = lambda folder: argv(folder, "dummy_image", 120, *more)  # noqa: E731
    assert_same_run(straight, two, config_of(straight), config_of(two))


def test_resuming_twice_adds_nothing(tmp_path):
    run = tmp_path / "run"
    assert train.main(argv(run, "cartpole", 80)) == 0
    before, rows = latest(run), (run / "metrics.jsonl").read_bytes()
    assert train.main(argv(run, "cartpole", 80)) == 0
    after = latest(run)
    before.pop("replay"), after.pop("replay")
    same(before, after)
    assert (run / "metrics.jsonl").read_bytes() == rows


def test_every_tensor_of_the_agent_is_stored(tmp_path):
    """Whatever is perturbed after saving comes back by loading."""
    run = tmp_path / "run"
    train.main(argv(run, "cartpole", 80))
    stored = latest(run)
    config = load(argv(run, "cartpole", 80))[0]
    pieces = assemble.online_run(config, run, stored)
    agent = pieces.agent
    # Parameters, buffers, optimizer moments and generators, found without asking state_dict.
    found = dict(agent.model.named_parameters()) | dict(agent.model.named_buffers())
    constant = {n for n in found if n.endswith(("bins", "quantiles"))}  # follow from the config
    found = {name: tensor for name, tensor in found.items() if name not in constant}
    moments = [t for t in vars(agent.optimizer).values() if isinstance(t, list)]
    tensors = [*found.values(), *(t for group in moments for t in group if torch.is_tensor(t))]
    tensors += [t for t in vars(agent.optimizer).values() if torch.is_tensor(t)]
    assert len(tensors) > 3 * len(list(agent.model.world.parameters()))
    pieces.begin(stored)
    wanted = [tensor.detach().clone() for tensor in tensors]
    for tensor in tensors:
        tensor.data.copy_(tensor.data.logical_not() if tensor.dtype == torch.bool else tensor + 1)
    agent.generator.manual_seed(99), agent.act_generator.manual_seed(99)
    agent.updates = -1
    agent.load_state_dict(stored["agent"])
    same(wanted, [tensor.detach().clone() for tensor in tensors])
    same(checkpoint._unpack(checkpoint._pack(agent.state_dict())), stored["agent"])
    pieces.logger.close()


def test_products_go_on_as_they_began(tmp_path, monkeypatch):
    """Two libraries round differently, so which one multiplies belongs to the run."""
    began, now = (_products.Choice(frozenset(s), False, "test", {}) for s in (["nt"], []))
    monkeypatch.setattr(_products, "_made", [began])
    monkeypatch.setattr(_products, "_setting", lambda: "auto")
    run = tmp_path / "run"
    train.main(argv(run, "cartpole", 80))
    for setting, taken in (("auto", began.onednn), ("blas", now.onednn)):
        monkeypatch.setattr(_products, "_made", [now])
        monkeypatch.setattr(_products, "_setting", lambda setting=setting: setting)
        config = load(argv(run, "cartpole", 80))[0]
        pieces = assemble.online_run(config, run, latest(run))
        pieces.begin(latest(run))
        assert _products.choice().onednn == taken
        pieces.logger.close()


def test_environments_that_cannot_be_restored_start_afresh(tmp_path):
    run = tmp_path / "run"
    train.main(argv(run, "cartpole", 80))
    stored = latest(run)
    stored["envs"]["hash"] = "another"
    checkpoint.save(run / "checkpoint" / "latest.pt", stored)
    with pytest.warns(UserWarning, match="fresh episodes"):
        assert train.main(argv(run, "cartpole", 120)) == 0
    assert latest(run)["env_steps"] == 120


def test_without_stored_replay_the_start_gate_holds_again(tmp_path):
    run = tmp_path / "run"
    none = ["--replay.save", "false", "--eval.every", "0"]
    train.main(argv(run, "cartpole", 80, *none))
    updates = latest(run)["updates"]
    assert not (run / "replay").exists()
    train.main(argv(run, "cartpole", 160, *none))
    # 64 rows fill the replay again; then at most 4 updates catch up, then a quarter per env_step
    assert updates < latest(run)["updates"] <= updates + 4 + (160 - 80 - 64) // 4
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["env_steps"] for row in rows] == [32, 64, 96, 128, 160]


TWENTY = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from fastwm import assemble, checkpoint, train
    from fastwm.config import load
    from fastwm.spaces import Space
    argv = sys.argv[1:]
    folder = Path(load(argv)[0].logdir)
    latest = folder / "checkpoint" / "latest.pt"
    dice, saved, seen = random.Random(0), 0, []

    def start():
        child = os.fork()
        if child == 0:
            sys.stdout = open(os.devnull, "w")
            os._exit(train.main(argv))
        return child

    def wait_for_a_save(before):   # so that the kill hits a run that is writing all the time
        end = time.monotonic() + 60
        while not latest.exists() or latest.stat().st_mtime_ns == before:
            assert time.monotonic() < end
            time.sleep(0.002)

    for _ in range(20):
        before = latest.stat().st_mtime_ns if latest.exists() else None
        child = start()
        wait_for_a_save(before)
        time.sleep(dice.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        stored = checkpoint.load(latest)
        config = load(argv)[0]
        agent = assemble.make_agent(
            config, {k: Space.from_dict(s) for k, s in stored["obs_space"].items()},
            Space.from_dict(stored["act_space"]))
        agent.load_state_dict(stored["agent"])
        replay = assemble.make_replay(config, agent, folder)
        replay.load(folder / "replay", stored["replay"])
        assert len(replay) == stored["env_steps"], (len(replay), stored["env_steps"])
        assert stored["env_steps"] > saved
        saved = stored["env_steps"]
        seen.append(saved)
    print(seen)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_twenty_times_the_folder_always_loads(tmp_path):
    run = tmp_path / "run"
    command = argv(run, "dummy", 100_000, "--checkpoint.every", "4", "--eval.every", "0")
    script = [sys.executable, "-c", textwrap.dedent(TWENTY), *command]
    found = subprocess.run(script, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
