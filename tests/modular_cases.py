"""A small modular agent and a batch for it, shared by its tests."""

import numpy as np
import torch

from fastwm import config as cfg
from fastwm.agents.modular import ModularAgent
from fastwm.spaces import Space

SMALL = {
    "imagination_horizon": 5,
    "world_model_warmup_steps": 0,
    "openloop_every": 0,
    "representation.options.size": 6,
    **{
        f"{slot}.options.hidden": [8]
        for slot in ("encoder", "dynamics", "reward", "cont", "decoder", "policy", "value")
    },
}
OBS = {"vector": Space("vector", (4,)), "mode": Space("discrete", (), (3,))}
DISCRETE, CONTINUOUS = Space("discrete", (), (2,)), Space("continuous", (2,))


def make_agent(act_space=DISCRETE, obs_space=OBS, **settings) -> ModularAgent:
    """settings: flat, with __ for dots; SLOT__options replaces all options of a slot."""
    given = {key.replace("__", "."): value for key, value in settings.items()}
    fresh = tuple(f"{key}." for key in given if key.endswith(".options"))
    keys = {k: v for k, v in SMALL.items() if not fresh or not k.startswith(fresh)} | given
    config = cfg.from_dict({"algorithm": "modular", **keys})
    return ModularAgent(obs_space, act_space, config, seed=3)


def make_batch(act_space=DISCRETE, size=3, length=7, seed=0) -> dict[str, torch.Tensor]:
    """Rows in which episodes end, by themselves and by a cut."""
    random = np.random.default_rng(seed)
    flags = {name: torch.zeros(size, length, dtype=torch.bool) for name in ("first", "last", "end")}
    flags["last"][0, 2] = flags["end"][0, 2] = flags["first"][0, 3] = True
    flags["last"][1, 4] = flags["first"][1, 5] = True
    if act_space.kind == "discrete":
        action = torch.from_numpy(random.integers(0, 2, (size, length)).astype(np.int32))
    else:
        shape = (size, length, *act_space.shape)
        action = torch.from_numpy(random.uniform(-1, 1, shape).astype(np.float32))
    return {
        "vector": torch.from_numpy(random.normal(size=(size, length, 4)).astype(np.float32)),
        "mode": torch.from_numpy(random.integers(0, 3, (size, length)).astype(np.int32)),
        "prev_action": action,
        "reward": torch.from_numpy(random.normal(size=(size, length)).astype(np.float32)),
        "is_first": flags["first"],
        "is_last": flags["last"],
        "is_terminal": flags["end"],
    }


def grads(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}


def group_of(agent: ModularAgent) -> dict[str, torch.nn.Module]:
    return {
        "world_model": agent.model.world,
        "actor": agent.model.policy,
        "critic": agent.model.value,
    }
