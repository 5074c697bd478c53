"""The compiled part of fastwm: which libraries to build here, and how.

    fastwm/_C.abi3.so       op schemas and CPU kernels    (LibTorch stable ABI)
    fastwm/_C_cuda.abi3.so  CUDA kernels                  (only with nvcc)
    fastwm/_replay.*.so     replay internals              (pybind11, no torch)

Environment: FASTWM_NO_EXT, FASTWM_CUDA=auto|0|1, FASTWM_SANITIZE, FASTWM_DEBUG, CUDA_HOME,
TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX; docs/install.md explains each.
"""

import os
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup

os.chdir(Path(__file__).resolve().parent)
TORCH_TARGET = "0x020b000000000000"  # 2.11: oldest torch that the binaries run on


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def note(message: str) -> None:
    print(f"fastwm: {message}", file=sys.stderr)


def cxx_flags() -> list[str]:
    flags = ["-std=c++20", "-g0", "-O0" if flag("FASTWM_DEBUG") else "-O3"]
    # No -ffast-math: NaN, inf and -0 keep their meaning. These two only drop errno and FP traps,
    # which is what lets the compiler vectorise calls and branches.
    flags += ["-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
    flags += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    flags += [f"-ffile-prefix-map={os.getcwd()}/="]
    return flags


def torch_extensions() -> list:
    from torch.utils.cpp_extension import CppExtension

    return [
        CppExtension(
            "fastwm._C",
            sorted(["csrc/ops.cpp", *glob("csrc/ops_cpu*.cpp"), *glob("csrc/cpu/*.cpp")]),
            include_dirs=[os.path.abspath("csrc")],
            py_limited_api=True,
            extra_compile_args={"cxx": [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *cxx_flags()]},
            extra_link_args=["-s"],
        )
    ]


def replay_extension() -> list:
    sources = sorted(glob("csrc/replay/*.cpp"))
    if not sources:
        return []
    import pybind11

    include = [pybind11.get_include(), os.path.abspath("csrc")]
    return [
        Extension(
            "fastwm._replay",
            sources,
            include_dirs=include,
            language="c++",
            extra_compile_args=cxx_flags(),
            extra_link_args=["-s"],
        )
    ]


def build_options() -> dict:
    if flag("FASTWM_NO_EXT") or flag("FASTWM_METADATA_ONLY"):
        return {}
    from torch.utils.cpp_extension import BuildExtension

    return {
        "ext_modules": torch_extensions() + replay_extension(),
        "cmdclass": {"build_ext": BuildExtension},
    }


setup(
    packages=[*find_packages(include=["fastwm", "fastwm.*"]), "fastwm.configs"],
    package_dir={"fastwm.configs": "configs"},
    **build_options(),
)
