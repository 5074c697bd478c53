"""`train ha`: the stages, what they leave behind, how they go on, and what they refuse."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from fastwm import assemble, assemble_ha, checkpoint, load_policy, train
from fastwm import config as settings
from fastwm import eval as evaluation
from fastwm.episodes import EpisodeStore
from fastwm.loops.ha_collect import PolicyActions, RandomActions
from fastwm.loops.ha_fit import EarlyStopping, fit_rnn
from fastwm.loops.ha_search import Search
from fastwm.spaces import Space
from fastwm.worldmodels.ha import MDNRNN, ConvVAE
from fastwm.worldmodels.ha_controller import ActionCode

pytest.importorskip("envpool")
QUIET = "--log.tensorboard false --threads 1 --deterministic true".split()


def ha(run, *flags: str) -> int:
    return train.main(["ha", "debug", "--logdir", str(run), *QUIET, *flags])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("ha") / "run"
    assert ha(run) == 0
    return run


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def config_of(*flags: str):
    return settings.load(["ha", "debug", *QUIET, *flags])[0]


def contents(run) -> dict:
    return {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


def test_what_a_run_leaves_behind(trained):
    for name in ("vae", "mdrnn", "ctrl"):
        best = checkpoint.load(trained / name / "best.tar")
        last = checkpoint.load(trained / name / "checkpoint.tar")
        assert {"epoch", "state_dict"} <= best.keys() and last["epoch"] >= best["epoch"]
        if name != "ctrl":
            assert {"precision", "optimizer", "scheduler", "earlystopping"} <= last.keys()
    assert {"epoch", "reward", "state_dict", "es"} <= checkpoint.load(
        trained / "ctrl" / "checkpoint.tar"
    ).keys()
    names = {p.name for p in (trained / "samples").iterdir()}
    assert {"vae-0001.png", "dream-0001.gif", "dream-0001.png"} <= names
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [r["env_steps"] for r in rows] == sorted(r["env_steps"] for r in rows)
    assert rows[-1]["eval/episodes"] == 2 and "ctrl/holdout" in rows[-2]
    test = json.loads((trained / "test.json").read_text())
    assert test["n"] == len(test["scores"]) == 2
    assert settings.load([str(trained / "config.toml")])[0].algorithm == "ha"


def test_the_same_command_again_does_nothing_new(copy, capsys):
    before = contents(copy)
    assert ha(copy) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("3 episodes are there", "vae      done", "ctrl     done"))
    after = contents(copy)
    for folder in ("vae", "mdrnn", "ctrl", "latents", "data"):
        one = {p: b for p, b in before.items() if p.parent.name == folder}
        assert one and one == {p: after[p] for p in one}


def test_stages_alone_equal_all_at_once(trained, tmp_path):
    run = tmp_path / "run"
    for stage in ("collect", "vae", "latents", "rnn", "ctrl"):
        flags = ["--generate_only"] if stage == "collect" else ["--stage", stage]
        assert ha(run, *flags) == 0
    for name in ("vae/best.tar", "mdrnn/best.tar", "ctrl/best.tar"):
        one, two = (checkpoint.load(r / name)["state_dict"] for r in (trained, run))
        assert all(torch.equal(one[key], two[key]) for key in one), name
    for name in ("test.json", "metrics.jsonl"):
        assert (trained / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.parametrize("stage, folder", [("vae", "vae"), ("rnn", "mdrnn")])
def test_learning_goes_on_exactly(trained, tmp_path, stage, folder):
    """Two epochs at once, and one with another after a stop: the same weights."""
    found, decay = [], ["--rnn.lr_decay", "0.9"] if stage == "rnn" else []
    for name, parts in (("one", ["2"]), ("two", ["1", "2"])):
        run = shutil.copytree(trained, tmp_path / name)
        shutil.rmtree(run / folder)
        for epochs in parts:
            assert ha(run, "--stage", stage, f"--{stage}.epochs", epochs, *decay) == 0
        found.append(checkpoint.load(run / folder / "checkpoint.tar"))
    one, two = found
    rates = [stored["optimizer"]["param_groups"][0]["lr"] for stored in found]
    assert rates[0] == rates[1] == pytest.approx(1e-3 * (0.9**4 if decay else 1))
    assert one["epoch"] == two["epoch"] == 2 and one["precision"] == two["precision"]
    assert all(torch.equal(one["state_dict"][k], two["state_dict"][k]) for k in one["state_dict"])


def test_collecting_goes_on(copy):
    before = EpisodeStore(copy / "data").episode(2)["action"].copy()
    assert ha(copy, "--generate_only", "--collect.episodes", "5") == 0
    store = EpisodeStore(copy / "data")
    assert len(store) == 5 and np.array_equal(store.episode(2)["action"], before)
    first = [store.episode(i)["image"][-1].tobytes() for i in range(5)]
    assert len(set(first)) == 5  # not the same tracks again


def test_parts_of_the_data_for_v_and_m(trained, tmp_path, capsys):
    """V and M learn from episodes of their own, random in different ways."""
    parts = "--collect.episodes 2,2 --collect.policy white,held --num_test_files 0".split()
    ranges = "--vae.episodes 0,2 --rnn.episodes 2,4 --final.episodes 0".split()
    both, alone = tmp_path / "both", tmp_path / "alone"
    assert ha(both, "--generate_only", "--collect.episodes", "1", *parts[2:4]) == 2  # two names
    assert ha(both, "--stage", "collect,vae,latents,rnn", *parts, *ranges) == 0
    said = capsys.readouterr().out
    assert "22 frames of 2 episodes" in said and "windows of 2 episodes" in said
    store = EpisodeStore(both / "data")
    still = [(np.diff(store.episode(i)["action"][:-1], axis=0) == 0).all(1).any() for i in range(4)]
    assert still == [False, False, True, True]

    only = ["--collect.episodes", "2", "--collect.policy", "white", "--num_test_files", "0"]
    assert ha(alone, "--stage", "collect,vae", *only) == 0
    same_weights(both / "vae" / "best.tar", alone / "vae" / "best.tar")

    action = np.memmap(both / "data" / "action.bin", np.float32, "r+", shape=(store.rows, 3))
    action[: store.starts[2]] = 0.5  # what M does not learn from may be anything
    action.flush()
    (both / "mdrnn").rename(tmp_path / "before")
    assert ha(both, "--stage", "rnn", *parts, *ranges) == 0
    same_weights(both / "mdrnn" / "best.tar", tmp_path / "before" / "best.tar")
    text = refused(capsys, both, "--stage", "vae", *parts, *ranges[2:], "--vae.episodes", "2,9")
    assert "expected at least 9" in text and "got 4" in text


def test_later_rounds_learn_from_what_the_controller_does(trained, tmp_path, capsys):
    """Two rounds at once, and one with another after it: the same data, M and C."""
    flags = "--collect.again 2 --rnn.again 2".split()
    one, two = tmp_path / "one", shutil.copytree(trained, tmp_path / "two")
    assert ha(one, *flags, "--rounds", "2") == 0
    said = capsys.readouterr().out
    assert said.count("round    2 of 2") == 1 and said.count("test     ") == 1
    assert "5 of 5 episodes, 55 rows; controller" in said and "rnn      epoch 2 of 2" in said
    assert "latents  33 rows" in said and "latents  22 rows" in said  # the first are not done again
    assert ha(two, *flags, "--rounds", "2") == 0
    for name in ("vae", "mdrnn", "ctrl"):
        same_weights(one / name / "best.tar", two / name / "best.tar")
    for name in ("data/action.bin", "latents/mu.npy", "test.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    first, last = (checkpoint.load(run / "mdrnn" / "checkpoint.tar") for run in (trained, one))
    assert (first["round"], first["epoch"], last["round"], last["epoch"]) == (0, 1, 1, 2)
    assert checkpoint.load(one / "ctrl" / "checkpoint.tar")["round"] == 1

    capsys.readouterr()
    before = contents(one)  # a round that is over does not begin again, nor does a stage alone
    assert ha(one, *flags, "--rounds", "2") == ha(one, *flags, "--stage", "rnn,ctrl") == 0
    said = capsys.readouterr().out
    assert "a later round has begun" in said and "raise --rnn.again to go on" in said
    assert said.count("round    2 of 2") == 2
    weights = [p for p in before if p.suffix == ".tar"]
    assert weights and all(p.read_bytes() == before[p] for p in weights)


def test_several_ms(tmp_path, capsys):
    """Each learns by itself from a start of its own; the dream needs all of them."""
    flags = "--rnn.members 2 --rnn.done true --ctrl.world dream --dream.length 9".split()
    assert ha(tmp_path, *flags) == 0
    one, two = (checkpoint.load(tmp_path / f / "best.tar") for f in ("mdrnn", "mdrnn1"))
    starts = (parts["state_dict"]["head.weight"] for parts in (one, two))
    assert not torch.equal(*starts)
    assert one["vae"] == two["vae"] and one["epoch"] == two["epoch"] == 1
    before = contents(tmp_path / "mdrnn1")
    assert ha(tmp_path, *flags) == 0 and contents(tmp_path / "mdrnn1") == before
    shutil.rmtree(tmp_path / "mdrnn1")
    text = refused(capsys, tmp_path, *flags, "--stage", "ctrl")
    assert re.search(r"expected .*mdrnn1/best.tar, found none; run --stage rnn first", text)


def test_the_controller_keeps_a_state_for_every_lane():
    class Counts:
        """A policy whose action is how many steps its lane has made since the beginning."""

        key, params = "image", torch.zeros(1)

        def initial_state(self, count):
            return {"steps": torch.full((count,), 7.0), "action": torch.zeros(count, 1)}

        def step(self, obs, state, is_first, mode, generator):
            assert len(obs["image"]) == len(is_first)
            steps = torch.where(is_first, 0.0, state["steps"] + 1)
            return None, {"steps": steps, "action": steps[:, None]}

    act = PolicyActions(Counts(), 3, seed=0)
    image = np.zeros((3, 2, 2, 3), np.uint8)
    assert act(image, np.array([0, 1, 2])).tolist() == [[0], [0], [0]]
    assert act(image[:2], np.array([0, 2])).tolist() == [[1], [1]]
    assert act(image[:2], np.array([1, 2])).tolist() == [[1], [2]]


def same_weights(one, two) -> None:
    a, b = (checkpoint.load(path)["state_dict"] for path in (one, two))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_search_goes_on_exactly(trained, tmp_path):
    """Three generations at once, and one with two more after a stop, end at the same mean."""
    flags = ["--stage", "ctrl", "--final.episodes", "0"]
    found = []
    for name, parts in (("one", ["1,3"]), ("two", ["1,1", "1,3"])):
        run = shutil.copytree(trained, tmp_path / name)
        shutil.rmtree(run / "ctrl")
        for generations in parts:
            assert ha(run, *flags, "--ctrl.generations", generations) == 0
        found.append(checkpoint.load(run / "ctrl" / "checkpoint.tar"))
    one, two = found
    assert one["epoch"] == two["epoch"] == 4
    assert torch.equal(one["state_dict"]["fc.weight"], two["state_dict"]["fc.weight"])
    again = [Search.restore(stored["es"]).ask() for stored in found]
    assert np.array_equal(*again)  # the generation after those, too


def test_only_the_test(copy, capsys):
    (copy / "test.json").unlink()
    assert ha(copy, "--test") == 0
    assert "over 2 unseen episodes" in capsys.readouterr().out
    assert "scores" in json.loads((copy / "test.json").read_text())


def test_eval_and_load_policy_act_like_the_stage(copy, capsys):
    """One controller in three ways of acting: population, agent, policy file."""
    assert evaluation.main([str(copy), "--episodes", "2", "--envs", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 2
    config, agent, _, _ = assemble.load_run(str(copy), "best")
    policy = load_policy(copy)
    envs = assemble.make_envs(config)(2, 5)
    rows, state, state2 = envs.reset(), agent.initial_state(2), None
    for _ in range(4):
        action, state, _ = agent.act(rows, state, "greedy")
        action2, state2 = policy({"image": rows["image"]}, state2)
        assert np.array_equal(action, action2)
        rows = envs.step(action)
    envs.close()


def test_agent_equals_population(copy):
    """The same returns from HaAgent.act as from the batched play of the controller stage."""
    from fastwm.loops.ha_world import play

    config, agent, _, _ = assemble.load_run(str(copy), "best")
    lanes = assemble_ha.real_lanes(config, [4, 9])
    rows, state, total = lanes.reset(), agent.initial_state(2), np.zeros(2, np.float32)
    for _ in range(7):
        action, state, _ = agent.act(rows, state, "greedy")
        lanes.send(action, np.arange(2))
        rows = lanes.receive()
        total += rows["reward"]
    lanes.close()
    run = assemble_ha.make_run(config, copy)
    worlds = assemble_ha.real_worlds(run, agent.policy, [4, 9], 1)
    returns, _ = play(worlds, agent.policy.controller, agent.policy.params[None], limit=7)
    for world in worlds:
        world.close()
    run.logger.close()
    np.testing.assert_allclose(returns[0], total, rtol=1e-5)


@pytest.mark.parametrize("names", [["ha"], ["ha", "paper"], ["ha", "debug"]])
def test_a_car_that_is_told_nothing_does_not_brake(names):
    config = settings.load(names)[0]
    code = ActionCode.of(config.ctrl.action, Space("continuous", (3,)))
    action = code.code(torch.zeros(1, 3))
    assert action.tolist() == [[0.0, 0.5, 0.0]]
    assert code.low().tolist() == [-1, 0, 0]  # random driving, too, has a brake from 0 to 1


# --------------------------------------------------------------------------------------- learning


def aligned_store(folder, steps: int = 13) -> tuple[EpisodeStore, np.ndarray]:
    """Episodes of a world where the next z is this one plus the action."""
    random, latents = np.random.default_rng(0), []
    store = EpisodeStore.create(folder, (64, 64, 3), 3)
    for _ in range(150):
        action = random.uniform(-1, 1, (steps, 3))
        z = np.concatenate([np.zeros((1, 3)), np.cumsum(action[:-1], 0)])
        latents.append(np.concatenate([z, np.zeros((steps, 1))], 1))
        image = np.zeros((steps, 64, 64, 3), np.uint8)
        store.append(image, action.astype(np.float32), z[:, 0].astype(np.float32), False)
    return store, np.concatenate(latents).astype(np.float16)


def test_memory_learns_which_action_led_where(tmp_path):
    """z' = z + a: M must come near the noise floor, and the action that it reads must be the one
    that moves the z it predicts. Rows off by one leave the first prediction without its action."""
    run_folder = tmp_path / "run"
    store, mu = aligned_store(run_folder / "data")
    std = 0.05
    logvar = np.full_like(mu, 2 * np.log(std))
    (run_folder / "latents").mkdir()
    np.save(run_folder / "latents" / "mu.npy", mu)
    np.save(run_folder / "latents" / "logvar.npy", logvar)
    index = {"vae": 0, "rows": store.rows, "latent": 4}
    (run_folder / "latents" / "index.json").write_text(json.dumps(index))
    config = config_of(
        *"--rnn.epochs 5 --rnn.updates 100 --rnn.batch_size 16 --rnn.batch_length 12".split(),
        *"--rnn.hidden 64 --rnn.lr 5e-3 --num_test_files 8 --rnn.sample_interval 0".split(),
        *"--rnn.lr_decay 0.992 --rnn.mixtures 1".split(),
    )
    run = assemble_ha.make_run(config, run_folder)
    rnn = MDNRNN(4, 3, 64, 1)
    fit_rnn(run, rnn, ConvVAE(4))
    run.logger.close()
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    # The noise of both z is left: 0.5 log(2 pi e 2 std^2).
    floor = 0.5 * np.log(2 * np.pi * np.e * 2 * std**2)
    assert floor - 0.05 < rows[-1]["rnn/test_nll"] < floor + 0.6
    half = torch.cat([0.5 * torch.eye(3), -0.5 * torch.eye(3)])  # each action forth and back
    x = rnn.eval().features(torch.zeros(6, 4), half)
    moved = rnn.predict(rnn.step(x, rnn.initial(6))[0]).mean[..., 0]
    assert ((moved[:3] - moved[3:])[:, :3] - torch.eye(3)).abs().max() < 0.3


def test_early_stopping_counts_and_remembers():
    stop = EarlyStopping(1)
    assert [stop(x) for x in (3.0, 2.0, 2.5)] == [True, True, False] and not stop.over
    other = EarlyStopping(1)
    other.load_state_dict(stop.state_dict())
    assert not other(2.1) and other.over


def test_early_stopping_and_plateaus_end_the_stage(tmp_path, capsys):
    flags = "--vae.lr 0 --vae.early_stopping_patience 1 --vae.scheduler_patience 0".split()
    assert ha(tmp_path, "--stage", "collect,vae", "--vae.epochs", "9", *flags) == 0
    # The first is the best; the test noise is always the same, so the second and third are not.
    stored = checkpoint.load(tmp_path / "vae" / "checkpoint.tar")
    assert stored["epoch"] == 3 and checkpoint.load(tmp_path / "vae" / "best.tar")["epoch"] == 1
    assert stored["scheduler"]["_last_lr"] == [0.0] and stored["earlystopping"]["bad"] == 2


@pytest.mark.parametrize("kind", ["brownian", "held", "mixed", "white"])
def test_random_policies_stay_in_range_and_move(kind):
    random = RandomActions(kind, ActionCode.of("car"), 8, seed=1)
    found = np.stack([random.step() for _ in range(200)])
    assert found[..., 0].min() < -0.3 and found[..., 1:].min() >= 0 and found.max() <= 1
    change = np.abs(np.diff(found, axis=0)).max(-1)
    same = (change == 0).mean()
    expected = {"brownian": change.max() < 1.0, "held": 0.6 < same < 0.9,
                "mixed": 0.9 < same < 0.99, "white": same == 0}  # fmt: skip
    assert expected[kind]


# --------------------------------------------------------------------------------------- mistakes


def refused(capsys, run, *flags: str) -> str:
    assert ha(run, *flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--stage", "vae"], "expected a folder with index.json, got .*data; collect some"),
        (["--stage", "rnn"], "expected a folder with index.json"),
        (["--stage", "ctrl"], "expected .*vae/best.tar, found none; run --stage vae first"),
        (["--test"], "expected .*vae/best.tar, found none"),
        (["--stage", "draem"], "stage: expected all, or some of collect, vae"),
        (["--task", "cartpole"], "expected one observation of kind image"),
        (["--task", "atari_pong"], "expected an action space of 3 continuous .* got discrete"),
        (["--env.rows", "200"], "env.rows: expected at most the 96 rows"),
        (["--ctrl.samples", "1,2,3"], "ctrl.samples: expected one number, or one for each"),
        (["--ctrl.world", "dream"], "rnn.done: expected true"),
        (["--collect.episodes", ""], "collect.episodes: expected at least one number"),
        (["--rounds", "2", "--rnn.episodes", "1,2"], "rnn.episodes: expected 0 as the second"),
        (["--vae.episodes", "3,2"], "vae.episodes: expected two numbers, the second larger"),
        (["--collect.policy", "held,white"], "collect.policy: expected one name, or one for each"),
        (["--collect.min_length", "99"], "expected an episode of at least .* 99"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, capsys, flags, text):
    assert re.search(text, refused(capsys, tmp_path / "run", *flags))


def test_a_dream_needs_m_whatever_the_controller_sees(tmp_path, capsys):
    dream = "--ctrl.world dream --rnn.done true --ctrl.inputs z".split()
    assert ha(tmp_path, "--stage", "collect,vae,latents", *dream) == 0
    text = refused(capsys, tmp_path, "--stage", "ctrl", *dream)
    assert re.search(r"expected .*mdrnn/best.tar, found none", text)


def test_frames_of_another_size_are_refused(tmp_path, capsys):
    store = EpisodeStore.create(tmp_path / "data", (32, 32, 3), 3)
    store.append(np.zeros((4, 32, 32, 3), np.uint8), np.zeros((4, 3)), np.zeros(4), False)
    before = contents(tmp_path / "data")
    run, data = tmp_path / "run", ["--data_dir", str(tmp_path / "data")]
    text = refused(capsys, run, "--stage", "vae", *data)
    assert re.search(r"expected pictures of shape \(64, 64, 3\) .* got \(32, 32, 3\)", text)
    assert "expected pictures (64, 64, 3)" in refused(capsys, run, "--stage", "collect", *data)
    assert contents(tmp_path / "data") == before


def test_a_checkpoint_of_another_latent_size_is_refused(copy, capsys):
    before = contents(copy)
    text = refused(capsys, copy, "--vae.latent", "8")
    assert "belongs to another configuration: vae.latent 4 -> 8" in text
    assert contents(copy) == before
    other = ConvVAE(8)  # a file from elsewhere under the right name
    parts = checkpoint.load(copy / "vae" / "best.tar")
    parts |= {"state_dict": other.state_dict(), "options": other.options()}
    checkpoint.save(copy / "vae" / "best.tar", parts)
    assert re.search(
        "expected .*best.tar to fit .* latent 8, not 4", refused(capsys, copy, "--test")
    )
    del parts["options"]
    checkpoint.save(copy / "vae" / "best.tar", parts)
    assert "expected weights of ConvVAE" in refused(capsys, copy, "--test")


def test_weights_of_a_compiled_model_load(copy):
    parts = checkpoint.load(copy / "vae" / "best.tar")
    state = {f"_orig_mod.{key}": value for key, value in parts["state_dict"].items()}
    checkpoint.save(copy / "vae" / "best.tar", parts | {"state_dict": state})
    assert ha(copy, "--test") == 0


def test_latents_of_another_v_are_made_again(copy, capsys):
    parts = checkpoint.load(copy / "vae" / "best.tar")
    torch.manual_seed(5)
    checkpoint.save(copy / "vae" / "best.tar", parts | {"state_dict": ConvVAE(4).state_dict()})
    assert ha(copy, "--stage", "latents") == 0
    assert "33 rows in" in capsys.readouterr().out
    text = refused(capsys, copy, "--stage", "rnn", "--rnn.epochs", "2")
    assert "it learned from other data" in text
