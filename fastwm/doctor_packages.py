"""Which packages are installed beside fastwm, and what each one would add."""

from __future__ import annotations

import ctypes.util
import sys
from importlib.metadata import distributions

REQUIRED = ("numpy", "gymnasium", "tensorboard", "tqdm", "pillow")
OPTIONAL = {  # distribution -> what it is for, and the line that installs it
    "envpool": "fast environments, CartPole to Atari: pip install envpool",
    "ale-py": "Atari without envpool: pip install ale-py",
    "dm_control": "DeepMind control without envpool: pip install dm_control 'mujoco<4'",
    "minigrid": "MiniGrid without envpool: pip install minigrid",
    "crafter": "Crafter: pip install crafter",
    "memory-maze": "Memory Maze: pip install memory-maze 'mujoco<4'",
    "gym-super-mario-bros": "Mario: pip install nes-py==8.2.1 gym-super-mario-bros==7.4.0",
    "minerl": "Minecraft: pip install minerl==0.4.4, which needs Python 3.9 or older and Java 8",
    "cma": "the 2018 controller: pip install cma",
}


def installed(name: str) -> str | None:
    """Its version, or None."""
    return next((d.version for d in distributions(name=name)), None)


def versions() -> dict[str, str]:
    return {name: installed(name) or "missing" for name in (*REQUIRED, *OPTIONAL)}


def findings() -> tuple[list[str], list[str]]:
    """Problems and advice about packages."""
    problems = [f"{n} is missing: pip install {n}" for n in REQUIRED if not installed(n)]
    advice = [f"no {n}; {line}" for n, line in OPTIONAL.items() if not installed(n)]
    if installed("envpool") and sys.platform == "linux" and not ctypes.util.find_library("Qt5Gui"):
        advice.append("no Qt 5; Procgen (of envpool): apt install libqt5gui5 libqt5widgets5")
    return problems, advice
