"""The compiled part of fastwm: which libraries to build here, and how.

    fastwm/_C.abi3.so       op schemas and CPU kernels    LibTorch stable ABI
    fastwm/_C_cuda.abi3.so  CUDA kernels                  LibTorch stable ABI, only with nvcc
    fastwm/_replay.*.so     replay internals              pybind11, no torch

Environment: FASTWM_NO_EXT, FASTWM_CUDA=auto|0|1, FASTWM_SANITIZE, FASTWM_DEBUG, CUDA_HOME,
TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX; docs/install.md explains each.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup

os.chdir(Path(__file__).resolve().parent)
OLDEST_TORCH = (2, 11)
TORCH_TARGET = "0x020b000000000000"  # the same, as the stable ABI spells it
NVCC_FLAGS = ["-O3", "-std=c++20", "--Werror", "all-warnings"]
CUDA_ARCHS = "8.0;9.0+PTX"  # when no GPU is visible; PTX covers what comes later


def note(message: str) -> None:
    print(f"fastwm: {message}", file=sys.stderr)


def die(message: str) -> None:
    sys.exit(f"fastwm: cannot build: {message}")


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def compiler_problem() -> str | None:
    """Why there is no C++20 compiler, or None."""
    if sys.platform == "win32":
        return "Windows has no compiled kernels yet"
    command = [*shlex.split(os.environ.get("CXX") or "c++"), "-std=c++20", "-x", "c++", "-c"]
    if shutil.which(command[0]) is None:
        return f"no C++ compiler ({command[0]} is not on PATH; on Debian: apt install g++)"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(
            "#include <version>\n#include <string>\nconsteval int f() { return 0; }\n"
        )
        command += [str(source), "-o", str(Path(folder, "probe.o"))]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        said = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[0]
        return f"{command[0]} does not compile C++20: {said}"
    return None


def check_torch() -> None:
    try:
        import torch
    except ImportError as error:
        die(f"PyTorch does not import here ({error}); pip install torch first, or FASTWM_NO_EXT=1")
    found = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if found < OLDEST_TORCH:
        where = Path(torch.__file__).parent
        die(f"PyTorch {torch.__version__} found at {where}; fastwm needs 2.11 or newer")


def find_cuda() -> str | None:
    """The CUDA toolkit: $CUDA_HOME, $CUDA_PATH, /usr/local/cuda, or what nvcc says of itself."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in candidates:
        if home and Path(home, "bin/nvcc").is_file():
            return str(Path(home).resolve())
    nvcc = shutil.which("nvcc")  # may be a wrapper, so that its own folder tells nothing
    if nvcc is None:
        return None
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True)
    top = re.search(r"^#\$ TOP=(.*)$", dry.stderr.decode(errors="replace"), re.M)
    return str(Path(top[1].strip()).resolve()) if top else None


def cuda_home() -> str | None:
    """The toolkit to compile CUDA kernels with, or None with one line that says why not."""
    wish = os.environ.get("FASTWM_CUDA") or "auto"
    if wish not in ("auto", "0", "1"):
        die(f"FASTWM_CUDA: expected auto, 0 or 1, got {wish!r}")
    if wish == "0" or not glob("csrc/cuda/*.cu"):
        return None
    import torch

    if wish == "auto" and torch.version.cuda is None:
        note("PyTorch has no CUDA: building the CPU kernels only (FASTWM_CUDA=1 forces CUDA)")
        return None
    home = find_cuda()
    if home is None:
        message = "nvcc not found (looked at CUDA_HOME, CUDA_PATH, /usr/local/cuda, PATH)"
        if wish == "1":
            die(f"FASTWM_CUDA=1, but {message}")
        note(f"{message}: building the CPU kernels only")
        return None
    shown = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    version = (re.search(r"release (\d+\.\d+)", shown) or ["", "unknown"])[1]
    if torch.version.cuda and version.split(".")[0] != torch.version.cuda.split(".")[0]:
        message = f"nvcc is {version} but PyTorch was built with CUDA {torch.version.cuda}"
        if wish == "1":
            die(f"FASTWM_CUDA=1, but {message}; set CUDA_HOME to a matching toolkit")
        note(f"{message}: building the CPU kernels only; set CUDA_HOME to a matching toolkit")
        return None
    return home


def set_jobs() -> None:
    """Without MAX_JOBS ninja takes all cores; a compiler may need 2 GB."""
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES")
        free_gb = pages * os.sysconf("SC_PAGE_SIZE") / 2**30
        by_memory = max(1, int(free_gb / 2))
    except (ValueError, OSError):
        by_memory = 2
    os.environ.setdefault("MAX_JOBS", str(min(os.cpu_count() or 1, by_memory)))


