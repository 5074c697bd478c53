"""Decisions as one graph; here a tape on the CPU plays it, see test_cudagraph.py."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import trees
from test_cudagraph import Syncs, TapeRecorder, tensors
from test_dreamer import CONTINUOUS, DISCRETE, IMAGE, MULTI, PROPRIO, random_batch, tiny_config

from fastwm import assemble, rssm
from fastwm import config as configs
from fastwm.agents.acting import GraphedActing, Parcel
from fastwm.agents.dreamer import DreamerAgent
from fastwm.agents.dreamer_2023 import DreamerAgent2023
from fastwm.agents.policy import RecurrentPolicy
from fastwm.cudagraph import WARMUP
from fastwm.loops import online
from fastwm.spaces import Space

BOTH = IMAGE | PROPRIO
COUNTED = {"place": Space("discrete", (2,), (3, 4)), "vector": Space("vector", (5,))}
STEPS = WARMUP + 6


class Waits(TapeRecorder):
    waited = 0

    def wait(self):
        self.waited += 1


@pytest.fixture(autouse=True)
def unpacked(monkeypatch):
    """As on a GPU, where the layers read the weights themselves: packed ones would be on the tape
    as they were."""
    monkeypatch.setattr(RecurrentPolicy, "packed", lambda self, actor: None)
    monkeypatch.setattr(rssm, "packed_posterior", lambda weights, groups: None)


def make(obs=PROPRIO, act=DISCRETE, keep=False, fail=False, **values):
    """An agent that acts as it is, and the same with graphs."""
    agents = [DreamerAgent(obs, act, tiny_config(**values), seed=3) for _ in range(2)]
    return agents[0], graph(agents[1], keep, fail)


def graph(agent, keep=False, fail=False):
    agent.acting = GraphedActing(agent.decide, torch.Generator(), Waits(fail), keep)
    return agent


def rows_of(agent, rng, count=3, first=None):
    rows = {"is_first": rng.random(count) < 0.3 if first is None else np.full(count, first)}
    for key, space in agent.obs_space.items():
        shape = (count, *space.shape)
        if space.kind == "image":
            rows[key] = rng.integers(0, 256, shape, np.uint8)
        elif space.kind == "discrete":
            rows[key] = rng.integers(0, space.classes, shape).astype(np.int32)
        else:
            rows[key] = rng.normal(size=shape).astype(np.float32)
    return rows


def play(agent, mode, steps=STEPS, count=3, source=None, seed=0, state=None):
    """What every step gave, and the last state; resets in between."""
    rng, found = np.random.default_rng(seed), []
    state = agent.initial_state(count) if state is None else state
    for step in range(steps):
        action, state, latents = agent.act(
            rows_of(agent, rng, count, True if step == 0 else None), state, mode, source
        )
        found.append(
            {"action": torch.from_numpy(action)} | state | {f"l{k}": latents[k] for k in latents}
        )
    return found, state


def same(expected, actual):
    for step, (want, got) in enumerate(zip(expected, actual, strict=True)):
        assert list(want) == list(got)
        for key in want:
            assert want[key].dtype == got[key].dtype
            assert torch.equal(want[key], got[key]), f"{key} of step {step}"


def moving(found):
    """Whether something happens at all; where all begin anew, the state is that of the start."""
    return len({step["deter"].sum().item() for step in found}) >= len(found) - 2


@pytest.mark.parametrize("mode", ["train", "greedy", "sample"])
@pytest.mark.parametrize(
    "obs, act",
    [(PROPRIO, DISCRETE), (PROPRIO, MULTI), (PROPRIO, CONTINUOUS), (IMAGE, DISCRETE),
     (BOTH, CONTINUOUS), (COUNTED, DISCRETE)],
)  # fmt: skip
def test_recorded_steps_equal_eager_ones(obs, act, mode, variant):
    plain, graphed = make(obs, act)
    expected, _ = play(plain, mode)
    actual, _ = play(graphed, mode)
    recorder = graphed.acting.recorder
    assert (recorder.recorded, recorder.replayed, recorder.waited) == (1, STEPS - WARMUP, STEPS)
    assert moving(expected)
    same(expected, actual)
    assert torch.equal(plain.act_generator.get_state(), graphed.act_generator.get_state())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_updates_and_loaded_weights_are_seen(precision):
    plain, graphed = make(precision=precision)
    sheets = []
    for agent in (plain, graphed):
        torch.manual_seed(5)
        found, state = play(agent, "train")
        for _ in range(4):
            agent.update(random_batch(agent))
        more, state = play(agent, "train", 3, state=state)
        agent.load_state_dict(
            {
                **agent.state_dict(),
                "model": {k: v + 0.1 for k, v in agent.model.state_dict().items()},
            }
        )
        last, _ = play(agent, "train", 3, state=state)
        sheets.append(found + more + last)
    same(*sheets)
    assert graphed.acting.recorder.recorded == 1
    # and it matters: the first weights would have given something else
    stale, _ = play(make(precision=precision)[0], "train", STEPS + 3)
    assert not torch.equal(stale[-1]["deter"], sheets[0][STEPS + 2]["deter"])


def test_evaluations_of_another_width_interleave():
    """Two runs of states, two generators, three graphs: nothing of one shows in the other."""
    plain, graphed = make()
    sheets = []
    for agent in (plain, graphed):
        found, state = play(agent, "train")
        for seed in (1, 2):
            source = torch.Generator().manual_seed(seed)
            found += play(agent, "greedy", STEPS, 2, source, seed)[0]
            found += play(agent, "sample", 2, 3, source, seed)[0]
            more, state = play(agent, "train", 3, seed=seed, state=state)
            found += more
        sheets.append(found)
    same(*sheets)
    assert graphed.acting.recorder.recorded == 3
    assert torch.equal(plain.act_generator.get_state(), graphed.act_generator.get_state())


@pytest.mark.parametrize("keep", [False, True])
def test_nothing_handed_out_changes_later(keep):
    _, graphed = make(act=CONTINUOUS, keep=keep)
    rng, state, held = np.random.default_rng(0), graphed.initial_state(3), []
    for _ in range(STEPS):
        result = graphed.act(rows_of(graphed, rng), state, "train")
        state = result[1]
        held.append((result, [np.array(x) for x in flat(result)]))
    for result, before in held:
        assert all(np.array_equal(a, b) for a, b in zip(flat(result), before, strict=True))


def flat(result):
    action, state, latents = result
    return [action, *(x.float().numpy() for x in tensors((state, latents)))]


def test_a_state_serves_again_as_often_as_wanted():
    """An old state, a stored one, and one that the caller has written into."""
    plain, graphed = make()
    for agent in (plain, graphed):
        play(agent, "greedy")
    source, rows = torch.Generator(), rows_of(plain, np.random.default_rng(4), first=False)
    _, state = play(plain, "sample", source=source)
    file = io.BytesIO()
    torch.save(state, file)
    assert len(file.getvalue()) < 2 * sum(x.nbytes for x in state.values()) + 4000
    file.seek(0)
    loaded, written = torch.load(file), {key: value.clone() for key, value in state.items()}
    written["deter"].mul_(0.5)
    for given in (state, loaded, written, state):
        results = []
        for agent in (plain, graphed):
            action, after, latents = agent.act(rows, given, "greedy", source.manual_seed(1))
            results.append({"action": torch.from_numpy(action)} | after | latents)
        same([results[0]], [results[1]])
    assert graphed.acting.recorder.recorded == 1


def test_random_actions_and_the_explorer():
    """Random ones need no graph; the explorer's actor has its own."""
    plain, graphed = make(**{"expl.behavior": "plan2explore", "expl.until": 60})
    sheets = []
    for agent in (plain, graphed):
        found, state = play(agent, "random", 3)
        sheets.append(found + play(agent, "train", 17 + STEPS, state=state)[0])  # 51 explore
    same(*sheets)
    assert graphed.acting.recorder.recorded == 2
    with pytest.raises(ValueError, match="expected mode to be one of"):
        graphed.act(rows_of(graphed, np.random.default_rng(0)), plain.initial_state(3), "best")


