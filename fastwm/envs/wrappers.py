"""Journal: exact save and restore of environments that cannot save themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from fastwm.envs.base import EnvError, EnvStateError, Rows, VecEnv


class Journal(VecEnv):
    """Remembers every action since the environments were made, and restores by playing them again.

    state_dict() holds the actions, the places of resets, and a hash of the last rows.
    load_state_dict() makes the environments anew by the same factory and seed, plays the actions,
    compares the hash and returns the last rows. It raises EnvStateError where the environment is
    not deterministic, or where more than `limit` vector steps were taken.

    Cost: one copy of the action per step; N * A * 4 bytes of memory per step, a byte for small
    discrete actions. The limit also bounds the memory: nothing is kept beyond it.
    """

    def __init__(self, factory: Callable[[], VecEnv], *, limit: int = 200_000) -> None:
        self._factory, self.limit = factory, int(limit)
        self._open()

    def _open(self) -> None:
        self.env = self._factory()
        self.num_envs, self.task, self.seed = self.env.num_envs, self.env.task, self.env.seed
        self.obs_space, self.act_space = self.env.obs_space, self.env.act_space
        self.action_repeat, self.obs_bounds = self.env.action_repeat, self.env.obs_bounds
        small = self.act_space.kind == "discrete" and max(self.act_space.classes) <= 256
        self._dtype = np.dtype(np.uint8 if small else self.act_space.dtype)
        self._actions: np.ndarray | None = np.empty((0, *self._shape), self._dtype)
        self._resets: list[int] = []  # number of steps taken before each reset
        self._steps = 0
        self._rows: Rows | None = None
        self._sent = None

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.num_envs, *self.act_space.shape)

    @property
    def crashes(self) -> int:
        return self.env.crashes

    @property
    def rows(self) -> Rows | None:
        """The last rows that reset(), step() or load_state_dict() returned; None before that."""
        return None if self._rows is None else dict(self._rows)

    def reset(self) -> Rows:
        self._rows = self.env.reset()
        self._resets.append(self._steps)
        return dict(self._rows)

    def step(self, action: np.ndarray) -> Rows:  # (N, *act_space.shape)
        self.send(action)
        return self.receive()

    def send(self, action: np.ndarray) -> None:  # (N, *act_space.shape)
        if self._dtype == np.float32:
            # What is replayed must be what was played, to the bit.
            action = np.asarray(action)
            action = action.astype(np.float32) if action.dtype == np.float64 else action
        self.env.send(action)
        self._sent = action

    def receive(self) -> Rows:
        self._rows = self.env.receive()
        action, self._sent = self._sent, None
        if self._actions is not None:
            self._record(action)
        self._steps += 1
        return dict(self._rows)

    def _record(self, action: np.ndarray) -> None:
        if self._steps == self.limit:
            self._actions = None
            return
        if self._steps == len(self._actions):
            room = min(self.limit, max(256, 2 * self._steps))
            grown = np.empty((room, *self._shape), self._dtype)
            grown[: self._steps] = self._actions
            self._actions = grown
        self._actions[self._steps] = action

    def state_dict(self) -> dict:
        """Plain data and one array: small enough for a checkpoint up to the limit."""
        if self._sent is not None:
            raise EnvError(
                f"{self.task}: expected receive() before state_dict(), got a step under way"
            )
        actions = None if self._actions is None else self._actions[: self._steps].copy()
        return {
            "task": self.task,
            "seed": self.seed,
            "num_envs": self.num_envs,
            "steps": self._steps,
            "resets": list(self._resets),
            "actions": actions,
            "hash": None if self._rows is None else hash_rows(self._rows),
        }

    def load_state_dict(self, state: dict) -> Rows | None:
        """Restores and returns the last rows (None if the saved environments were never reset).

        Raises EnvStateError, with freshly made environments that are ready for reset().
        """
        for name in ("task", "seed", "num_envs"):
            if state[name] != getattr(self, name):
                raise EnvStateError(
                    f"{self.task}: expected the state of an environment with {name} = "
                    f"{getattr(self, name)!r}, got {state[name]!r}; make it with the same arguments"
                )
        actions = state["actions"]
        if actions is None:
            raise EnvStateError(
                f"{self.task}: expected at most {self.limit} recorded steps, got {state['steps']}: "
                "too long to play again; episodes start afresh"
            )
        if actions.shape[1:] != self._shape:
            raise EnvStateError(
                f"{self.task}: expected recorded actions of shape (T, N, ...) = (T, "
                f"{', '.join(map(str, self._shape))}), got {actions.shape}"
            )
        self.env.close()
        self._open()
        self._replay(np.asarray(actions), list(state["resets"]))
        found = None if self._rows is None else hash_rows(self._rows)
        if found != state["hash"]:
            steps = self._steps
            self.env.close()
            self._open()
            raise EnvStateError(
                f"{self.task}: expected the same observations after playing {steps} recorded steps "
                "again, got others: the environment is not deterministic; episodes start afresh"
            )
        return self.rows

    def _replay(self, actions: np.ndarray, resets: list[int]) -> None:
        dtype = np.dtype(self.act_space.dtype)
        for done in range(len(actions) + 1):
            while resets and resets[0] == done:
                self.reset()
                resets.pop(0)
            if done < len(actions):
                self.step(actions[done].astype(dtype))

    def render(self) -> np.ndarray | None:
        return self.env.render()

    def close(self) -> None:
        self.env.close()


def hash_rows(rows: Rows) -> str:
    """Hex digest of names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(rows):
        value = np.ascontiguousarray(rows[name])
        digest.update(f"{name} {value.dtype} {value.shape};".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
