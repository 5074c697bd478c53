"""gymnasium: single environments in a loop, and vector environments in any autoreset mode."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from fastwm.envs.base import (
    EnvError,
    EnvOptionError,
    Rows,
    UnknownTaskError,
    VecEnv,
    check_num_envs,
    import_package,
    make_rows,
    spread_seeds,
    step_limit,
)
from fastwm.envs.convert import ActMap, ObsMap, ObsOptions, pick

PIP = "'gymnasium[box2d]'"


def load_gymnasium(who: str) -> Any:
    return import_package("gymnasium", PIP, who)


class GymEnv(VecEnv):
    """N single gymnasium environments in this process.

    An environment that raises is replaced by a new one: its row repeats the last observation with
    is_last (not is_terminal), so the episode counts as cut off, and `crashes` counts it. After more
    than `max_crashes` of them without a finished episode, EnvError carries the original error.
    """

    def __init__(
        self,
        factory: Callable[[], Any],
        num_envs: int,
        seed: int = 0,
        *,
        task: str = "",
        obs: ObsOptions | None = None,
        action_repeat: int = 1,
        frames_per_action: int = 1,
        time_limit: int | None = None,
        bounds: Any = None,
        max_crashes: int = 5,
    ) -> None:
        """frames_per_action: frames that one step of the environment already stands for.
        time_limit: frames after which an episode is cut off; None: the environment decides."""
        self.task, self.seed = task or "gymnasium", int(seed)
        self.num_envs = check_num_envs(self.task, num_envs)
        if action_repeat < 1:
            raise EnvOptionError(f"{self.task}: expected action_repeat >= 1, got {action_repeat}")
        self._repeat, self.crashes = int(action_repeat), 0
        self.action_repeat = self._repeat * int(frames_per_action)
        self._factory, self._max_crashes = factory, int(max_crashes)
        self._limit = step_limit(self.task, time_limit, int(frames_per_action))
        self._age = [0] * self.num_envs  # steps of the environment in this episode
        self._envs: list[Any] = [factory() for _ in range(self.num_envs)]
        for name in ("observation_space", "action_space", "reset", "step"):
            if not hasattr(self._envs[0], name):
                raise EnvError(
                    f"{self.task}: expected the factory to return a gymnasium.Env, got "
                    f"{type(self._envs[0]).__name__} without {name!r}"
                )
        self._act = ActMap(self.task, self._envs[0].action_space, self.num_envs, bounds)
        self._obs = ObsMap(
            self.task, self._envs[0].observation_space, obs or ObsOptions(), copy=False
        )
        self.obs_space, self.act_space = self._obs.space, self._act.space
        self.obs_bounds = self._obs.bounds
        self._seeds: list[int | None] = list(spread_seeds(self.seed, self.num_envs))
        self._streak = [0] * self.num_envs  # crashes since the last finished episode
        self._raw: list[Any] = [None] * self.num_envs
        self._rows: Rows | None = None
        self._started = False

    def reset(self) -> Rows:
        first = np.ones(self.num_envs, bool)
        for i in range(self.num_envs):
            self._raw[i] = self._start(i)
        self._started = True
        none = np.zeros((2, self.num_envs), bool)
        return self._row(np.zeros(self.num_envs, np.float32), first, *none)

    def step(self, action: np.ndarray) -> Rows:  # (N, *act_space.shape)
        if self._rows is None:
            raise EnvError(f"{self.task}: expected reset() before the first step(), got step()")
        native = self._act.batch(action)
        first = self._last.copy()
        reward = np.zeros(self.num_envs, np.float32)
        last, terminal = np.zeros((2, self.num_envs), bool)
        crashed = []
        for i in range(self.num_envs):
            if first[i]:
                self._raw[i] = self._start(i)
                continue
            try:
                raw, reward[i], terminal[i], last[i] = self._advance(i, pick(native, i))
            except EnvError:
                raise
            except Exception as error:  # whatever a user's environment may raise
                self._crash(i, error)
                crashed.append(i)
                reward[i], terminal[i], last[i] = 0.0, False, True
                continue
            self._raw[i] = raw
            if last[i]:
                self._streak[i] = 0
        return self._row(reward, first, last, terminal, crashed)

    def _row(
        self,
        reward: np.ndarray,
        first: np.ndarray,
        last: np.ndarray,
        terminal: np.ndarray,
        crashed: list[int] = (),
    ) -> Rows:
        obs = self._obs.stack(self._raw)
        for i in crashed:  # the environment's own buffer may be half written
            for name in obs:
                obs[name][i] = self._rows[name][i]
        self._last = last.copy()
        self._rows = make_rows(dict(obs), reward, first, last, terminal)
        return dict(self._rows)

    def _advance(self, i: int, action: Any) -> tuple[Any, float, bool, bool]:
        """One decision of environment i: (observation, summed reward, terminated, done)."""
        total = 0.0
        for _ in range(self._repeat):
            result = self._envs[i].step(action)
            if not isinstance(result, tuple) or len(result) != 5:
                raise EnvError(
                    f"{self.task}: expected step() to return (obs, reward, terminated, truncated, "
                    f"info), got {_describe(result)}; old gym environments need a gymnasium wrapper"
                )
            raw, reward, terminated, truncated, _ = result
            total += float(reward)
            self._age[i] += 1
            truncated = truncated or self._age[i] >= self._limit
            if terminated or truncated:
                break
        return raw, total, bool(terminated), bool(terminated or truncated)

    def _start(self, i: int) -> Any:
        """First observation of a new episode, in a new environment if the old one crashed."""
        self._age[i] = 0
        while True:
            try:
                if self._envs[i] is None:
                    self._envs[i] = self._factory()
                seed, self._seeds[i] = self._seeds[i], None
                result = self._envs[i].reset(seed=seed)
                break
            except Exception as error:  # whatever a user's environment may raise
                if not self._started:
                    raise
                self._crash(i, error)
        if not isinstance(result, tuple) or len(result) != 2:
            raise EnvError(
                f"{self.task}: expected reset(seed=...) to return (obs, info), got "
                f"{_describe(result)}; old gym environments need a gymnasium wrapper"
            )
        return result[0]

    def _crash(self, i: int, error: Exception) -> None:
        self.crashes += 1
        self._streak[i] += 1
        if self._streak[i] > self._max_crashes:
            raise EnvError(
                f"{self.task}: environment {i} crashed {self._streak[i]} times without finishing "
                f"an episode, giving up; the last error was {type(error).__name__}: {error}"
            ) from error
        warnings.warn(
            f"{self.task}: environment {i} crashed ({type(error).__name__}: {error}); its "
            f"episode is cut off and it restarts ({self._streak[i]} of {self._max_crashes})",
            stacklevel=3,
        )
        try:
            self._envs[i].close()
        except Exception as again:  # a broken environment often cannot close either
            warnings.warn(f"{self.task}: closing it failed too: {again!r}", stacklevel=3)
        self._envs[i] = None
        # Another seed: the old one may lead to the same crash at once.
        self._seeds[i] = spread_seeds(self.seed, 1, i, self.crashes)[0]

    def render(self) -> np.ndarray | None:  # (N, H, W, 3) uint8
        if self._rows is None or any(
            env is None or getattr(env, "render_mode", None) != "rgb_array" for env in self._envs
        ):
            return None
        frames = [env.render() for env in self._envs]
        if any(frame is None for frame in frames):
            return None
        return np.stack(frames).astype(np.uint8, copy=False)

    def close(self) -> None:
        envs, self._envs = self._envs, []
        for env in envs:
            if env is not None:
                env.close()


def _describe(result: Any) -> str:
    if isinstance(result, tuple):
        return f"a tuple of {len(result)}"
    return type(result).__name__


class GymVectorEnv(VecEnv):
    """A gymnasium.vector.VectorEnv in any of its three autoreset modes, as one stream of rows.

    NEXT_STEP already is our stream. In SAME_STEP and DISABLED mode every environment must take a
    step in every call, while a finished one owes the row of its reset. It therefore plays one step
    that nobody sees and is then reset by a mask, so that the episode begins with a genuine first
    observation and all of its transitions were chosen by the caller.
    """

    def __init__(
        self,
        env: Any,
        seed: int = 0,
        *,
        task: str = "",
        obs: ObsOptions | None = None,
        frames_per_action: int = 1,
        bounds: Any = None,
    ) -> None:
        self.task, self.seed = task or "gymnasium vector", int(seed)
        self.num_envs, self.action_repeat = int(env.num_envs), int(frames_per_action)
        mode = (env.metadata or {}).get("autoreset_mode")
        self._mode = getattr(mode, "name", str(mode)).upper()
        if self._mode not in ("NEXT_STEP", "SAME_STEP", "DISABLED"):
            raise EnvError(
                f"{self.task}: expected metadata['autoreset_mode'] to be NEXT_STEP, SAME_STEP or "
                f"DISABLED, got {mode!r}; gymnasium of at least 1.1 sets it"
            )
        self._env = env
        self._act = ActMap(self.task, env.single_action_space, self.num_envs, bounds)
        self._obs = ObsMap(self.task, env.single_observation_space, obs or ObsOptions())
        self.obs_space, self.act_space = self._obs.space, self._act.space
        self.obs_bounds = self._obs.bounds
        self._seeds: list[int] | None = spread_seeds(self.seed, self.num_envs)
        self._last: np.ndarray | None = None
        # By its exact type: a wrapper around it may pass the methods on, and leave itself out.
        self._parallel = type(env).__name__ == "AsyncVectorEnv"

    def reset(self) -> Rows:
        seeds, self._seeds = self._seeds, None
        obs, _ = self._env.reset(seed=_native_seeds(self._env, seeds))
        self._last = np.zeros(self.num_envs, bool)
        flags = np.zeros((3, self.num_envs), bool)
        flags[0] = True
        return make_rows(self._obs.batch(obs), np.zeros(self.num_envs, np.float32), *flags)

    def step(self, action: np.ndarray) -> Rows:  # (N, *act_space.shape)
        self.send(action)
        return self.receive()

    def send(self, action: np.ndarray) -> None:  # (N, *act_space.shape)
        if self._last is None:
            raise EnvError(f"{self.task}: expected reset() before the first step(), got step()")
        native = self._act.batch(action)
        if self._mode == "DISABLED" and self._last.any():
            self._reset(self._last)  # a done environment must not be stepped
        if self._parallel:
            self._env.step_async(native)
        self._sent = native

    def receive(self) -> Rows:
        native, self._sent = self._sent, None
        if native is None:
            raise EnvError(f"{self.task}: expected send() before receive(), got receive()")
        first = self._last
        result = self._env.step_wait() if self._parallel else self._env.step(native)
        obs, reward, terminal, truncated, info = result
        rows = self._obs.batch(obs)
        reward = np.array(reward, dtype=np.float32)
        terminal = np.array(terminal, dtype=bool)
        last = terminal | np.asarray(truncated, dtype=bool)
        if self._mode == "SAME_STEP" and last.any():
            self._put_final(rows, info, np.flatnonzero(last & ~first))
        if self._mode != "NEXT_STEP" and first.any():
            self._put_reset(rows, first, ~(first | last))
            terminal[first] = last[first] = False
        reward[first] = 0.0
        self._last = last.copy()
        return make_rows(rows, reward, first, last, terminal)

    def _reset(self, mask: np.ndarray) -> Rows:
        obs, _ = self._env.reset(options={"reset_mask": mask.copy()})
        return self._obs.batch(obs)

    def _put_reset(self, rows: Rows, mask: np.ndarray, keep: np.ndarray) -> None:
        """Replaces the unseen step by a reset, and makes sure that nothing in `keep` was reset."""
        for name, value in self._reset(mask).items():
            if not np.array_equal(value[keep], rows[name][keep], equal_nan=True):
                raise EnvError(
                    f"{self.task}: expected reset(options={{'reset_mask': ...}}) to leave the "
                    "other environments alone, got changed observations; make the vector "
                    "environment with autoreset_mode=AutoresetMode.NEXT_STEP"
                )
            rows[name][mask] = value[mask]

    def _put_final(self, rows: Rows, info: dict, which: np.ndarray) -> None:
        """SAME_STEP returns the next episode's observation; the last one is in the info."""
        if len(which) == 0:
            return
        if "final_obs" not in info:
            raise EnvError(
                f"{self.task}: expected info['final_obs'] where an episode ends in SAME_STEP mode, "
                f"got {sorted(info)}"
            )
        final = self._obs.stack([info["final_obs"][i] for i in which])
        for name, value in final.items():
            rows[name][which] = value

    def render(self) -> np.ndarray | None:  # (N, H, W, 3) uint8
        if self._last is None or getattr(self._env, "render_mode", None) != "rgb_array":
            return None
        frames = self._env.render()
        return None if frames is None else np.stack(frames).astype(np.uint8, copy=False)

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
        self._env = None


