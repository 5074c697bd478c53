"""Memory: an update leaves nothing behind, and the fused sequence holds no more than the loop."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from test_dreamer import random_batch, tiny_agent
from torch.profiler import ProfilerActivity, profile

from fastwm import ops
from fastwm.ops import _rssm_fused
from fastwm.rssm import RSSM

STATM = Path("/proc/self/statm")


def resident() -> int:
    """Bytes of this process in memory."""
    return int(STATM.read_text().split()[1]) * 4096


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


@pytest.mark.slow  # a thousand updates
@pytest.mark.skipif(not STATM.exists(), reason="needs /proc")
def test_a_thousand_updates_leave_nothing_behind():
    torch.use_deterministic_algorithms(False)  # poisoning memory takes longer than the updates
    thin = {f"{part}.layers": 1 for part in "encoder decoder actor critic".split()}
    agent = tiny_agent(imag_horizon=1, **thin)
    batch = random_batch(agent, 2, 3)
    for _ in range(300):
        agent.update(batch)
    count, before = tensors(), resident()
    for _ in range(700):
        agent.update(batch)
    assert tensors() <= count  # fewer: what earlier tests left was freed meanwhile
    assert resident() - before < 700 * 1024  # less than a KiB an update


STEADY = """
import resource, statistics, sys
import torch
from test_dreamer import random_batch, tiny_agent
from fastwm import assemble
torch.set_num_threads(1)
agent = tiny_agent(imag_horizon=15, **{"rssm.deter": 512})
batch = random_batch(agent, 16, 64)
def faults(updates):
    found = []
    for _ in range(updates):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        agent.update(batch)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return found
print(statistics.mean(faults(5)))
assemble.keep_freed_memory()
print(statistics.median(faults(10)[3:]))
"""


@pytest.mark.slow  # updates of a real size: small tensors never go back to the system
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is kept by glibc's malloc")
def test_steady_updates_get_no_memory_from_the_system():
    """What one update has freed is what the next one takes: no page is mapped anew."""
    command = [sys.executable, "-c", STEADY]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    usual, kept = map(float, done.stdout.split())
    assert kept <= 20 < usual


def peak(call) -> int:
    """The most bytes that tensors took at once while `call` ran, beyond what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = found.profiler.kineto_results.events()
    changes = [e.nbytes() for e in events if e.name() == "[memory]"]
    return max(accumulate(changes))


@pytest.mark.parametrize("loops", ["compiled", "PyTorch"])
def test_the_sequence_takes_at_most_half_more_than_the_plain_loop(loops, monkeypatch):
    """Forward and backward, with all that is saved in between; half as many rows take half."""
    if loops == "PyTorch":
        monkeypatch.setattr(_rssm_fused, "loops", lambda like: None)
    sizes = {"deter": 128, "hidden": 32, "stoch": 16, "classes": 4, "blocks": 4, "unimix": 0.01}
    model = RSSM(32, 3, dynlayers=1, obslayers=1, imglayers=1, **sizes)
    leaves = [p for n, p in model.named_parameters() if not n.startswith("prior")]

    def train(function, rows: int = 8, length: int = 16) -> None:
        deter, stoch = model.initial(rows)
        tokens, action = torch.randn(rows, length, 32), torch.rand(rows, length, 3)
        first, noise = torch.rand(rows, length) < 0.1, torch.rand(rows, length, 16)
        args = (deter, stoch, tokens.requires_grad_(), action, first, noise, 0.01)
        out = function(model.weights(), *args)
        torch.autograd.grad(sum(x.square().sum() for x in out), [*leaves, tokens])

    train(ops.rssm_observe)  # sets libraries up
    ours = peak(lambda: train(ops.rssm_observe))
    assert ours <= 1.5 * peak(lambda: train(ops.rssm_observe_ref))
    assert peak(lambda: train(ops.rssm_observe, rows=4)) < 0.75 * ours  # it does count rows