def test_failure_falls_back_once():
    plain, graphed = make(fail=True)
    expected, _ = play(plain, "train")
    with pytest.warns(RuntimeWarning, match="acting could not be recorded as a CUDA graph") as seen:
        actual, _ = play(graphed, "train")
        actual += play(graphed, "greedy")[0]
    assert len([w for w in seen if "CUDA graph" in str(w.message)]) == 1
    same(expected + play(plain, "greedy")[0], actual)


def test_the_agent_of_2023_acts_alike():
    small = {"rssm.deter": 16, "rssm.hidden": 12, "rssm.stoch": 4, "rssm.classes": 4}
    small |= {f"{part}.units": 10 for part in "encoder decoder reward cont actor critic".split()}
    config = configs.resolve("dreamerv3_2023", [], small)[0]
    plain, graphed = (DreamerAgent2023(PROPRIO, CONTINUOUS, config, seed=3) for _ in range(2))
    same(play(plain, "train")[0], play(graph(graphed), "train")[0])
    assert graphed.acting.recorder.recorded == 1


@pytest.mark.parametrize("obs, act", [(BOTH, DISCRETE), (COUNTED, MULTI), (PROPRIO, CONTINUOUS)])
def test_a_decision_never_waits_for_the_device(obs, act):
    agent = graph(DreamerAgent(obs, act, tiny_config(), seed=3))
    rows = {k: torch.from_numpy(v) for k, v in rows_of(agent, np.random.default_rng(0)).items()}
    parcel, acting = Parcel(rows, torch.device("cpu")), agent.acting
    parcel.fill(rows)
    state = [agent.initial_state(3)]
    acting._decide(state, parcel, "train", agent.model.actor)  # makes the parcel home
    with Syncs() as syncs:
        acting._decide(state, parcel, "train", agent.model.actor)
    # one_hot looks at the values of its argument, on CPU tensors only
    assert [line for line in syncs.lines if "one_hot(" not in line] == []