def _native_seeds(env: Any, seeds: list[int] | None) -> Any:
    """gymnasium's vector environments take a list, ale-py's an array."""
    from_ale = type(env).__module__.startswith("ale_py")
    return np.asarray(seeds) if from_ale and seeds is not None else seeds


def gym_factory(who: str, env_id: str, settings: dict) -> Callable[[], Any]:
    """A function that makes one registered environment, able to render where it can be headless."""
    gymnasium = load_gymnasium(who)
    module = env_id.partition(":")[0] if ":" in env_id else _REGISTERED_BY.get(_namespace(env_id))
    if module is not None:
        import_package(module, module.replace("_", "-"), who)
    try:
        spec = gymnasium.spec(env_id.rpartition(":")[2])
    except gymnasium.error.Error as error:
        raise UnknownTaskError(
            f"{who}: expected a registered gymnasium id, got {env_id!r}: {error}"
        ) from error
    given = settings
    if "render_mode" not in settings:
        creator = gymnasium.envs.registration.load_env_creator(spec.entry_point)
        modes = (getattr(creator, "metadata", None) or {}).get("render_modes", ())
        if "rgb_array" in modes:
            settings = {**settings, "render_mode": "rgb_array"}

    def build() -> Any:
        try:
            # The passive checker looks at every step; check_env does that once.
            return gymnasium.make(spec, disable_env_checker=True, **settings)
        except TypeError as error:
            if not given:
                raise
            raise EnvOptionError(
                f"{who}: expected options that {env_id} takes, got {given}: {error}"
            ) from error

    return build


