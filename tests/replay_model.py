"""What the replay tests share: rows that tell where they are from, and the choice of backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastwm import ops
from fastwm import replay as replay_module
from fastwm.replay import Replay

BACKENDS = ("numpy", "native")
DEVICE = {"storage": "cuda", "device": "cpu", "gather": ops.gather_windows}


def choose(monkeypatch, name):
    """ "device": rings as on a GPU, but on the CPU, wherever a test does not say otherwise."""
    if name == "device":
        for setting, value in DEVICE.items():
            monkeypatch.setitem(Replay.__init__.__kwdefaults__, setting, value)
    elif name == "numpy":
        monkeypatch.setattr(replay_module, "_replay", None)
    elif replay_module._replay is None:
        pytest.skip("fastwm._replay is not built")


def ring_of(replay, name):
    """A copy of a ring as numpy, bfloat16 as its bits."""
    key = replay.keys[name]
    if isinstance(key.ring, np.ndarray):
        return key.ring.copy()
    flat = key.ring.cpu().clone().reshape(-1).view(torch.uint8).numpy()
    return flat.view(key.numpy).reshape(key.ring.shape)


def spec(actions=3, deter=5, stoch=2, stoch_dtype="uint8"):
    found = {
        "image": ((2, 3, 1), "uint8"),
        "position": ((3,), "float32"),
        "action": ((actions,), "float32"),
        "reward": ((), "float32"),
        "is_first": ((), "bool"),
        "is_last": ((), "bool"),
        "is_terminal": ((), "bool"),
    }
    if deter:
        found |= {"deter": ((deter,), "bfloat16"), "stoch": ((stoch,), stoch_dtype)}
    return found


def row(env, time, actions=3, deter=5, stoch=2, episode=6):
    """The row that env `env` produces at its time `time`; every value tells where it is from."""
    rng = np.random.default_rng([env, time])
    return {
        "image": rng.integers(0, 256, (2, 3, 1), dtype=np.uint8),
        "position": rng.normal(size=3).astype(np.float32),
        "action": rng.normal(size=actions).astype(np.float32),
        "reward": np.float32(1000 * env + time),
        "is_first": np.bool_((time + env) % episode == 0),
        "is_last": np.bool_((time + env) % episode == episode - 1),
        "is_terminal": np.bool_((time + env) % (2 * episode) == episode - 1),
        "deter": rng.normal(size=deter).astype(np.float32),
        "stoch": rng.integers(0, 200, stoch).astype(np.uint8),
    }


def rows_of(envs, times, **sizes):
    parts = [row(env, time, **sizes) for env, time in zip(envs, times, strict=True)]
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def filled(num_envs=3, rows=20, capacity=36, length=4, **settings):
    replay = Replay(spec(), num_envs, capacity, length, **settings)
    for time in range(rows):
        replay.add(rows_of(range(num_envs), [time] * num_envs))
    return replay