def test_parcels_hold_every_type_and_shape():
    tree = {
        "a": torch.rand(3, 2, 2).to(torch.bfloat16), "b": torch.rand(3) > 0.5,
        "c": torch.rand(3, 5), "d": torch.randint(0, 9, (3, 7), dtype=torch.uint8),
        "e": torch.randint(0, 9, (3,)), "f": torch.rand(3, 1, dtype=torch.float64),
    }  # fmt: skip
    parcel = Parcel(
        {key: torch.zeros_like(value) for key, value in tree.items()}, torch.device("cpu")
    )
    parcel.fill(tree)
    for found in (parcel.send(), parcel.here):
        assert all(torch.equal(found[key], value) for key, value in tree.items())
    other = {key: value.flip(0) for key, value in tree.items()}
    parcel.fetch(other)
    assert all(torch.equal(value, other[key]) for key, value in parcel.take().items())


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_with_graphs_is_the_run_without(tmp_path, keep):
    """Prefill, updates, evaluations in between, and going on from a checkpoint."""
    flags = (
        "dreamerv3 debug --task cartpole --threads 1 --log.tensorboard false --log.every_s 0 "
        "--replay.prefill 24 --eval.every 40 --eval.episodes 2 --eval.envs 2 --log.video_every 0"
    ).split()
    found = []
    for folder, graphs in ((tmp_path / "plain", False), (tmp_path / "graphs", True)):
        for steps in ("88", "160"):
            settings = configs.load([*flags, "--steps", steps])[0]
            stored = assemble.read_folder(settings, folder)[0]
            run = assemble.online_run(settings, folder, stored)
            run.agent = graph(run.agent, keep) if graphs else run.agent
            assert online.train(run, stored) == 0
            run.envs.close()
            run.logger.close()
        assert not graphs or run.agent.acting.recorder.recorded == 2  # training and evaluation
        found.append((run.agent.state_dict(), run.state, run.best, run.replay.sample(4)))
    trees.same(*found)


@pytest.mark.cuda
@pytest.mark.parametrize("obs", [PROPRIO, BOTH])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graph_equals_eager_on_the_gpu(obs, precision):
    config = tiny_config(precision=precision)
    graphed, plain = (DreamerAgent(obs, DISCRETE, config, device="cuda", seed=3) for _ in range(2))
    assert isinstance(graphed.acting, GraphedActing)
    plain.acting = None
    sheets = []
    for agent in (plain, graphed):
        found, state = play(agent, "train")
        found += play(agent, "greedy", STEPS, 2, torch.Generator("cuda").manual_seed(1))[0]
        found += play(agent, "train", 3, state=state)[0]
        sheets.append(found)
    assert not graphed.acting.graphed.failed and len(graphed.acting.graphed.recorded) == 2
    for want, got in zip(*sheets, strict=True):  # to the rounding of the libraries
        for key in want:
            torch.testing.assert_close(got[key], want[key], rtol=2e-2, atol=2e-2)
