"""Minecraft through MineRL 0.4, best effort: the package needs Java 8 and an old Python.

The 25 actions and the 12 rewarded items are those that DreamerV3 was published with. What it
changed inside the game (faster digging) is not part of MineRL and not done here. The adapter is
tested with a stand-in that has MineRL's spaces; it was never run with the game.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from fastwm.envs.base import MissingPackageError, UnknownTaskError

PIP = "minerl==0.4.4 (Python 3.9 or older, Java 8)"
MILESTONES = (
    "log planks stick crafting_table wooden_pickaxe cobblestone stone_pickaxe iron_ore furnace "
    "iron_ingot iron_pickaxe diamond"
).split()
TURN = 15.0  # degrees
ACTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"attack": 1},
    {"camera": (-TURN, 0.0)},
    {"camera": (TURN, 0.0)},
    {"camera": (0.0, -TURN)},
    {"camera": (0.0, TURN)},
    {"forward": 1},
    {"back": 1},
    {"left": 1},
    {"right": 1},
    {"jump": 1, "forward": 1},
    {"place": "dirt"},
    {"craft": "planks"},
    {"craft": "stick"},
    {"craft": "crafting_table"},
    {"place": "crafting_table"},
    {"nearbyCraft": "wooden_pickaxe"},
    {"nearbyCraft": "stone_pickaxe"},
    {"nearbyCraft": "iron_pickaxe"},
    {"equip": "wooden_pickaxe"},
    {"equip": "stone_pickaxe"},
    {"equip": "iron_pickaxe"},
    {"nearbyCraft": "furnace"},
    {"place": "furnace"},
    {"nearbySmelt": "iron_ingot"},
)
STICKY = {"attack": 30, "jump": 10}  # decisions that a key stays down


def minecraft_factory(who: str, name: str, length: int) -> Callable[[], Any]:
    """A function that makes one world. name: "diamond". length: in decisions."""
    if name != "diamond":
        raise UnknownTaskError(f"envs.make: expected minecraft_diamond, got {who!r}")
    try:
        importlib.import_module("minerl")
        gym = importlib.import_module("gym")
    except ImportError as error:
        raise MissingPackageError(
            f"{who}: expected the package 'minerl' to be installed, got {error}; it needs {PIP}"
        ) from error
    return lambda: MinecraftEnv(gym.make("MineRLObtainDiamond-v0"), length)


class MinecraftEnv:
    """One world: picture, inventory (also the most ever held), equipped tool; 25 actions.

    Reward: 1 for each of MILESTONES the first time in an episode that it is in the inventory.
    env: what MineRL's gym.make returned. Death is terminal, the end of `length` a truncation.
    """

    render_mode = "rgb_array"

    def __init__(self, env: Any, length: int) -> None:
        from gymnasium import spaces

        self._env, self._length = env, length
        self._items = sorted(env.observation_space.spaces["inventory"].spaces)
        self._tools = ("none", "wooden_pickaxe", "stone_pickaxe", "iron_pickaxe")
        shape = env.observation_space.spaces["pov"].shape
        count = (len(self._items),)
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, shape, np.uint8),
                "inventory": spaces.Box(0, np.inf, count, np.float32),
                "inventory_max": spaces.Box(0, np.inf, count, np.float32),
                "equipped": spaces.Discrete(len(self._tools)),
            }
        )
        self.action_space = spaces.Discrete(len(ACTIONS))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        if seed is not None:
            self._env.seed(seed)
        obs = self._env.reset()
        self._steps, self._held, self._found = 0, {}, set()
        self._most = np.zeros(len(self._items), np.float32)
        return self._observe(obs), {}

    def step(self, action: Any) -> tuple:
        obs, _, done, info = self._env.step(self._native(ACTIONS[int(action)]))
        self._steps += 1
        seen = self._observe(obs)
        fresh = {n for n in MILESTONES if obs["inventory"].get(n, 0) > 0} - self._found
        self._found |= fresh
        over = self._steps >= self._length
        return seen, float(len(fresh)), bool(done) and not over, over, info

    def _native(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """MineRL's whole action, with keys that stay down for a while."""
        action = self._env.action_space.no_op()
        for key in STICKY:
            self._held[key] = STICKY[key] if wanted.get(key) else self._held.get(key, 0) - 1
            if self._held[key] > 0:
                action[key] = 1
        action.update(wanted)
        if "camera" in wanted:
            action["camera"] = np.asarray(wanted["camera"], np.float32)
        return action

    def _observe(self, obs: dict[str, Any]) -> dict[str, Any]:
        counts = np.array([obs["inventory"].get(n, 0) for n in self._items], np.float32)
        self._most = np.maximum(self._most, counts)
        self._image = obs["pov"]
        tool = obs.get("equipped_items", {}).get("mainhand", {}).get("type", "none")
        equipped = self._tools.index(tool) if tool in self._tools else 0
        return {
            "image": self._image,
            "inventory": np.log1p(counts),
            "inventory_max": np.log1p(self._most),
            "equipped": equipped,
        }

    def render(self) -> np.ndarray:  # (64, 64, 3) uint8
        return self._image

    def close(self) -> None:
        self._env.close()
