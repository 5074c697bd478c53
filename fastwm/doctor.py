"""`python -m fastwm.doctor`: what is installed, what is active, how to repair it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import warnings
from importlib.metadata import distributions

REBUILD = "in the fastwm checkout: pip install --force-reinstall --no-deps ."
REQUIRED = ("numpy", "gymnasium", "tensorboard", "tqdm", "pillow")
OPTIONAL = {  # distribution -> what it is for, and the line that installs it
    "envpool": "fast environments, CartPole to Atari: pip install envpool",
    "ale-py": "Atari without envpool: pip install ale-py",
    "dm_control": "DeepMind control without envpool: pip install dm_control 'mujoco<4'",
    "minigrid": "MiniGrid: pip install minigrid",
    "crafter": "Crafter: pip install crafter",
    "memory-maze": "Memory Maze: pip install memory-maze 'mujoco<4'",
    "gym-super-mario-bros": "Mario: pip install nes-py==8.2.1 gym-super-mario-bros==7.4.0",
    "minerl": "Minecraft: pip install minerl==0.4.4, which needs Python 3.9 or older and Java 8",
    "cma": "the 2018 controller: pip install cma",
}


def installed(name: str) -> str | None:
    return next((d.version for d in distributions(name=name)), None)


def library_findings(info: dict[str, str]) -> tuple[list[str], list[str]]:
    """Problems and advice about the compiled libraries."""
    problems = [f"{d} library {info[d]}; {REBUILD}" for d in ("cpu", "cuda") if "failed" in info[d]]
    advice = []
    if info["cpu"] == "not built":
        compiler = "" if shutil.which(os.environ.get("CXX", "c++")) else "apt install g++, then "
        advice.append(f"CPU kernels are not built, references run (slower): {compiler}{REBUILD}")
    if info["cuda"] == "not built":
        advice.append(f"CUDA kernels are not built: they need nvcc or CUDA_HOME, then {REBUILD}")
    try:
        importlib.import_module("fastwm._replay")
    except ModuleNotFoundError:
        if info["cpu"] == "active":
            advice.append(f"the replay library is not built for this Python, numpy runs; {REBUILD}")
    except ImportError as error:
        problems.append(f"replay library failed to load: {error}; {REBUILD}")
    return problems, advice


def main() -> int:
    try:
        import torch
    except ImportError as error:
        print(f"problem: PyTorch does not import ({error}): pip install 'torch>=2.11'")
        return 1
    with warnings.catch_warnings():  # what the loader warns of is reported below, with its fix
        warnings.simplefilter("ignore", RuntimeWarning)
        from fastwm import __version__
        from fastwm.ops import backend_info
    info = backend_info()
    print(f"fastwm {__version__} in {os.path.dirname(__file__)}")
    print(f"python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores")
    print(
        f"torch  {info.pop('torch')}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPUs"
    )
    for key, value in info.items():
        print(f"{key:<21}{value}")
    for name in (*REQUIRED, *OPTIONAL):
        print(f"{name:<21}{installed(name) or 'missing'}")

    problems, advice = library_findings(info)
    problems += [f"{n} is missing: pip install {n}" for n in REQUIRED if not installed(n)]
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11):
        problems.append(f"PyTorch {torch.__version__} is too old: pip install 'torch>=2.11'")
    advice += [f"no {n}; {line}" for n, line in OPTIONAL.items() if not installed(n)]
    for line in [f"problem: {p}" for p in problems] + [f"could be better: {a}" for a in advice]:
        print(line)
    print("problems were found" if problems else "everything that is installed works")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
