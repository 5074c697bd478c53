"""envpool's adapter against envpool itself, driven by hand, one environment at a time."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest

from fastwm import envs
from fastwm.envs import envpool as adapter
from fastwm.envs.base import spread_seeds
from fastwm.envs.check import check, random_action

try:
    envpool = adapter.load_envpool("test_envpool")  # loads OpenGL first
except envs.MissingPackageError as error:
    pytest.skip(str(error), allow_module_level=True)
pytest.importorskip("gymnasium")


def raw(env_id, seed, **settings):
    """One environment by itself."""
    return envpool.make_gymnasium(env_id, num_envs=1, seed=seed, **settings)


def by_hand(env_id, seed, actions, repeat=1, **settings):
    """The rows of one environment, written as a plain loop over episodes."""
    env = raw(env_id, seed, **settings)
    rows, action_list = [], list(actions)

    def put(obs, reward, first, last, terminal):
        rows.append((np.asarray(obs, np.float32)[0], np.float32(reward), first, last, terminal))

    while action_list:
        # envpool's own reset at the start, and the ignored action after a done step
        obs = env.reset()[0] if not rows else env.step(np.asarray([action_list.pop(0)]))[0]
        put(obs, 0, True, False, False)
        done = False
        while action_list and not done:
            action, total = np.asarray([action_list.pop(0)]), np.float32(0)
            for _ in range(repeat):
                obs, reward, terminated, truncated, _ = env.step(action)
                total += reward[0]
                done = bool(terminated[0] or truncated[0])
                if done:
                    break
            put(obs, total, False, done, bool(terminated[0]))
    return rows


@pytest.mark.parametrize("repeat", [1, 2, 3])
def test_cartpole_rows(repeat):
    """Unequal episode lengths in N = 3: every row of every environment, also under repetition."""
    env = adapter.EnvpoolEnv("CartPole-v1", 3, seed=5, action_repeat=repeat)
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 2, (120, 3)).astype(np.int32)
    rows = [env.reset(), *(env.step(action) for action in actions)]
    lengths = set()
    for i, seed in enumerate(spread_seeds(5, 3)):
        wanted = by_hand("CartPole-v1", seed, actions[:, i], repeat)
        assert len(wanted) == len(rows)
        for t, (obs, reward, first, last, terminal) in enumerate(wanted):
            got = {name: value[i] for name, value in rows[t].items()}
            assert (got["vector"] == obs).all(), (i, t)
            assert got["reward"] == reward, (i, t)
            assert (got["is_first"], got["is_last"], got["is_terminal"]) == (first, last, terminal)
        lengths |= set(np.diff([t for t, row in enumerate(wanted) if row[2]]).tolist())
    assert len(lengths) > 3


@pytest.mark.parametrize(
    "env_id, repeat",
    [("CartPole-v1", 1), ("WalkerWalk-v1", 1), ("MiniGrid-Empty-5x5-v0", 1), ("CartPole-v1", 2)],
)
def test_the_compiled_step_gives_what_the_public_one_gives(env_id, repeat):
    """Lone, nested and float64 observations, with ends of episodes; repetition goes round it."""
    pair = [adapter.EnvpoolEnv(env_id, 3, 7, action_repeat=repeat, time_limit=9) for _ in range(2)]
    assert (pair[0]._door is None) == (repeat > 1)
    pair[1]._door = None
    rng, ends = np.random.default_rng(0), 0
    rows = [env.reset() for env in pair]
    for _ in range(25):
        for name, value in rows[0].items():
            assert value.dtype == rows[1][name].dtype
            np.testing.assert_array_equal(value, rows[1][name], err_msg=name)
        ends += rows[0]["is_last"].sum()
        action = random_action(pair[0], rng)
        rows = [env.step(action) for env in pair]
    assert ends > 3


def test_an_unknown_envpool_is_stepped_by_its_public_door():
    pool = adapter.EnvpoolEnv("CartPole-v1", 2)._pool
    assert adapter.Door.of(pool, [()]) is not None
    assert adapter.Door.of(pool, [("elsewhere",)]) is None
    assert adapter.Door.of(object(), [()]) is None


def test_time_limit_is_not_terminal():
    env = adapter.EnvpoolEnv("Pendulum-v1", 2, max_episode_steps=5)
    rows = [env.reset(), *(env.step(np.zeros((2, 1), np.float32)) for _ in range(12))]
    assert [row["is_last"][0] for row in rows] == [t % 6 == 5 for t in range(13)]
    assert [row["is_first"][0] for row in rows] == [t % 6 == 0 for t in range(13)]
    assert not any(row["is_terminal"].any() for row in rows)


def test_stale_reward_of_dm_control_is_dropped():
    pool = raw("WalkerWalk-v1", 0, max_episode_steps=4)
    pool.reset()
    action = np.full((1, 6), 0.3)
    rewards = [pool.step(action)[1][0] for _ in range(5)]
    assert rewards[4] != 0, "envpool returns 0 here by now: the adapter need not force it"
    env = adapter.EnvpoolEnv("WalkerWalk-v1", 2, max_episode_steps=4)
    rows = [env.reset(), *(env.step(np.full((2, 6), 0.3, np.float32)) for _ in range(5))]
    assert rows[5]["is_first"].all() and (rows[5]["reward"] == 0).all()
    assert rows[4]["is_last"].all() and (rows[4]["reward"] != 0).all()


def test_dmc_repeats_truly():
    """Rewards of both calls are summed, and 1000 calls are 500 decisions."""
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 6)).astype(np.float32)
    with envs.make("dmc_walker_walk", 1, seed=3) as env:
        env.reset()
        rewards = [env.step(action[None])["reward"][0] for action in actions]
        assert env.action_repeat == 2
    pool = raw("WalkerWalk-v1", spread_seeds(3, 1)[0])
    pool.reset()
    pairs = [[pool.step(a[None].astype(np.float64))[1][0] for _ in range(2)] for a in actions]
    assert np.allclose(rewards, np.sum(pairs, 1), rtol=1e-6)
    with envs.make("dmc_cartpole_swingup", 2) as env:
        env.reset()
        rows = [env.step(np.zeros((2, 1), np.float32)) for _ in range(501)]
    assert [t for t, row in enumerate(rows) if row["is_last"].any()] == [499]
    assert rows[500]["is_first"].all() and not rows[499]["is_terminal"].any()


def test_dmc_observations_are_named_float32():
    with envs.make("dmc_walker_walk", 2) as env:
        rows = env.reset()
        wanted = {"orientations": (14,), "height": (1,), "velocity": (9,)}
        assert {name: space.shape for name, space in env.obs_space.items()} == wanted
        assert all(rows[name].dtype == np.float32 for name in wanted)
        assert env.act_space.shape == (6,)
        # Declared bounds are the smallest positive double: no bounds.
        assert all(np.isneginf(low).all() for low, _ in env.obs_bounds.values())


def test_images_are_hwc():
    seed = spread_seeds(0, 2)
    settings = {"img_height": 64, "img_width": 64, "gray_scale": False, "stack_num": 1}
    settings |= {"use_fire_reset": False, "noop_max": 30}
    pool = envpool.make_gymnasium("Pong-v5", num_envs=2, seed=seed, **settings)
    with envs.make("atari_pong", 2) as env:
        rows, frames = env.reset(), pool.reset()[0]
        for action in [2, 3, 0]:
            action = np.full(2, action, np.int32)
            rows, frames = env.step(action), pool.step(action)[0]
        assert rows["image"].shape == (2, 64, 64, 3) and env.action_repeat == 4
        assert (rows["image"] == frames.transpose(0, 2, 3, 1)).all()
        assert env.render().shape == (2, 210, 160, 3)


def test_atari_protocols():
    options = {"size": (96, 96), "gray": True, "sticky": True, "actions": "all"}
    with envs.make("atari_breakout", 1, **options) as env:
        assert env.obs_space["image"].shape == (96, 96, 1) and env.act_space.classes == (18,)
    with envs.make("atari_breakout", 1, length=40) as env:
        env.reset()
        rows = [env.step(np.zeros(1, np.int32)) for _ in range(10)]
        assert rows[-1]["is_last"].all() and not rows[-1]["is_terminal"].any()


def test_dmc_pictures():
    if not adapter._can_render("WalkerWalk-v1"):
        with pytest.raises(envs.MissingPackageError, match="OpenGL"):
            envs.make("dmc_walker_walk", 1, image=True, proprio=False)
        pytest.skip("no OpenGL here")
    with envs.make("dmc_walker_walk", 1, image=True, proprio=False) as env:
        assert list(env.obs_space) == ["image"] and env.obs_space["image"].shape == (64, 64, 3)
        assert env.reset()["image"].std() > 5
        assert not check(env, 3).errors
    with pytest.raises(ValueError, match="got neither"):
        envs.make("dmc_walker_walk", 1, proprio=False)


def test_noop_max_of_zero_would_end_the_process():
    with pytest.raises(ValueError, match="noop_max of at least 1, got 0"):
        adapter.EnvpoolEnv("Pong-v5", 1, noop_max=0)
    with envs.make("atari_pong", 1, noops=0) as env:  # the task means "none" by it
        env.reset()


@pytest.mark.parametrize(
    ("action", "error"),
    [
        (np.zeros(3, np.int32), ValueError),
        (np.full(2, 99, np.int32), ValueError),
        (np.zeros((2, 1), np.int32), ValueError),
        (np.zeros(2, np.float32), TypeError),
    ],
)
def test_later_actions_are_checked_too(action, error):
    env = adapter.EnvpoolEnv("CartPole-v1", 2)
    env.reset()
    env.step(np.zeros(2, np.int32))
    with pytest.raises(error, match="envpool:CartPole-v1: expected"):
        env.step(action)


def test_seeds():
    def first(seed):
        return adapter.EnvpoolEnv("CartPole-v1", 4, seed).reset()["vector"]

    assert (first(7) == first(7)).all()
    assert len(np.unique(np.concatenate([first(7), first(8)]), axis=0)) == 8


def test_unknown_settings_are_named():
    with pytest.raises(envs.EnvOptionError, match="expected options that envpool knows.*frame_skp"):
        envs.make("envpool:Pong-v5", 1, frame_skp=2)


@pytest.mark.parametrize(
    ("task", "hint"),
    [
        ("envpool:CartPol-v1", "envpool:CartPole-v1"),
        ("atari_pnog", "atari_pong"),
        ("dmc_walker_wlak", "dmc_walker_walk"),
        ("minigrid_dorkey_8x8", "minigrid_door_key_8x8"),
    ],
)
def test_unknown_tasks_get_suggestions(task, hint):
    with pytest.raises(envs.UnknownTaskError, match=f"did you mean.*{hint}"):
        envs.make(task, 1)


@pytest.mark.parametrize("task", ["cartpole", "pendulum", "dmc_walker_walk", "atari_pong"])
def test_journal_restores_exactly(task):
    with envs.make(task, 2, seed=2) as env, envs.make(task, 2, seed=2) as fresh:
        env.reset()
        rng = np.random.default_rng(0)
        for _ in range(60):
            last = env.step(random_action(env, rng))
        rows = fresh.load_state_dict(env.state_dict())
        assert all(np.array_equal(rows[name], last[name]) for name in last)
        for _ in range(30):
            action = random_action(env, rng)
            a, b = env.step(action), fresh.step(action)
            assert all(np.array_equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------- registered tasks

REGISTERED = [
    "cartpole",
    "pendulum",
    "dummy",
    "dummy_image",
    "carracing",
    "takecover",
    "atari_pong",
    "dmc_walker_walk",
    "dmc_cartpole_swingup",
    "minigrid_doorkey_8x8",
    "envpool:Acrobot-v1",
    "gymnasium:CartPole-v1",
    "gymnasium:MountainCarContinuous-v0",
]


def test_every_name_is_covered():
    plain = {name for name in envs.task_names() if "<" not in name and ":" not in name}
    suites = {name for name in plain if name.startswith(("crafter_", "minecraft_"))}
    assert plain - suites <= set(REGISTERED)  # tests/test_suites.py has the others


@pytest.mark.parametrize("task", REGISTERED)
def test_registered_tasks(task):
    with envs.make(task, 2, seed=1) as env:
        report = check(env, 12)
    assert not report.errors, report


@pytest.mark.slow
@pytest.mark.parametrize("family", ["envpool.atari", "envpool.mujoco.dmc", "envpool.minigrid"])
def test_every_id_of_a_family(family):
    """Each envpool id is found by its snake_case name, and a third of them is played."""
    from fastwm.envs.builders import find, pool_ids, snake
    from fastwm.envs.suites import FAMILY

    prefix = {"envpool.atari": "atari", "envpool.minigrid": "minigrid"}.get(family, "dmc")
    suffix = {"atari": "-v5", "dmc": "-v1", "minigrid": "-v0"}[prefix]
    ids = pool_ids("test", family)
    assert prefix in FAMILY and len(ids) > 40
    for index, env_id in enumerate(ids):
        name = snake(env_id.removesuffix(suffix))
        name = f"MiniGrid-{name}" if env_id.startswith("MiniGrid") else name
        assert find("test", prefix, name, ids, suffix) == env_id
        if index % 3 == 0:
            with envs.make(f"envpool:{env_id}", 1, **needed(env_id)) as env:
                assert not check(env, 3).errors


def needed(env_id):
    if env_id.startswith("Lqr"):
        return {"bounds": (-1, 1)}  # it declares 1e10
    return {"ignore": "mission"} if env_id.startswith(("MiniGrid", "BabyAI")) else {}


# --------------------------------------------------------------------------- without the package


@pytest.fixture
def without_envpool(monkeypatch):
    from fastwm.envs import builders

    monkeypatch.setitem(sys.modules, "envpool", None)
    monkeypatch.setattr(builders, "_warned", set())


@pytest.mark.parametrize(
    ("task", "package"),
    [
        ("cartpole", "gymnasium"),
        ("atari_pong", "ale_py"),
        ("dmc_walker_walk", "dm_control"),
        ("minigrid_doorkey_8x8", "minigrid"),
    ],
)
def test_other_packages_stand_in(without_envpool, task, package):
    pytest.importorskip(package)
    with pytest.warns(UserWarning, match=r"pip install 'envpool") as caught:
        env = envs.make(task, 2)
    assert sum("envpool" in str(w.message) for w in caught) == 1
    with env:
        assert not check(env, 30).errors
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*envpool.*")
        stand_in = envs.make(task, 2)
    monkeypatched = sys.modules.pop("envpool")
    assert monkeypatched is None
    with stand_in, envs.make(task, 2) as env:
        assert stand_in.obs_space == env.obs_space and stand_in.act_space == env.act_space
        assert stand_in.action_repeat == env.action_repeat


def test_missing_package_names_the_pip_line(without_envpool):
    with pytest.raises(envs.MissingPackageError, match="pip install 'envpool>=1.2.5'"):
        envs.make("envpool:CartPole-v1", 1)


def test_pictures_that_cannot_be_made_are_none(monkeypatch):
    """MuJoCo without OpenGL ends the process, so it is tried in another one first."""
    monkeypatch.setattr(adapter, "_can_render", lambda env_id: False)
    env = adapter.EnvpoolEnv("WalkerWalk-v1", 1)
    env.reset()
    with pytest.warns(UserWarning, match="no pictures"):
        assert env.render() is None
    assert env.render() is None


@pytest.mark.parametrize(
    "env_id, num_envs, threads",
    [("CartPole-v1", 64, 1), ("CartPole-v1", 65, 0), ("FrozenLake-v1", 4, 1),
     ("Acrobot-v1", 4, 0), ("Ant-v5", 2, 0)],
)  # fmt: skip
def test_quick_environments_get_one_thread(env_id, num_envs, threads):
    made = adapter.EnvpoolEnv(env_id, num_envs)
    assert made._pool.config["num_threads"] == threads
    chosen = adapter.EnvpoolEnv(env_id, num_envs, num_threads=2)
    assert chosen._pool.config["num_threads"] == 2


def test_rows_do_not_depend_on_threads():
    one, two = (adapter.EnvpoolEnv("CartPole-v1", 9, seed=3, num_threads=n) for n in (1, 2))
    actions = np.random.default_rng(0).integers(0, 2, (60, 9)).astype(np.int32)
    ours, theirs = ([env.reset(), *map(env.step, actions)] for env in (one, two))
    for row, other in zip(ours, theirs, strict=True):
        assert all(np.array_equal(row[key], other[key]) for key in row)