def in_processes(who: str, factory: Callable[[], Any], num_envs: int) -> Any:
    """gymnasium's vector environment with one process for each, for environments that are slow."""
    vector = load_gymnasium(who).vector
    mode = vector.AutoresetMode.NEXT_STEP
    return vector.AsyncVectorEnv([factory] * check_num_envs(who, num_envs), autoreset_mode=mode)


# Packages that must be imported before gymnasium knows their ids.
_REGISTERED_BY = {"MiniGrid": "minigrid", "BabyAI": "minigrid", "ALE": "ale_py"}


def _namespace(env_id: str) -> str:
    return env_id.partition("/")[0] if "/" in env_id else env_id.partition("-")[0]


def registered_ids(who: str, package: str) -> list[str]:
    """All gymnasium ids, after importing the package that adds its own."""
    import_package(package, package, who)
    return list(load_gymnasium(who).registry)


def atari_vector(
    who: str,
    game: str,
    num_envs: int,
    seed: int,
    obs: ObsOptions,
    frame_skip: int,
    *,
    max_frames: int,
    **settings: Any,
) -> GymVectorEnv:
    """ale-py's own vector environment, which knows envpool's option names."""
    vector = import_package("ale_py.vector_env", "ale-py", who)
    roms = import_package("ale_py.roms", "ale-py", who).get_all_rom_ids()
    plain = {rom.replace("_", ""): rom for rom in roms}
    rom = plain.get(game.replace("_", "").replace("-", "").lower())
    if rom is None:
        near = difflib.get_close_matches(game, roms, n=3)
        hint = f"; did you mean {', '.join(f'atari_{name}' for name in near)}?" if near else ""
        raise UnknownTaskError(f"{who}: expected one of ale-py's games, got {game!r}{hint}")
    env = vector.AtariVectorEnv(
        rom,
        check_num_envs(who, num_envs),
        frameskip=frame_skip,
        grayscale=obs.gray,
        max_num_frames_per_episode=max_frames,
        reward_clipping=False,
        **settings,
    )
    return GymVectorEnv(env, seed, task=who, obs=obs, frames_per_action=frame_skip)
