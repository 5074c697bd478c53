"""`python -m fastwm.doctor`: what is installed, what is active, how to repair it."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Sequence

from fastwm import doctor_packages

REBUILD = "in the fastwm checkout: pip install --force-reinstall --no-deps ."


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 where something is broken."""
    argparse.ArgumentParser("python -m fastwm.doctor", description=__doc__).parse_args(argv)
    try:
        import torch
    except ImportError as error:
        print(f"problem: PyTorch does not import ({error}): pip install 'torch>=2.11'")
        return 1
    with warnings.catch_warnings():  # what the loader warns of is reported below, with its fix
        warnings.simplefilter("ignore", RuntimeWarning)
        from fastwm import __version__
        from fastwm.agents import defaults
        from fastwm.ops import _products, backend_info
    info = backend_info()
    print(f"fastwm {__version__} in {os.path.dirname(__file__)}")
    print(f"python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores")
    print(
        f"torch  {info.pop('torch')}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPUs"
    )
    info["products"] += f" ({_products.rates()})"
    for key, value in info.items():
        print(f"{key:<21}{value}")
    for name, version in doctor_packages.versions().items():
        print(f"{name:<21}{version}")
    for line in defaults.lines():
        print(line)

    problems, advice = library_findings(info)
    missing, more = doctor_packages.findings()
    problems, advice = problems + missing, advice + more
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11):
        problems.append(f"PyTorch {torch.__version__} is too old: pip install 'torch>=2.11'")
    for line in [f"problem: {p}" for p in problems] + [f"could be better: {a}" for a in advice]:
        print(line)
    print("problems were found" if problems else "everything that is installed works")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
