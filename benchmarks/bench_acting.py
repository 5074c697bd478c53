"""Acting: a whole decision of the agent, from rows of numpy to actions and the latents to store.

Packed weights and the layers themselves take turns in one process. extra_info: cpu_ms, processor
time of a decision (median), which other programs hardly disturb.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastwm import config as configs
from fastwm.agents.dreamer import DreamerAgent
from fastwm.agents.policy import RecurrentPolicy
from fastwm.spaces import Space

OBS = {
    "vector": {"vector": Space("vector", (24,))},
    "image": {"image": Space("image", (64, 64, 3))},
}
ACT = {"discrete": Space("discrete", (), (6,)), "continuous": Space("continuous", (6,))}


def make_decide(
    size: str, obs: str, act: str, envs: int, device: str = "cpu", **settings: str
) -> Callable[[], None]:
    """A decision for `envs` environments, each from the state that the last one left."""
    config = configs.resolve("dreamerv3", [size], settings)[0]
    agent = DreamerAgent(OBS[obs], ACT[act], config, device=device)
    rng, (key, space) = np.random.default_rng(0), next(iter(OBS[obs].items()))
    rows = {"reward": np.zeros(envs, np.float32), "is_first": np.zeros(envs, bool)}
    image = rng.integers(0, 256, (envs, *space.shape), np.uint8)
    rows[key] = image if obs == "image" else rng.normal(size=(envs, 24)).astype(np.float32)
    state = agent.initial_state(envs)

    def decide() -> None:
        nonlocal state
        _, state, _ = agent.act(rows, state, "train")

    return decide


@pytest.mark.parametrize("path", ["packed", "plain"])
@pytest.mark.parametrize("act", ACT)
@pytest.mark.parametrize(
    "size, obs", [("size1m", "vector"), ("size1m", "image"), ("size12m", "vector")]
)
def test_act(benchmark, monkeypatch, size, obs, act, path, envs=16):
    if path == "plain":
        monkeypatch.setattr(RecurrentPolicy, "packed", lambda self, actor: None)
    decide, spent = make_decide(size, obs, act, envs), []
    benchmark.group = f"{size} {obs} {act}, {envs} environments, {torch.get_num_threads()} threads"

    def ten() -> None:
        before = time.process_time()
        for _ in range(10):
            decide()
        spent.append((time.process_time() - before) * 100)

    benchmark.pedantic(ten, rounds=40, warmup_rounds=3)
    benchmark.extra_info["cpu_ms"] = round(float(np.median(spent)), 3)
