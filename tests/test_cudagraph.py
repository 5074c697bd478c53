"""Updates as one graph. Here the "graph" is a tape on the CPU: it keeps every operation with the
tensors it read and wrote, and running it again touches the same memory and no Python, as CUDA does.
"""

from __future__ import annotations

import traceback

import pytest
import torch
from test_dreamer import (
    CONTINUOUS,
    DISCRETE,
    IMAGE,
    PROPRIO,
    random_batch,
    tiny_agent,
    tiny_config,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastwm.agents.dreamer import DreamerAgent
from fastwm.cudagraph import WARMUP, Graphed

aten = torch.ops.aten
# What waits for a GPU to hand over a value, or needs one to know a shape.
SYNCS = {
    "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique_dim",
    "_unique2", "unique_consecutive", "allclose", "repeat_interleave", "bincount",
}  # fmt: skip


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Tape(TorchDispatchMode):
    """Keeps what runs; `play` runs it again on the same memory."""

    def __init__(self):
        super().__init__()
        self.entries = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.entries.append((func, args, kwargs or {}, out))
        return out

    def play(self):
        with torch.no_grad():
            for func, args, kwargs, out in self.entries:
                read = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
                made = tensors(out)
                if all(x.untyped_storage().data_ptr() in read for x in made) and not (
                    func._schema.is_mutable
                ):
                    continue  # a view
                for old, new in zip(made, tensors(func(*args, **kwargs)), strict=True):
                    if old is not new and "empty" not in func.__name__:
                        old.copy_(new)


class TapeRecorder:
    """Has the interface of CudaRecorder. To record is to run once, so the first replay is due."""

    def __init__(self, fail=False):
        self.fail, self.recorded, self.replayed = fail, 0, 0

    def eager(self, function):
        return function()

    def record(self, function):
        if self.fail:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.recorded += 1
        with Tape() as tape:
            result = function()
        plays = iter([lambda: None])

        def replay():
            self.replayed += 1
            next(plays, tape.play)()

        return result, replay


def run(agent, batches):
    """Metrics and latents of updates, and the state they leave."""
    results = [agent.update({k: v.clone() for k, v in batch.items()}) for batch in batches]
    return results, agent.state_dict()


def compare(expected, actual):
    """Metrics and latents of every update, bit for bit."""
    for step, (want, got) in enumerate(zip(expected, actual, strict=True)):
        for one, two in zip(want, got, strict=True):
            assert list(one) == list(two)
            for key in one:
                assert torch.equal(one[key], two[key]), f"{key} of update {step}"
                assert one[key].dtype == two[key].dtype


CASES = {
    "vector": {},
    "image": {"obs_space": IMAGE},
    "continuous": {"act_space": CONTINUOUS},
    "slow copy now and then": {"critic.slow_every": 3},
    "warm-up and annealing": {"optim.schedule": "linear", "optim.warmup": 3, "optim.anneal": 9},
}


@pytest.mark.parametrize("case", CASES)
def test_replayed_updates_equal_eager_ones(case):
    """Nothing that an update reads stays behind in Python: counters, rates, noise, the batch."""
    plain, graphed = tiny_agent(**CASES[case]), tiny_agent(**CASES[case])
    recorder = TapeRecorder()
    graphed.step = Graphed(graphed.updates_on_device, recorder, "the update")
    torch.manual_seed(1)
    batches = [random_batch(plain) for _ in range(WARMUP + 4)]
    (expected, state), (actual, other) = run(plain, batches), run(graphed, batches)
    assert (recorder.recorded, recorder.replayed) == (1, 4)
    compare(expected, actual)
    assert state["updates"] == other["updates"] == WARMUP + 4
    for one, two in zip(tensors(state), tensors(other), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("case", ["vector", "slow copy now and then"])
def test_several_updates_of_one_launch_equal_single_ones(case):
    """Every update of a launch sees the weights that the one before it left."""
    plain, graphed = tiny_agent(**CASES[case]), tiny_agent(**CASES[case])
    recorder = TapeRecorder()
    graphed.step = Graphed(graphed.updates_on_device, recorder, "the update")
    torch.manual_seed(1)
    batches = [random_batch(plain) for _ in range(3 * (WARMUP + 2))]
    expected, state = run(plain, batches)
    actual = []
    for i in range(0, len(batches), 3):
        actual += graphed.update_many(batches[i : i + 3])
    assert (recorder.recorded, recorder.replayed) == (1, 2)
    compare(expected, actual)
    norms = [float(metrics["opt/grad_norm"]) for metrics, _ in actual]
    assert len(set(norms)) == len(norms)
    for one, two in zip(tensors(state), tensors(graphed.state_dict()), strict=True):
        assert torch.equal(one, two)


def test_results_are_the_callers_own():
    """A later update does not write over what an earlier one handed out."""
    agent = tiny_agent()
    agent.step = Graphed(agent.updates_on_device, TapeRecorder(), "the update")
    results = [agent.update(random_batch(agent)) for _ in range(WARMUP + 1)]
    metrics, latents = results[-1]
    before = [x.clone() for x in tensors((metrics, latents))]
    agent.update(random_batch(agent))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors((metrics, latents)), strict=True))


