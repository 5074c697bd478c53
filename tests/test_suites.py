"""The named suites: rows of each, what is special about it, and a short training on it.

A suite whose package is not installed is skipped with its name.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastwm import config, envs, train
from fastwm.envs import minecraft
from fastwm.envs.registry import resolve

# task, package, observation shape, actions
SUITES = [
    ("crafter_reward", "crafter", (64, 64, 3), (17,)),
    ("mario_1-1", "gym_super_mario_bros", (64, 64, 3), (7,)),
    # seconds per world: MuJoCo compiles the maze and renders it in software
    pytest.param("memorymaze_9x9", "memory_maze", (64, 64, 3), (6,), marks=pytest.mark.slow),
    ("procgen_coinrun_easy", "envpool", (64, 64, 3), (15,)),
    ("metaworld_reach", "envpool", (39,), (4,)),
    ("vizdoom_basic", "envpool", (64, 64, 3), (6,)),
    ("atari100k_pong", "envpool", (64, 64, 3), (6,)),
]


def need(package: str) -> None:
    # some packages cannot be imported without gym: finding them is enough
    import importlib.util

    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def made(task: str, num_envs: int = 1, **options) -> envs.Journal:
    try:
        return envs.make(task, num_envs, **options)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def play(env, steps: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = [env.reset()]
    space = env.act_space
    for _ in range(steps):
        if space.kind == "discrete":
            action = rng.integers(0, space.classes[0], env.num_envs).astype(np.int32)
        else:
            action = rng.uniform(-1, 1, (env.num_envs, *space.shape)).astype(np.float32)
        rows.append(env.step(action))
    return rows


@pytest.mark.parametrize("task, package, shape, actions", SUITES)
def test_rows_and_a_short_training(task, package, shape, actions, tmp_path):
    need(package)
    env = made(task, **({"area": (9, 9)} if task.startswith("crafter") else {}))
    (space,) = env.obs_space.values()
    assert space.shape == shape
    assert (env.act_space.classes or env.act_space.shape) == actions
    (name,) = env.obs_space
    rows = play(env, 4)
    assert rows[0]["is_first"].all() and not rows[1]["is_first"].any()
    assert not np.array_equal(rows[0][name], rows[4][name])  # something moves
    if space.kind == "image":
        assert rows[0][name].std() > 1  # the first picture is no blank
        picture = env.render()
        assert picture is None or picture.dtype == np.uint8 and picture.shape[-1] == 3
    env.close()
    argv = "--env.options.area [9,9] " if task.startswith("crafter") else ""
    argv += f"dreamerv3 debug --task {task} --envs 1 --steps 28 --log.every 28 --eval.every 0 "
    argv += "--log.tensorboard false --log.every_s 0 --log.video_every 0 --batch_size 2 "
    argv += f"--checkpoint.every 0 --replay.save false --threads 1 --logdir {tmp_path / 'run'}"
    assert train.main(argv.split()) == 0
    assert '"train/loss/' in (tmp_path / "run" / "metrics.jsonl").read_text()


# ---- crafter


def test_crafter_repeats_with_its_seed_and_ends_by_truncation():
    need("crafter")
    # a small area: making a world of full size takes seconds
    first = play(made("crafter_reward", seed=3, time_limit=5, area=(9, 9)), 7)
    again = play(made("crafter_reward", seed=3, time_limit=5, area=(9, 9)), 7)
    other = play(made("crafter_reward", seed=4, time_limit=5, area=(9, 9)), 7)
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0]["image"], other[0]["image"])
    assert first[5]["is_last"].all() and not first[5]["is_terminal"].any()
    assert first[6]["is_first"].all()


def test_crafter_without_reward():
    need("crafter")
    rows = play(made("crafter_noreward", area=(9, 9)), 60)
    assert all(row["reward"] == 0 for row in rows)
    with pytest.raises(envs.EnvOptionError, match="'are'"):
        envs.make("crafter_noreward", 1, are=3)


# ---- mario


def walk(env, action: int, steps: int = 60) -> list[dict]:
    rows = [env.reset()]
    for _ in range(steps):
        rows.append(env.step(np.full(1, action, np.int32)))
        if rows[-1]["is_last"].any():
            break
    return rows


def test_mario_walks_right_for_reward_and_dies_at_the_first_enemy():
    need("gym_super_mario_bros")
    env = made("mario_1-1")
    assert env.action_repeat == 4
    rows = walk(env, 3)  # right + run
    assert rows[-1]["is_terminal"].all()
    # the way to the first enemy, minus the death; the clock costs a few tenths
    walked = sum(row["reward"] for row in rows) + 15.0
    assert 200 < walked < 400
    assert rows[-1]["reward"] < 0
    assert sum(row["reward"] for row in walk(env, 6, 10)) <= 0  # walking left earns nothing
    env.close()


def test_mario_rewards_the_flag():
    need("gym_super_mario_bros")
    from fastwm.envs.mario import MarioEnv

    class Game:
        """At the flag after three frames."""

        _x_position, _time, count = 40, 400, 0

        def reset(self):
            return np.zeros((240, 256, 3), np.uint8)

        def step(self, action):
            self.count += 1
            screen = np.full((240, 256, 3), self.count, np.uint8)
            x = {1: 43, 2: 41, 3: 300}[self.count]  # back, and a jump to another area
            done = self.count == 3
            return screen, 99.0, done, {"x_pos": x, "time": 399, "flag_get": done}

    env = MarioEnv(Game(), 4, 1000.0, 0.1, 15.0)
    env.reset()
    screen, reward, terminated, truncated, _ = env.step(1)
    assert reward == pytest.approx(1000.0 + 3.0 - 0.1)
    assert terminated and not truncated and (screen == 3).all()


@pytest.mark.parametrize("task", ["mario_9-1", "mario_1", "crafter_x", "memorymaze_8x8"])
def test_unknown_names_of_a_suite(task):
    with pytest.raises(envs.UnknownTaskError, match="expected"):
        envs.make(task, 1)


# ---- minecraft: a stand-in with the spaces of MineRL


class Inventory:
    spaces = dict.fromkeys(["dirt", "log", "planks"])


class FakeMineRL:
    class observation_space:
        spaces = {"inventory": Inventory, "pov": np.zeros((64, 64, 3))}

    class action_space:
        @staticmethod
        def no_op():
            return {"attack": 0, "jump": 0, "camera": np.zeros(2), "forward": 0}

    def __init__(self):
        self.actions, self.steps = [], 0

    def seed(self, seed):
        self.seeded = seed

    def reset(self):
        self.steps = 0
        return self.observation()

    def step(self, action):
        self.actions.append(action)
        self.steps += 1
        return self.observation(), 77.0, self.steps == 5, {}

    def observation(self):
        held = {"dirt": 3, "log": int(self.steps == 2 or self.steps == 4)}
        tool = {"mainhand": {"type": "stone_pickaxe" if self.steps == 3 else "air"}}
        image = np.full((64, 64, 3), self.steps, np.uint8)
        return {"pov": image, "inventory": held, "equipped_items": tool}


def test_minecraft_rewards_each_item_once():
    env = minecraft.MinecraftEnv(FakeMineRL(), length=100)
    obs, _ = env.reset(seed=5)
    assert env._env.seeded == 5 and obs["inventory_max"][1] == 0
    rewards, ends = [], []
    for _ in range(5):
        obs, reward, terminated, truncated, _ = env.step(0)
        rewards.append(reward)
        ends.append((terminated, truncated))
    assert rewards == [0, 1, 0, 0, 0]  # the first log; dirt is worth nothing
    assert ends[-1] == (True, False) and ends[0] == (False, False)
    assert obs["inventory_max"][1] == pytest.approx(np.log(2)) and obs["inventory"][1] == 0


def test_minecraft_keys_stay_down():
    env = minecraft.MinecraftEnv(FakeMineRL(), length=4)
    env.reset()
    env.step(1)
    for _ in range(2):
        env.step(2)
    last = env.step(0)
    attacks = [action["attack"] for action in env._env.actions]
    assert attacks == [1, 1, 1, 1] and env._env.actions[1]["camera"][0] == -15.0
    assert last[2:4] == (False, True)  # cut off by the length
    assert len(minecraft.ACTIONS) == 25 and len(minecraft.MILESTONES) == 12


def test_minecraft_says_what_it_needs():
    import importlib.util

    if importlib.util.find_spec("minerl"):
        pytest.skip("minerl is installed")
    with pytest.raises(envs.MissingPackageError, match="minerl==0.4.4"):
        envs.make("minecraft_diamond", 1)


# ---- what all share


@pytest.mark.parametrize("task", ["envpool:CartPole-v1", "gymnasium:CartPole-v1"])
def test_a_time_limit_cuts_off(task):
    rows = play(made(task, time_limit=4), 5)
    assert [bool(row["is_last"][0]) for row in rows] == [False] * 4 + [True, False]
    assert not rows[4]["is_terminal"].any() and rows[5]["is_first"].all()


def test_a_time_limit_counts_frames():
    rows = play(made("gymnasium:CartPole-v1", time_limit=6, action_repeat=2), 4)
    assert [bool(row["is_last"][0]) for row in rows] == [False, False, False, True, False]
    with pytest.raises(envs.EnvOptionError, match="time_limit"):
        envs.make("gymnasium:CartPole-v1", 1, time_limit=0)


def test_gym_is_not_left_behind():
    """The stand-in for gym is gone after an import, and nothing is registered in gymnasium."""
    need("gym_super_mario_bros")
    code = (
        "import sys, gymnasium; before = set(gymnasium.registry)\n"
        "from fastwm import envs; envs.make('mario_1-1', 1)\n"
        "left = [m for m in sys.modules if m == 'gym' or m.startswith('gym.')]\n"
        "sys.exit(f'{left}' if left or set(gymnasium.registry) != before else 0)"
    )
    here = {**os.environ, "PYTHONPATH": str(Path(config.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("preset", config.preset_names())
def test_the_task_of_every_preset_is_known(preset):
    path = str(config.find_preset(preset))  # a file names its own algorithm
    assert callable(resolve(config.load([path])[0].task))
