"""The row contract: golden streams of a counting environment through every adapter."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fastwm import envs
from fastwm.envs.check import check, random_action

gymnasium = pytest.importorskip("gymnasium")

LENGTHS = (1, 3, 5)


class Counting(gymnasium.Env):
    """Episode e of environment i lasts LENGTHS[i] steps; odd episodes terminate, even are cut."""

    observation_space = gymnasium.spaces.Box(-1, 100, (2,), np.float64)
    action_space = gymnasium.spaces.Discrete(100)

    def __init__(self, index: int) -> None:
        self.index, self.length, self.seen = index, LENGTHS[index], []

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return self._observe(), {}

    def step(self, action):
        self.count += 1
        done = self.count == self.length
        return self._observe(), 10.0 * self.count + action / 100, done and self.index == 1, done, {}

    def _observe(self):
        return np.array([self.count, self.index], np.float64)


def expected_rows(steps: int):
    """The stream, row by row, without any vector logic: (count, first, last, terminal)."""
    rows = []
    for i, length in enumerate(LENGTHS):
        episode = [(c, c == 0, c == length, c == length and i == 1) for c in range(length + 1)]
        rows.append((episode * steps)[: steps + 1])
    return rows


def counting_envs():
    from fastwm.envs.gymnasium import GymEnv, GymVectorEnv

    def single():
        indices = iter(range(3))
        return GymEnv(lambda: Counting(next(indices)), 3)

    def vector(mode, kind=gymnasium.vector.SyncVectorEnv, **options):
        factories = [lambda i=i: Counting(i) for i in range(3)]
        return GymVectorEnv(kind(factories, autoreset_mode=mode, **options))

    modes = gymnasium.vector.AutoresetMode
    kinds = {"sync": gymnasium.vector.SyncVectorEnv, "async": gymnasium.vector.AsyncVectorEnv}
    cases = {"single": single}
    for mode in modes:
        for name, kind in kinds.items():
            cases[f"{name}-{mode.name}"] = lambda mode=mode, kind=kind: vector(mode, kind)
        cases[f"nocopy-{mode.name}"] = lambda mode=mode: vector(mode, copy=False)
    return cases


@pytest.mark.parametrize("name", counting_envs())
def test_golden_stream(name):
    env = counting_envs()[name]()
    steps = 24
    rows = [env.reset()]
    actions = np.stack([(7 * np.arange(3) + t) % 100 for t in range(steps)]).astype(np.int32)
    for action in actions:
        rows.append(env.step(action))
    env.close()
    for i, stream in enumerate(expected_rows(steps)):
        for t, (count, first, last, terminal) in enumerate(stream):
            row = {key: value[i] for key, value in rows[t].items()}
            assert row["vector"].tolist() == [count, i], (i, t)
            assert row["is_first"] == first and row["is_last"] == last, (i, t)
            assert row["is_terminal"] == terminal, (i, t)
            # Every reward is the answer to the caller's own action; a first row has none.
            reward = 0.0 if first else 10 * count + actions[t - 1, i] / 100
            assert row["reward"] == np.float32(reward), (i, t)
    assert {value.dtype.name for value in rows[-1].values()} == {"float32", "bool"}


@pytest.mark.parametrize("task", ["cartpole", "pendulum", "dummy", "dummy_image"])
def test_make(task):
    with envs.make(task, 3, seed=4) as env:
        assert env.reset()["is_first"].all()
        action = np.zeros((3, *env.act_space.shape), env.act_space.dtype)
        rows = env.step(action)
        for name, space in env.obs_space.items():
            assert rows[name].shape == (3, *space.shape)
            assert rows[name].dtype == space.dtype


# ---------------------------------------------------------------------------------------- failures


class Fragile(gymnasium.Env):
    """Raises on chosen calls; `plan` is shared by all instances and holds (method, call number)."""

    observation_space = gymnasium.spaces.Box(-10, 10, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    calls: dict
    plan: set
    made: int

    def __init__(self):
        type(self).made += 1

    def _call(self, name):
        self.calls[name] = self.calls.get(name, 0) + 1
        if (name, self.calls[name]) in self.plan or (name, "all") in self.plan:
            raise OSError(f"{name} {self.calls[name]} broke")

    def reset(self, *, seed=None, options=None):
        self._call("reset")
        self.count, self.buffer = 0, np.zeros(1, np.float32)
        return self.buffer, {}

    def step(self, action):
        self.count += 1
        self.buffer[:] = self.count  # its own array, changed before the crash
        self._call("step")
        return self.buffer, 1.0, self.count == 4, False, {}


def fragile(*plan, **options):
    from fastwm.envs.gymnasium import GymEnv

    kind = type("Broken", (Fragile,), {"calls": {}, "plan": set(plan), "made": 0})
    return GymEnv(kind, 1, **options), kind


def play(env, steps):
    rows = [env.reset()]
    for _ in range(steps):
        rows.append(env.step(np.zeros(env.num_envs, np.int32)))
    return {name: np.array([row[name][0] for row in rows]).reshape(steps + 1) for name in rows[0]}


def test_crash_cuts_the_episode_off_and_restarts():
    env, kind = fragile(("step", 3), ("reset", 2))
    with pytest.warns(UserWarning, match="crashed"):
        rows = play(env, 8)
    # The crash repeats the last good observation; the second reset fails once too.
    assert rows["vector"].tolist() == [0, 1, 2, 2, 0, 1, 2, 3, 4]
    assert rows["is_last"].tolist() == [False] * 3 + [True] + [False] * 4 + [True]
    assert rows["is_first"].tolist() == [True] + [False] * 3 + [True] + [False] * 4
    assert rows["is_terminal"].tolist() == [False] * 8 + [True]
    assert rows["reward"].tolist() == [0, 1, 1, 0, 0, 1, 1, 1, 1]
    assert env.crashes == 2 and kind.made == 3


def test_gives_up_after_k_crashes_with_the_original_error():
    env, kind = fragile(("step", "all"), max_crashes=5)
    with pytest.warns(UserWarning), pytest.raises(envs.EnvError, match="crashed 6 times") as caught:
        play(env, 50)
    assert isinstance(caught.value.__cause__, OSError)
    assert kind.made == 6


def test_a_broken_first_reset_is_not_hidden():
    env, _ = fragile(("reset", 1))
    with pytest.raises(OSError, match="reset 1 broke"):
        env.reset()


def test_crashes_are_forgiven_by_a_finished_episode():
    env, _ = fragile(*[("step", 5 * n) for n in range(1, 8)], max_crashes=1)
    with pytest.warns(UserWarning):
        play(env, 45)
    assert env.crashes > 2


def test_old_gym_interface_is_named():
    from fastwm.envs.gymnasium import GymEnv

    class Old(Counting):
        def step(self, action):
            return super().step(action)[:4]

    env = GymEnv(lambda: Old(0), 1)
    env.reset()
    with pytest.raises(envs.EnvError, match="terminated, truncated.*a tuple of 4"):
        env.step(np.zeros(1, np.int32))


def test_vector_env_that_ignores_the_reset_mask_is_refused():
    from fastwm.envs.gymnasium import GymVectorEnv

    class Deaf(gymnasium.vector.SyncVectorEnv):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=seed)

    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    env = GymVectorEnv(Deaf([lambda i=i: Counting(i) for i in range(3)], autoreset_mode=mode))
    env.reset()
    with pytest.raises(envs.EnvError, match="reset_mask.*NEXT_STEP"):
        for _ in range(8):
            env.step(np.zeros(3, np.int32))


# ------------------------------------------------------------------------------------------ make


def test_unknown_tasks_get_suggestions():
    with pytest.raises(envs.UnknownTaskError, match="did you mean cartpole"):
        envs.make("cartpol", 1)
    with pytest.raises(envs.UnknownTaskError, match="CartPole"):
        envs.make("gymnasium:CartPol-v1", 1)
    with pytest.raises(envs.UnknownTaskError, match="no_such_module"):
        envs.make("no_such_module:make", 1)
    with pytest.raises(envs.UnknownTaskError, match="did you mean make"):
        envs.make("fastwm.envs:mak", 1)
    with pytest.raises(ValueError, match="positive integer, got 0"):
        envs.make("dummy", 0)


def test_unknown_options_get_suggestions():
    with pytest.raises(envs.EnvOptionError, match="'lenths'; did you mean lengths"):
        envs.make("dummy", 2, lenths=(2, 3))
    with pytest.raises(envs.EnvOptionError, match="got {'hall': 3}: got an unexpected"):
        envs.make("examples.custom_env:make", 2, hall=3)
    with pytest.raises(envs.EnvOptionError, match="CartPole-v1 takes, got {'hall': 3}"):
        envs.make("gymnasium:CartPole-v1", 2, hall=3)
    with pytest.raises(envs.EnvOptionError, match=r"size to be \(H, W\), got \(1, 2, 3\)"):
        envs.make("dummy_image", 2, size=(1, 2, 3))
    with pytest.raises(envs.EnvOptionError, match="'hwc' or 'chw', got 'cwh'"):
        envs.make("dummy_image", 2, image_layout="cwh")


BAD_ACTIONS = [
    ("dummy", np.zeros(3, np.int32), ValueError, r"shape \(N, \*act_space.shape\) = \(2,\), got"),
    ("dummy", np.zeros(2, np.float32), TypeError, "int32, got float32"),
    ("dummy", np.array([0, 2], np.int32), ValueError, "values from 0 to 2"),
    ("dummy", np.array([-1, 0], np.int32), ValueError, "values from -1 to 0"),
    ("gymnasium:Pendulum-v1", np.zeros(2, np.float32), ValueError, r"\(2, 1\), got \(2,\)"),
    ("gymnasium:Pendulum-v1", np.zeros((2, 1), np.int32), TypeError, "float32, got int32"),
    ("gymnasium:Pendulum-v1", np.array([[0], [np.nan]], "f"), ValueError, r"nan at .*\(1, 0"),
    ("gymnasium:Pendulum-v1", np.array([[np.inf], [-np.inf]], np.float32), ValueError, "finite"),
]


@pytest.mark.parametrize(("task", "action", "error", "message"), BAD_ACTIONS)
def test_bad_actions(task, action, error, message):
    with envs.make(task, 2) as env:
        env.reset()
        with pytest.raises(error, match=message):
            env.step(action)


@pytest.mark.parametrize("task", ["dummy", "gymnasium:CartPole-v1"])
def test_step_before_reset(task):
    with envs.make(task, 1) as env, pytest.raises(envs.EnvError, match="expected reset"):
        env.step(np.zeros(1, np.int32))


def test_seeds_differ_between_environments_and_runs():
    def first(seed):
        with envs.make("gymnasium:CartPole-v1", 4, seed=seed) as env:
            return env.reset()["vector"]

    assert (first(0) == first(0)).all()
    both = np.concatenate([first(0), first(1)])
    assert len(np.unique(both, axis=0)) == 8


def test_action_repeat_sums_rewards_and_stops_at_the_end():
    from fastwm.envs.gymnasium import GymEnv

    env = GymEnv(lambda: Counting(2), 1, action_repeat=2)  # 5 steps: decisions of 2, 2 and 1
    env.reset()
    out = [env.step(np.zeros(1, np.int32)) for _ in range(4)]
    assert [row["reward"].item() for row in out] == [10 + 20, 30 + 40, 50, 0]
    assert [row["is_last"].item() for row in out] == [False, False, True, False]
    assert env.action_repeat == 2


def test_rows_are_never_overwritten():
    class Reusing(Counting):
        buffer = np.zeros(2)

        def _observe(self):
            self.buffer[:] = super()._observe()
            return self.buffer

    from fastwm.envs.gymnasium import GymEnv

    env = GymEnv(lambda: Reusing(2), 2)
    rows = env.reset()
    before = {name: value.copy() for name, value in rows.items()}
    for _ in range(4):
        env.step(np.zeros(2, np.int32))
    assert all((rows[name] == before[name]).all() for name in rows)


def test_importing_envs_changes_nothing():
    code = (
        "import os, sys; before = dict(os.environ); import fastwm.envs, fastwm.check_env;"
        "assert dict(os.environ) == before;"
        "bad = {'envpool', 'gymnasium', 'pygame', 'ale_py'} & set(sys.modules); print(bad);"
        "sys.exit(len(bad))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_example_runs_as_a_task():
    with envs.make("examples.custom_env:make", 2, seed=1, corridor=7) as env:
        report = check(env, 60)
    assert not report.errors and "episodes:" in str(report)


def vectorized(num_envs, mode):
    factories = [lambda i=i: Counting(i) for i in range(num_envs)]
    return gymnasium.vector.SyncVectorEnv(factories, autoreset_mode=mode)


def native(num_envs, seed):
    from fastwm.envs.dummy import DummyEnv

    return DummyEnv(num_envs, seed)


def nothing(num_envs):
    return 3


def test_factories_of_vector_environments():
    with envs.make(f"{__name__}:vectorized", 3, mode="SameStep") as env:
        assert not check(env, 30).errors
    with envs.make(f"{__name__}:native", 3, seed=9) as env:
        assert not check(env, 30).errors and env.seed == 9
    with pytest.raises(envs.EnvError, match="VecEnv or a gymnasium.vector.VectorEnv, got int"):
        envs.make(f"{__name__}:nothing", 3)
    for options in ({"action_repeat": 2}, {"bounds": (0, 1)}):  # never ignored in silence
        with pytest.raises(envs.EnvOptionError, match=f"got .'{next(iter(options))}'.; let native"):
            envs.make(f"{__name__}:native", 3, **options)
    with pytest.raises(envs.EnvOptionError, match="got .'action_repeat'.; let vectorized"):
        envs.make(f"{__name__}:vectorized", 3, mode="SameStep", action_repeat=2)


def test_parallel_processes_give_the_same_rows():
    options = {"seed": 3, "max_episode_steps": 12}
    with (
        envs.make("gymnasium:CartPole-v1", 2, **options) as env,
        envs.make("gymnasium:CartPole-v1", 2, parallel=True, **options) as other,
    ):
        assert same([env.reset()], [other.reset()])
        assert same(drive(env, 40), drive(other, 40))
    with pytest.raises(ValueError, match="action_repeat of 1 and no time_limit"):
        envs.make("gymnasium:CartPole-v1", 2, parallel=True, action_repeat=2)


# --------------------------------------------------------------------------------------- journal


def drive(env, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [env.step(random_action(env, rng)) for _ in range(steps)]


def same(rows, others):
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
        for a, b in zip(rows, others, strict=True)
    )


@pytest.mark.parametrize("task", ["dummy", "gymnasium:CartPole-v1", "gymnasium:Pendulum-v1"])
def test_journal_restores_exactly(task):
    with envs.make(task, 3, seed=2) as env, envs.make(task, 3, seed=2) as fresh:
        env.reset()
        drive(env, 30)
        env.reset()  # a reset in between is part of the history
        last = drive(env, 300, seed=1)[-1]
        state = env.state_dict()
        assert same([fresh.load_state_dict(state)], [last])
        assert same(drive(env, 40, seed=3), drive(fresh, 40, seed=3))
        assert same([fresh.rows], [env.rows])


def test_journal_before_the_first_reset():
    with envs.make("dummy", 2) as env, envs.make("dummy", 2) as fresh:
        assert fresh.load_state_dict(env.state_dict()) is None
        assert same([fresh.reset()], [env.reset()])


def test_journal_refuses_chance():
    class Dice(Counting):
        def _observe(self):
            return np.random.default_rng().normal(size=2)

    from fastwm.envs.gymnasium import GymEnv

    env = envs.Journal(lambda: GymEnv(lambda: Dice(2), 1))
    env.reset()
    drive(env, 3)
    with pytest.raises(envs.EnvStateError, match="not deterministic"):
        env.load_state_dict(env.state_dict())
    assert env.reset()["is_first"].all()


def test_journal_limit_and_mismatches():
    env = envs.make("dummy", 2, journal_limit=10)
    env.reset()
    drive(env, 10)
    assert env.state_dict()["actions"].shape == (10, 2)
    env.load_state_dict(env.state_dict())
    drive(env, 1)
    state = env.state_dict()
    assert state["actions"] is None and state["steps"] == 11
    with pytest.raises(envs.EnvStateError, match="at most 10 recorded steps, got 11"):
        env.load_state_dict(state)
    with pytest.raises(envs.EnvStateError, match="seed = 5, got 0"):
        envs.make("dummy", 2, seed=5).load_state_dict(state)
    with pytest.raises(envs.EnvStateError, match="num_envs = 3, got 2"):
        envs.make("dummy", 3).load_state_dict(state)


# ---- send and receive


@pytest.mark.parametrize(
    "task", ["dummy", "gymnasium:CartPole-v1", "envpool:Pendulum-v1", "envpool:CartPole-v1"]
)
def test_a_step_in_two_halves_is_a_step(task):
    pytest.importorskip(task.split(":")[0] if ":" in task else "numpy")
    rng = np.random.default_rng(0)
    whole, halves = envs.make(task, 3, seed=1), envs.make(task, 3, seed=1)
    rows = [whole.reset(), halves.reset()]
    for _ in range(60):
        action = random_action(whole, rng)
        rows[0] = whole.step(action)
        halves.send(action)
        rows[1] = halves.receive()
        assert all(np.array_equal(rows[0][key], rows[1][key]) for key in rows[0])
    assert whole.state_dict()["hash"] == halves.state_dict()["hash"]
    with pytest.raises(envs.EnvError, match=r"expected send\(\) before receive\(\)"):
        halves.receive()
    halves.send(action)
    with pytest.raises(envs.EnvError, match=r"expected receive\(\) before state_dict\(\)"):
        halves.state_dict()
    halves.receive()
    for env in (whole, halves):
        env.close()


def test_parallel_processes_step_between_send_and_receive():
    pytest.importorskip("gymnasium")
    env = envs.make("gymnasium:CartPole-v1", 2, seed=0, parallel=True)
    plain = envs.make("gymnasium:CartPole-v1", 2, seed=0)
    for vec_env in (env, plain):
        vec_env.reset()
    for _ in range(40):
        action = np.ones(2, np.int32)
        env.send(action)
        assert env.env._env._state.value == "step"  # the processes are at it
        rows, expected = env.receive(), plain.step(action)
        assert all(np.array_equal(rows[key], expected[key]) for key in rows)
    env.close()
