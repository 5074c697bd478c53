"""Packages written for gym, the predecessor of gymnasium, without installing gym.

They need gym only as a place for their base classes. A stand-in holds those names while such a
package is imported; their environments are then used directly, never through gym's registry.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


class _Env:
    """Base class in gym's place."""

    metadata: dict = {}
    spec = None

    @property
    def unwrapped(self) -> _Env:
        return self


class _Wrapper(_Env):
    def __init__(self, env: _Env) -> None:
        self.env = env


@contextmanager
def stand_in() -> Iterator[None]:
    """`import gym` finds the stand-in inside this block, unless gym itself is imported already."""
    if "gym" in sys.modules:
        yield
        return
    from gymnasium import spaces

    names = ("gym", "gym.envs", "gym.envs.registration", "gym.spaces", "gym.wrappers")
    modules = {name: ModuleType(name) for name in names}
    modules["gym.spaces"] = spaces
    gym = modules["gym"]
    gym.Env, gym.Wrapper, gym.ObservationWrapper = _Env, _Wrapper, _Wrapper
    gym.ActionWrapper = gym.RewardWrapper = _Wrapper
    gym.Space, gym.spaces, gym.__path__ = spaces.Space, spaces, []
    gym.envs, gym.wrappers = modules["gym.envs"], modules["gym.wrappers"]
    gym.envs.registration = modules["gym.envs.registration"]
    gym.make = gym.register = gym.envs.registration.register = _nothing
    gym.envs.registration.make = _nothing
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)


def _nothing(*args: object, **kwargs: object) -> None:
    """Registering ids has no use here."""
