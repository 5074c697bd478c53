"""The environment contract, its errors, and the checks that every adapter shares.

A `VecEnv` is N environments behind one `step`. What it returns is called rows: one dict of arrays
whose first axis is the environment,

    obs keys (N, ...)   as described by `obs_space`
    reward (N,)         float32, what arrived with this observation; 0 where is_first
    is_first (N,)       bool, this observation opens an episode
    is_last (N,)        bool, this observation closes one, be it by termination or by truncation
    is_terminal (N,)    bool, the episode ended by termination: the value after it is zero

Rows are the replay stream. An episode of L decisions gives L + 1 rows, its last observation too,
and the row after an is_last row is the is_first row of the next episode; the action given for that
step is ignored. Arrays belong to the caller: no later call writes into them.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType, ModuleType

import numpy as np

from fastwm.spaces import Space

Rows = dict[str, np.ndarray]
FLAGS = ("is_first", "is_last", "is_terminal")
_UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
# Names that the replay and the agent use for their own columns.
RESERVED = frozenset({"reward", "action", "prev_action", "deter", "stoch", "ids", *FLAGS})


class EnvError(RuntimeError):
    """An environment failed, or broke the rules of its own interface."""


class EnvSpaceError(ValueError):
    """An observation or action space that cannot be expressed, or not without more information."""


class EnvOptionError(ValueError):
    """An option that a task does not have, or a value that it cannot take."""


class EnvStateError(RuntimeError):
    """The state of an environment cannot be saved or was not reproduced exactly."""


class UnknownTaskError(ValueError):
    """A task name that resolves to nothing."""


class MissingPackageError(ImportError):
    """An optional package that this task needs is not installed, or does not work here."""


class VecEnv:
    """N environments of one kind, stepped together.

    Attributes:
        num_envs: N.
        obs_space: name -> Space of one observation.
        act_space: Space of one action: discrete int32 or continuous float32 in [-1, 1].
        action_repeat: frames of the underlying environment per decision (for counting frames).
        task: the name it was made by.   seed: the seed it was made with.
        crashes: how many times an environment had to be restarted after an exception.
        obs_bounds: name -> (low, high) that the environment declares for a vector, where it does.
    """

    num_envs: int
    obs_space: dict[str, Space]
    act_space: Space
    action_repeat: int = 1
    task: str = ""
    seed: int = 0
    crashes: int = 0
    obs_bounds: dict[str, tuple[np.ndarray, np.ndarray]] = MappingProxyType({})
    _sent: np.ndarray | None = None

    def reset(self) -> Rows:
        """Starts a new episode everywhere; every row is an is_first row."""
        raise NotImplementedError(f"{type(self).__name__} does not implement reset()")

    def step(self, action: np.ndarray) -> Rows:  # (N, *act_space.shape)
        """Takes one decision in every environment; one whose row was is_last resets instead."""
        raise NotImplementedError(f"{type(self).__name__} does not implement step()")

    def send(self, action: np.ndarray) -> None:  # (N, *act_space.shape)
        """Begins a step; `receive` ends it. Nothing else may be called in between.

        An environment that cannot step by itself takes the step in `receive`.
        """
        self._sent = action

    def receive(self) -> Rows:
        """What `step` with the action of the last `send` returns."""
        action, self._sent = self._sent, None
        if action is None:
            raise EnvError(f"{self.task}: expected send() before receive(), got receive()")
        return self.step(action)

    def render(self) -> np.ndarray | None:  # (N, H, W, 3) uint8
        """Pictures of the present states, or None where the environment has none."""
        return None

    def close(self) -> None:
        """Frees what the environments hold. Calling it twice is fine."""

    def state_dict(self) -> dict:
        raise EnvStateError(
            f"{self.task or type(self).__name__}: expected a journaled environment to save, got a "
            "bare adapter; build it with fastwm.envs.make"
        )

    def load_state_dict(self, state: dict) -> Rows:
        raise EnvStateError(
            f"{self.task or type(self).__name__}: expected a journaled environment to restore, got "
            "a bare adapter; build it with fastwm.envs.make"
        )

    def __enter__(self) -> VecEnv:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(task={self.task!r}, num_envs={self.num_envs}, "
            f"seed={self.seed}, obs_space={self.obs_space}, act_space={self.act_space})"
        )


def make_rows(
    obs: Rows, reward: np.ndarray, first: np.ndarray, last: np.ndarray, terminal: np.ndarray
) -> Rows:
    """Puts one row of every environment together. Takes ownership of all arrays."""
    obs["reward"] = reward
    obs["is_first"] = first
    obs["is_last"] = last
    obs["is_terminal"] = terminal
    return obs


def check_num_envs(who: str, num_envs: int) -> int:
    if isinstance(num_envs, bool) or int(num_envs) != num_envs or num_envs < 1:
        raise EnvOptionError(f"{who}: expected num_envs to be a positive integer, got {num_envs!r}")
    return int(num_envs)


def step_limit(who: str, time_limit: int | None, frames: int) -> float:
    """Steps that fit a limit in frames, when each step stands for `frames` of them."""
    if time_limit is None:
        return float("inf")
    if isinstance(time_limit, bool) or int(time_limit) != time_limit or time_limit < frames:
        raise EnvOptionError(
            f"{who}: expected time_limit of at least {frames} frames, one decision, got "
            f"{time_limit!r}"
        )
    return int(time_limit) // frames


def check_action(who: str, space: Space, num_envs: int, action: np.ndarray) -> np.ndarray:
    """Returns the action as an array once shape, dtype and range are right.

    Some backends read out of bounds on a wrong shape and play any number that they are given, so
    nothing passes unchecked. Continuous actions may exceed [-1, 1]: they are clipped later.
    """
    action = np.asarray(action)
    if action.shape != (num_envs, *space.shape):
        raise ValueError(
            f"{who}: expected action of shape (N, *act_space.shape) = {(num_envs, *space.shape)}, "
            f"got {action.shape}"
        )
    kind = action.dtype.kind
    if space.kind == "discrete":
        if kind not in "iu":
            raise TypeError(f"{who}: expected action of dtype int32, got {action.dtype}")
        return _check_classes(who, space, action)
    if kind != "f":
        raise TypeError(f"{who}: expected action of dtype float32, got {action.dtype}")
    if not np.isfinite(action).all():
        bad = np.argwhere(~np.isfinite(action))[0]
        raise ValueError(
            f"{who}: expected finite actions in [-1, 1], got {action[tuple(bad)]} at index "
            f"{tuple(int(n) for n in bad)}"
        )
    return action


def _check_classes(who: str, space: Space, action: np.ndarray) -> np.ndarray:
    """Every element within 0 .. classes - 1."""
    # Seen as unsigned a negative number is huge: one comparison instead of two.
    size = action.view(_UNSIGNED[action.dtype.itemsize])
    if len(space.classes) == 1 or len(set(space.classes)) == 1:
        good = size.item(size.argmax()) < space.classes[0]  # a third of the time of max()
    else:
        good = bool((size < np.reshape(space.classes, space.shape)).all())
    if not good:
        raise ValueError(
            f"{who}: expected actions from 0 to classes - 1 with classes {space.classes}, got "
            f"values from {action.min()} to {action.max()}"
        )
    return action


def spread_seeds(seed: int, count: int, *branch: int) -> list[int]:
    """`count` well separated seeds below 2**31.

    Consecutive seeds would make environment 1 of run 0 and environment 0 of run 1 the same.
    """
    words = np.random.SeedSequence([int(seed), *branch]).generate_state(count)
    return [int(word & 0x7FFFFFFF) for word in words]


def import_package(name: str, pip: str, who: str) -> ModuleType:
    """Imports an optional package, or says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(
            f"{who}: expected the package {name!r} to be installed, got {error}; "
            f"run `pip install {pip}`"
        ) from error
