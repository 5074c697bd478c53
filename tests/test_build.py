"""What the build makes: wheels, the source distribution, and one-line errors."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = next((d.version for d in distributions(name="setuptools")), "0")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(int(SETUPTOOLS.split(".")[0]) < 77, reason="needs setuptools >= 77"),
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs a checkout"),
]
WITHOUT = shutil.ignore_patterns(
    ".git",
    "build",
    "dist",
    "*.so",
    "*.egg-info",
    "runs",
    "golden",
    "__pycache__",
    ".venv",
    ".*_cache",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout without anything built."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "fastwm", ignore=WITHOUT)


def build(source, hook, out, **variables):
    """One PEP 517 hook in a process of its own; returns the finished process."""
    code = f"import sys, fastwm_backend; print(fastwm_backend.{hook}({str(out)!r}))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTWM_")}
    environment.update(variables, PYTHONPATH=str(source / "_build_backend"))
    return subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True
    )


def contents(folder, pattern):
    (path,) = folder.glob(pattern)
    if path.suffix == ".whl":
        return zipfile.ZipFile(path).namelist()
    return ["/".join(name.split("/")[1:]) for name in tarfile.open(path).getnames()]


def test_pure_wheel(source, tmp_path):
    run = build(source, "build_wheel", tmp_path, FASTWM_NO_EXT="1")
    assert run.returncode == 0, run.stderr
    names = contents(tmp_path, "fastwm-*-py3-none-any.whl")
    assert {"fastwm/py.typed", "fastwm/ops/_backend.py", "fastwm/configs/__init__.py"} <= set(names)
    assert any(n.startswith("fastwm/configs/") and n.endswith(".toml") for n in names)
    assert not [n for n in names if n.endswith(".so") or n.startswith(("tests/", "csrc/"))]


def test_no_compiler_gives_a_pure_wheel_and_one_line(source, tmp_path):
    run = build(source, "build_wheel", tmp_path, CXX="/nowhere/c++")
    assert run.returncode == 0, run.stderr
    assert "fastwm: no C++ compiler (/nowhere/c++ is not on PATH" in run.stderr
    assert list(tmp_path.glob("fastwm-*-py3-none-any.whl"))


def test_broken_compiler_gives_a_pure_wheel_and_one_line(source, tmp_path):
    run = build(source, "build_wheel", tmp_path, CXX="false")
    assert run.returncode == 0, run.stderr
    assert "fastwm: false does not compile C++20" in run.stderr


def test_source_distribution_has_all_sources(source, tmp_path):
    run = build(source, "build_sdist", tmp_path)
    assert run.returncode == 0, run.stderr
    names = set(contents(tmp_path, "fastwm-*.tar.gz"))
    for folder in ("csrc", "_build_backend", "configs", "fastwm"):
        files = [p for p in (source / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"]
        assert files and {p.relative_to(source).as_posix() for p in files} <= names


def test_bad_switch_is_one_line(source, tmp_path):
    run = build(source, "build_wheel", tmp_path, FASTWM_CUDA="yes")
    assert run.returncode != 0
    assert "fastwm: cannot build: FASTWM_CUDA: expected auto, 0 or 1, got 'yes'" in run.stderr


def test_old_torch_is_one_line(source, tmp_path):
    old = tmp_path / "site/torch"
    old.mkdir(parents=True)
    (old / "__init__.py").write_text("__version__ = '2.9.1'\n")
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); exec(open('setup.py').read())"
    run = subprocess.run(
        [sys.executable, "-c", f"__file__ = 'setup.py'; {code}", str(old.parent), "build_ext"],
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "fastwm: cannot build: PyTorch 2.9.1 found at" in run.stderr
    assert run.stderr.strip().splitlines()[-1].endswith("fastwm needs 2.11 or newer")


def test_torch_of_the_target_is_used(source, tmp_path):
    """With torch present the backend asks for none; without, for FASTWM_BUILD_TORCH."""
    asked = "import fastwm_backend as b; print(b._requires([]))"
    environment = {**os.environ, "PYTHONPATH": str(source / "_build_backend")}

    def run(*flags, **variables):
        command = [sys.executable, *flags, "-c", asked]
        result = subprocess.run(
            command, env={**environment, **variables}, cwd=tmp_path, capture_output=True, text=True
        )
        return result.stdout.strip()

    assert run() == "[]"
    hide = "import importlib.util as u, fastwm_backend as b; b.find_spec = lambda n: None; "
    hide += "b._torch_site = lambda: None; "
    asked = hide + "print(b._requires([]))"
    assert run() == "['torch>=2.11']"
    assert run(FASTWM_BUILD_TORCH="torch==2.13.0") == "['torch==2.13.0']"
    assert run(FASTWM_NO_EXT="1") == "[]"
