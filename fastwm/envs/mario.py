"""Super Mario Bros. with gymnasium's interface, one stage per environment.

The package must be installed by its user (it brings the game's ROM). Version 7.4 with nes-py 8.2
was written for gym and numpy 1: what numpy 2 breaks is bytes that overflow in sums, mended here.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from fastwm.envs.base import MissingPackageError, UnknownTaskError
from fastwm.envs.oldgym import stand_in

PIP = "nes-py==8.2.1 gym-super-mario-bros==7.4.0"
A, B, LEFT, RIGHT = 0x01, 0x02, 0x40, 0x80  # bits of the controller
# nothing, right, right + jump, right + run, right + jump + run, jump, left
ACTIONS = (0, RIGHT, RIGHT | A, RIGHT | B, RIGHT | A | B, A, LEFT)
FASTEST = 16  # pixels in a frame; a larger jump is a change of the area, not a distance


def mario_factory(
    who: str, name: str, repeat: int, flag: float, clock: float, death: float
) -> Callable[[], Any]:
    """A function that makes one stage. name: "1-1" to "8-4". The rest: see MarioEnv."""
    found = re.fullmatch(r"([1-8])[-_]([1-4])", name)
    if found is None:
        raise UnknownTaskError(f"envs.make: expected mario_1-1 to mario_8-4, got {who!r}")
    stage = (int(found[1]), int(found[2]))
    game = _import_game(who)
    return lambda: MarioEnv(game(target=stage), repeat, flag, clock, death)


def _import_game(who: str) -> Callable[..., Any]:
    """The emulator's class, safe with numpy 2."""
    try:
        with stand_in():
            module = importlib.import_module("nes_py.nes_env")
            game = importlib.import_module("gym_super_mario_bros.smb_env").SuperMarioBrosEnv
    except ImportError as error:
        raise MissingPackageError(
            f"{who}: expected the package 'gym_super_mario_bros' of version 7 to be installed, "
            f"got {error}; run `pip install {PIP}`"
        ) from error
    if not hasattr(module.ROM, "fastwm"):

        class Rom(module.ROM):
            fastwm = True

            @property
            def header(self) -> np.ndarray:
                return self.raw_data[:16].astype(np.int64)

        module.ROM = Rom

    class Game(game):
        def _ram_buffer(self) -> memoryview:
            return memoryview(super()._ram_buffer())  # its elements are Python's integers

    return Game


class MarioEnv:
    """One stage: a picture of 240 x 256, seven actions.

    Reward: pixels walked to the right (never negative), plus `flag` at the flag, minus `clock` for
    every tick of the game's clock, minus `death`. Death and flag are terminal.
    repeat: frames per decision; the picture is the maximum of the last two, against flicker.
    """

    render_mode = "rgb_array"

    def __init__(self, game: Any, repeat: int, flag: float, clock: float, death: float) -> None:
        from gymnasium import spaces

        self._game, self._repeat = game, repeat
        self._flag, self._clock, self._death = flag, clock, death
        self.observation_space = spaces.Box(0, 255, (240, 256, 3), np.uint8)
        self.action_space = spaces.Discrete(len(ACTIONS))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """The game has no randomness of its own: a seed changes nothing."""
        screen = self._game.reset().copy()  # the emulator draws into its array
        self._x, self._time = int(self._game._x_position), int(self._game._time)
        self._screen = screen
        return screen, {}

    def step(self, action: Any) -> tuple:
        total, done, info = 0.0, False, {}
        frames: list[np.ndarray] = []
        for _ in range(self._repeat):
            screen, _, done, info = self._game.step(ACTIONS[int(action)])
            frames = [*frames[-1:], screen.copy()]
            total += self._reward(info)
            if done:
                break
        if info["flag_get"]:
            total += self._flag
        elif done:
            total -= self._death
        self._screen = np.maximum(frames[0], frames[-1])
        return self._screen, total, done, False, info

    def _reward(self, info: dict[str, Any]) -> float:
        moved, ticks = int(info["x_pos"]) - self._x, self._time - int(info["time"])
        self._x, self._time = int(info["x_pos"]), int(info["time"])
        return (moved if 0 < moved <= FASTEST else 0) - self._clock * max(ticks, 0)

    def render(self) -> np.ndarray:  # (240, 256, 3) uint8
        return self._screen

    def close(self) -> None:
        self._game.close()