def test_every_batch_shape_has_its_graph():
    agent, recorder = tiny_agent(), TapeRecorder()
    agent.step = Graphed(agent.updates_on_device, recorder, "the update")
    for _ in range(WARMUP + 2):
        for rows in (3, 4):
            agent.update(random_batch(agent, rows))
    assert (recorder.recorded, recorder.replayed) == (2, 4)


def test_failure_falls_back_once():
    agent, plain, recorder = tiny_agent(), tiny_agent(), TapeRecorder(fail=True)
    agent.step = Graphed(agent.updates_on_device, recorder, "the update")
    batches = [random_batch(agent) for _ in range(WARMUP + 3)]
    with pytest.warns(RuntimeWarning, match="not permitted when stream is capturing\\); ") as seen:
        _, state = run(agent, batches)
    assert len([w for w in seen if "CUDA graph" in str(w.message)]) == 1
    _, expected = run(plain, batches)
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(expected), strict=True))


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="expected cudagraphs auto or off on device cpu, got on"):
        tiny_agent(cudagraphs="on")


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graph_equals_eager_on_the_gpu(precision):
    """The same noise, the same batches: the same parameters, to the rounding of the libraries."""
    config = tiny_config(precision=precision)
    graphed = DreamerAgent(PROPRIO, DISCRETE, config, device="cuda", seed=3)
    plain = DreamerAgent(PROPRIO, DISCRETE, config, device="cuda", seed=3)
    plain.step = plain.updates_on_device
    assert isinstance(graphed.step, Graphed)
    batches = [random_batch(tiny_agent()) for _ in range(WARMUP + 4)]
    for agent in (graphed, plain):
        for batch in batches:
            metrics, _ = agent.update(batch)
        assert bool(metrics["opt/finite"])
    assert not graphed.step.failed
    assert len(graphed.step.recorded) == 1
    for one, two in zip(graphed.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


class Syncs(TorchDispatchMode):
    """The lines of fastwm that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        masks = [x for x in tensors(args[1:]) if x.dtype == torch.bool]
        if name in SYNCS or (name in ("index", "index_put_", "_index_put_impl_") and masks):
            frames = [f for f in traceback.extract_stack() if "/fastwm/" in f.filename]
            self.lines.append(f"{name}: {frames[-1].line}" if frames else name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_update_never_waits_for_the_device(case, precision):
    agent = tiny_agent(**CASES[case], precision=precision)
    batch = random_batch(agent)
    with Syncs() as syncs:
        agent.update(batch)
    # These look at the values of their arguments, on CPU tensors only.
    checks = ("torch.quantile(", "one_hot(")
    assert [line for line in syncs.lines if not any(check in line for check in checks)] == []
    with Syncs() as syncs:
        float(agent.model.return_norm.range[0])
    assert len(syncs.lines) == 1
