"""envpool: C++ environments, all stepped by one call.

What envpool really does, and what this adapter does about it:
- the step after a done one resets and ignores its action: exactly our rows, is_first being the
  previous done (elapsed_step does not restart after a lost life);
- dm_control and MetaWorld tasks return a stale reward on that reset: forced to 0;
- it checks only the first action it is given, later ones may be read out of bounds: checked here;
- the seed of reset() is ignored: every environment gets its own seed at construction;
- undeclared bounds appear as the smallest and largest double: refused, unless `bounds` is given;
- images are (C, H, W) or (H, W, C) by family; doubles: converted to (H, W, C) uint8 and float32;
- ViZDoom's games write into the current folder: they are started in one of their own;
- repeating an action by its `frame_skip` drops rewards in the MuJoCo families: repeated truly here;
- a step of classic control or of a text game is shorter than handing it to a thread: up to 64 of
  them get one thread, which costs less than one a core (`few_threads`);
- its Python around the compiled step costs a fifth of a step of 64 CartPoles: `Door` goes past it.
Returned arrays are fresh on every call, so nothing is copied that needs no conversion.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastwm.envs.base import (
    EnvError,
    EnvOptionError,
    EnvSpaceError,
    MissingPackageError,
    Rows,
    VecEnv,
    check_num_envs,
    import_package,
    make_rows,
    spread_seeds,
    step_limit,
)
from fastwm.envs.convert import ActMap, ObsMap, ObsOptions

PIP = "'envpool>=1.2.5'"


class EnvpoolEnv(VecEnv):
    """Any envpool id. `settings` go to envpool.make (frame_skip, max_episode_steps, ...)."""

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        seed: int = 0,
        *,
        task: str = "",
        obs: ObsOptions | None = None,
        action_repeat: int = 1,
        frames_per_action: int = 1,
        time_limit: int | None = None,
        bounds: Any = None,
        render_mode: str | None = "rgb_array",
        seeds: Sequence[int] | None = None,
        **settings: Any,
    ) -> None:
        """action_repeat: calls per decision, rewards summed.   frames_per_action: frames that one
        call already stands for (Atari's frame_skip).   time_limit: frames after which an episode is
        cut off; None: as envpool has it.   seeds: of every environment, in place of those that are
        derived from `seed`."""
        self.task, self.seed = task or f"envpool:{env_id}", int(seed)
        self.num_envs = check_num_envs(self.task, num_envs)
        if action_repeat < 1:
            raise EnvOptionError(f"{self.task}: expected action_repeat >= 1, got {action_repeat}")
        self._repeat = int(action_repeat)
        self.action_repeat = self._repeat * int(frames_per_action)
        if time_limit is not None:
            settings["max_episode_steps"] = step_limit(
                self.task, time_limit, int(frames_per_action)
            )
        if settings.get("noop_max", 1) < 1:
            # envpool divides by it: the process would end without a Python error.
            raise EnvOptionError(f"{self.task}: expected noop_max of at least 1, got 0")
        self._seeds = seeds or spread_seeds(self.seed, self.num_envs)
        if len(self._seeds) != self.num_envs:
            raise EnvOptionError(
                f"{self.task}: expected {self.num_envs} seeds, got {len(self._seeds)}"
            )
        self._make_pool(load_envpool(self.task), env_id, render_mode, settings)
        self._act = ActMap(self.task, self._pool.action_space, self.num_envs, bounds)
        self._obs = ObsMap(self.task, self._pool.observation_space, obs or ObsOptions(), copy=False)
        self.obs_space, self.act_space = self._obs.space, self._act.space
        self.obs_bounds = self._obs.bounds
        self._door = Door.of(self._pool, self._obs.paths) if self._repeat == 1 else None
        self._last: np.ndarray | None = None  # (N,) bool, the previous row's is_last

    def _make_pool(
        self, envpool: Any, env_id: str, render_mode: str | None, settings: dict
    ) -> None:
        from fastwm.envs.vizdoom import end, sandboxed

        self._env_id, self._render_mode = env_id, render_mode
        more, self._folder = sandboxed(env_id)
        weakref.finalize(self, end, self.__dict__)
        settings = {**few_threads(env_id, self.num_envs), **more, **settings}
        if render_mode is not None:
            settings = {**settings, "render_mode": render_mode}
        seeds = [int(seed) for seed in self._seeds]
        with warnings.catch_warnings():
            # gymnasium remarks on bounds beyond float32, which are replaced anyway.
            warnings.filterwarnings("ignore", message=".*precision lowered by casting.*")
            try:
                self._pool = envpool.make_gymnasium(
                    env_id, num_envs=self.num_envs, seed=seeds, **settings
                )
                spaces = (self._pool.observation_space, self._pool.action_space)
            except (TypeError, ValueError, AssertionError, KeyError) as error:
                raise EnvOptionError(
                    f"{self.task}: expected options that envpool knows for {env_id}, got "
                    f"{settings}: {error}"
                ) from error
        # The classes of MuJoCo families live below envpool.mujoco.
        self._mujoco = any(".mujoco." in c.__module__ + "." for c in type(self._pool).__mro__)
        if any(space is None for space in spaces):
            raise EnvSpaceError(f"{self.task}: expected spaces from envpool, got {spaces}")

    def reset(self) -> Rows:
        obs, _ = self._pool.reset()
        count = self.num_envs
        self._last = np.zeros(count, bool)
        zeros = np.zeros((3, count), bool)
        zeros[0] = True
        return make_rows(self._obs.batch(obs), np.zeros(count, np.float32), *zeros)

    def step(self, action: np.ndarray) -> Rows:  # (N, *act_space.shape)
        self.send(action)
        return self.receive()

    def send(self, action: np.ndarray) -> None:  # (N, *act_space.shape)
        if self._last is None:
            raise EnvError(f"{self.task}: expected reset() before the first step(), got step()")
        native = self._act.batch(action)
        (self._door or self._pool).send(native)
        self._sent = native

    def receive(self) -> Rows:
        native, self._sent = self._sent, None
        if native is None:
            raise EnvError(f"{self.task}: expected send() before receive(), got receive()")
        if self._door is not None:
            arrays, reward, terminal, last = self._door.receive()
            rows = self._obs.flat(arrays)
        else:
            obs, reward, terminal, truncated, _ = self._pool.recv()
            last = terminal | truncated
            if self._repeat > 1:
                obs, reward, terminal, last = self._again(native, obs, reward, terminal, last)
            rows = self._obs.batch(obs)
        if reward.dtype != np.float32:
            reward = reward.astype(np.float32)
        first, self._last = self._last, last.copy()  # the caller owns `last`
        if np.count_nonzero(first):
            reward[first] = 0.0
        return make_rows(rows, reward, first, last, terminal)

    def _again(
        self, native: Any, obs: Any, reward: np.ndarray, terminal: np.ndarray, last: np.ndarray
    ) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
        """Repeats the action where the row is inside an episode, summing rewards.

        Environments that were just reset, or are done, must not be stepped; envpool steps any
        subset by its ids and answers in any order.
        """
        reward = reward.astype(np.float32)
        for _ in range(self._repeat - 1):
            ids = np.flatnonzero(~(self._last | last)).astype(np.int32)
            if len(ids) == 0:
                break
            part = self._pool.step(_select(native, ids), ids)
            ids = part[4]["env_id"]
            reward[ids] += part[1]
            terminal[ids] = part[2]
            last[ids] = part[2] | part[3]
            obs = part[0] if len(ids) == self.num_envs else _scatter(obs, part[0], ids)
        return obs, reward, terminal, last

    def send_part(self, action: np.ndarray, ids: np.ndarray) -> None:  # (n, ...), (n,) ascending
        """Begins a step of some environments, none of which may have ended; see `receive_part`."""
        if self._last is None:
            raise EnvError(f"{self.task}: expected reset() before the first step(), got send_part")
        self._part = self._act.batch(action, len(ids)), np.asarray(ids, np.int32)
        self._pool.send(*self._part)

    def receive_part(self) -> Rows:
        """The rows (n, ...) that the step of `send_part` led to, in the order of its ids."""
        native, ids = self._part
        obs, reward, terminal, last, info = self._received()
        place = np.argsort(info["env_id"])  # ids ascend
        if (np.diff(info["env_id"]) < 0).any():
            obs, reward = _select(obs, place), reward[place]
            terminal, last = terminal[place], last[place]
        for _ in range(self._repeat - 1):
            more = np.flatnonzero(~last)
            if len(more) == 0:
                break
            self._pool.send(_select(native, more), ids[more])
            part = self._received()
            where = np.searchsorted(ids, part[4]["env_id"])
            obs = _scatter(obs, part[0], where)
            reward[where] += part[1]
            terminal[where], last[where] = part[2], part[3]
        first = np.zeros(len(ids), bool)
        self._last[ids] = last
        return make_rows(self._obs.batch(obs), reward, first, last, terminal)

    def _received(self) -> tuple:
        obs, reward, terminal, truncated, info = self._pool.recv()
        return obs, reward.astype(np.float32, copy=False), terminal, terminal | truncated, info

    def render(self) -> np.ndarray | None:  # (N, H, W, 3) uint8
        if self._render_mode is None:
            return None
        try:
            if self._mujoco and not _can_render(self._env_id):
                raise RuntimeError("OpenGL does not work here (try LD_PRELOAD=libGL.so.1)")
            return np.array(self._pool.render(env_ids=np.arange(self.num_envs)), dtype=np.uint8)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            warnings.warn(f"{self.task}: no pictures, {error}", stacklevel=2)
            self._render_mode = None
            return None

    def close(self) -> None:
        # The pool has no close; its threads end with the last reference.
        from fastwm.envs.vizdoom import end

        end(self.__dict__)


class Door:
    """envpool's compiled step by itself: arrays in and out, in the order of its own keys.

    For one player and one array of actions; the arrays are those that `pool.step` returns.
    """

    def __init__(self, pool: Any, places: dict[tuple, int]) -> None:
        self._call, self._take, self._places = pool._send, pool._recv, list(places.items())
        keys = pool._state_keys
        self._reward, self._done, self._cut = map(keys.index, ("reward", "done", "trunc"))
        self._envs = np.arange(len(pool), dtype=np.int32)
        self._dtype = pool._spec._action_spec[-1][0]
        self._sent: list[np.ndarray] = []

    @classmethod
    def of(cls, pool: Any, paths: list[tuple]) -> Door | None:
        """None where this envpool, or this environment, is not as expected.

        paths: of the observations that are wanted, within its observation space.
        """
        try:
            names = {key: i for i, key in enumerate(pool._state_keys)}
            seen = [key for key in names if key == "obs" or key.startswith("obs:")]
            places = {tuple(key[4:].split(".")) if ":" in key else (): names[key] for key in seen}
            if paths == [()] and len(places) == 1:  # envpool unwraps a lone observation
                places = {(): names[seen[0]]}
            known = pool._spec._action_keys == ["env_id", "players.env_id", "action"]
            if not known or pool.config["max_num_players"] != 1:
                return None
            return cls(pool, {path: places[path] for path in paths})
        except (AttributeError, KeyError, ValueError):
            return None

    def send(self, native: np.ndarray) -> None:  # (N, ...)
        action = np.ascontiguousarray(native, self._dtype)
        self._sent = [self._envs, self._envs, action]  # alive until the step is over
        self._call(self._sent)

    def receive(self) -> tuple[dict[tuple, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
        """Observations by path, reward, is_terminal, is_last."""
        state = self._take()
        done, cut = state[self._done], state[self._cut]
        terminal, last = done > cut, done | cut
        return {path: state[i] for path, i in self._places}, state[self._reward], terminal, last


# Families whose step takes about a microsecond, and what is slower in them.
QUICK, SLOWER = ("envpool.classic_control", "envpool.toy_text"), ("Acrobot",)


def few_threads(env_id: str, num_envs: int) -> dict[str, int]:
    """`num_threads` for environments that one thread steps sooner than several; else nothing.

    With two threads 64 CartPoles took a sixth more processor time, for waking and waiting alone.
    """
    from envpool.registration import registry

    found = registry.specs.get(env_id, ("",))
    quick = found[0] in QUICK and not env_id.startswith(SLOWER)
    return {"num_threads": 1} if quick and num_envs <= 64 else {}


def _select(tree: Any, ids: np.ndarray) -> Any:
    if isinstance(tree, dict):
        return {key: _select(child, ids) for key, child in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_select(child, ids) for child in tree)
    return tree[ids]


def _scatter(tree: Any, part: Any, ids: np.ndarray) -> Any:
    """Writes the rows `ids` of nested arrays, in place."""
    if isinstance(tree, dict):
        return {key: _scatter(child, part[key], ids) for key, child in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_scatter(*pair, ids) for pair in zip(tree, part, strict=True))
    tree[ids] = part
    return tree


def load_gl() -> bool:
    """Makes OpenGL's symbols visible to libraries that are loaded later."""
    try:
        ctypes.CDLL("libGL.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def load_envpool(who: str) -> Any:
    """Imports envpool, after OpenGL: its MuJoCo renderer looks the symbols up once."""
    if "envpool" not in sys.modules:
        _state["gl"] = load_gl()
    return import_package("envpool", PIP, who)


_state = {"gl": False}


@functools.cache
def _can_render(env_id: str) -> bool:
    """Whether MuJoCo pictures work here. A failure ends the process, so another one tries."""
    if not _state["gl"]:
        return False
    code = (
        "import ctypes; ctypes.CDLL('libGL.so.1', mode=ctypes.RTLD_GLOBAL); import envpool; "
        f"e = envpool.make_gymnasium({env_id!r}, num_envs=1, render_mode='rgb_array'); "
        "e.reset(); e.render(env_ids=[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    return done.returncode == 0


def pixel_settings(who: str, env_id: str, size: tuple[int, int], camera: int) -> dict[str, Any]:
    """envpool's options for pictures in place of the state, of MuJoCo families."""
    load_envpool(who)
    if not _can_render(env_id):
        raise MissingPackageError(
            f"{who}: expected a working OpenGL for image observations, got none; install Mesa's "
            "EGL (apt install libegl1 libgl1 libgl1-mesa-dri), or start with "
            "LD_PRELOAD=libGL.so.1 if envpool was imported before fastwm"
        )
    height, width = size
    return {
        "from_pixels": True,
        "render_height": height,
        "render_width": width,
        "render_camera_id": camera,
        "frame_stack": 1,
    }