def cxx_flags() -> tuple[list[str], list[str]]:
    """Flags to compile and to link with."""
    # No -ffast-math: NaN, infinity and -0 keep their meaning. The two -fno- only drop errno and
    # floating-point traps, which is what lets the compiler vectorise calls and branches.
    flags = ["-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
    flags += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    flags += [f"-ffile-prefix-map={os.getcwd()}/="]
    sanitizers = os.environ.get("FASTWM_SANITIZE")
    if sanitizers:
        checks = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer"]
        return [*flags, "-O1", "-g", *checks], checks
    if flag("FASTWM_DEBUG"):
        return [*flags, "-O0", "-g"], []
    return [*flags, "-O3", "-g0"], ["-s"] if sys.platform == "linux" else []


def write_build_header() -> str:
    """A header with a hash of all schemas: lets Python notice a library of another version."""
    text = (
        f'#define FWM_SCHEMAS "{hashlib.sha256(Path("csrc/ops.cpp").read_bytes()).hexdigest()}"\n'
    )
    header = Path("build/generated/fwm_schemas.h").resolve()
    if not header.is_file() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    return str(header.parent)


def torch_extensions() -> list:
    from torch.utils import cpp_extension

    flags, link = cxx_flags()
    flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *flags]
    common = {
        "include_dirs": [os.path.abspath("csrc"), write_build_header()],
        "py_limited_api": True,
    }
    sources = ["csrc/ops.cpp", *glob("csrc/ops_cpu*.cpp"), *glob("csrc/cpu/*.cpp")]
    extensions = [
        cpp_extension.CppExtension(
            "fastwm._C",
            sorted(sources),
            extra_compile_args={"cxx": flags},
            extra_link_args=link,
            **common,
        )
    ]
    home = cuda_home()
    if home is None:
        return extensions
    import torch

    cpp_extension.CUDA_HOME = home  # a PyTorch without CUDA leaves it None whatever is set
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
    # The CUDA runtime is linked statically. The shims that live in libtorch_cuda stay undefined:
    # a PyTorch with CUDA brings them along through libtorch.so, and another one never loads this.
    libraries = [f"-L{home}/lib64", f"-L{home}/lib", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    extensions.append(
        cpp_extension.CppExtension(
            "fastwm._C_cuda",
            sorted([*glob("csrc/ops_cuda*.cpp"), *glob("csrc/cuda/*.cu")]),
            extra_compile_args={
                "cxx": [*flags, "-DUSE_CUDA", f"-I{home}/include"],
                "nvcc": [*NVCC_FLAGS, "-Xcompiler", "-fvisibility=hidden"],
            },
            extra_link_args=[*link, "-Wl,--no-as-needed,-ltorch,--as-needed", *libraries],
            **common,
        )
    )
    return extensions


def replay_extension() -> list:
    sources = sorted(glob("csrc/replay/*.cpp"))
    if not sources:
        return []
    try:
        import pybind11
    except ImportError:
        note("pybind11 not found: building without fastwm._replay, its numpy twin takes over")
        return []
    flags, link = cxx_flags()
    return [
        Extension(
            "fastwm._replay",
            sources,
            include_dirs=[pybind11.get_include(), os.path.abspath("csrc")],
            language="c++",
            extra_compile_args=flags,
            extra_link_args=[*link, "-lpthread"],
        )
    ]


def build_command():
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """Leaves the libraries in the checkout as well: `python -m fastwm.train` run there imports
        the checkout, not what pip installed, and would find no kernels."""

        def run(self) -> None:
            super().run()
            try:
                self.copy_extensions_to_source()
            except OSError as error:
                note(f"cannot write to the checkout ({error}): run fastwm from another folder")

    return Build


def build_options() -> dict:
    if flag("FASTWM_NO_EXT") or flag("FASTWM_METADATA_ONLY"):
        return {}
    problem = compiler_problem()
    if problem:
        note(f"{problem}: installing without compiled kernels, on the PyTorch references (slower)")
        return {}
    check_torch()
    set_jobs()
    return {
        "ext_modules": torch_extensions() + replay_extension(),
        "cmdclass": {"build_ext": build_command()},
    }


setup(
    packages=[*find_packages(include=["fastwm", "fastwm.*"]), "fastwm.configs"],
    package_dir={"fastwm.configs": "configs"},
    **build_options(),
)
