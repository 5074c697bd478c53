"""PEP 517 backend: setuptools, plus one idea.

An isolated build would download a torch of its own (gigabytes), compile against it and throw it
away. This backend looks for the torch that is already installed where the package is going and
builds against that one; only when there is none does it ask for torch as a build requirement.
"""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist  # noqa: F401


def _site_dirs() -> list[str]:
    """Folders that may hold the target's torch. pip's build isolation keeps sys.prefix."""
    paths = sysconfig.get_paths()
    dirs = [os.environ.get("FASTWM_TORCH_SITE", ""), paths["platlib"], paths["purelib"]]
    config = Path(sys.prefix, "pyvenv.cfg")
    if config.is_file() and "include-system-site-packages = true" in config.read_text().lower():
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        dirs += [sysconfig.get_path(name, vars=base) for name in ("platlib", "purelib")]
    if site.ENABLE_USER_SITE or not config.is_file():
        dirs.append(site.getusersitepackages())
    return [path for path in dict.fromkeys(dirs) if path]


def _torch_site() -> str | None:
    return next((path for path in _site_dirs() if Path(path, "torch/version.py").is_file()), None)


def _wants_extension() -> bool:
    return os.environ.get("FASTWM_NO_EXT", "0") in ("", "0")


def _requires(base: list[str]) -> list[str]:
    if not _wants_extension() or find_spec("torch") or _torch_site():
        return base
    return base + [os.environ.get("FASTWM_BUILD_TORCH") or "torch>=2.11"]


def _add_torch() -> None:
    """Make the target's torch importable, after everything that the build environment has."""
    path = _torch_site()
    if _wants_extension() and find_spec("torch") is None and path:
        sys.path.append(path)


def _metadata_only(hook, *args):
    """Run a hook that compiles nothing, so that setup.py does not import torch for it."""
    os.environ["FASTWM_METADATA_ONLY"] = "1"
    try:
        return hook(*args)
    finally:
        del os.environ["FASTWM_METADATA_ONLY"]


def get_requires_for_build_wheel(config_settings=None):
    return _requires(_metadata_only(build_meta.get_requires_for_build_wheel, config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _requires(_metadata_only(build_meta.get_requires_for_build_editable, config_settings))


def prepare_metadata_for_build_wheel(directory, config_settings=None):
    return _metadata_only(build_meta.prepare_metadata_for_build_wheel, directory, config_settings)


def prepare_metadata_for_build_editable(directory, config_settings=None):
    hook = build_meta.prepare_metadata_for_build_editable
    return _metadata_only(hook, directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _add_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _add_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
