"""Spaces: what every gymnasium space becomes, what is refused, and generated ones."""

from __future__ import annotations

import numpy as np
import pytest

from fastwm import envs
from fastwm.envs.check import check, random_action
from fastwm.envs.convert import ActMap, ObsMap, ObsOptions, leaves, pick, resize, to_gray
from fastwm.envs.gymnasium import GymEnv
from fastwm.spaces import Space

gymnasium = pytest.importorskip("gymnasium")
hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

from gymnasium.spaces import (  # noqa: E402
    Box,
    Dict,
    Discrete,
    MultiBinary,
    MultiDiscrete,
    Text,
    Tuple,
)

RNG = np.random.default_rng(0)


# ------------------------------------------------------------------------------------ observations


@pytest.mark.parametrize(
    ("shape", "options", "result"),
    [
        ((64, 48, 3), {}, (64, 48, 3)),
        ((3, 64, 48), {}, (64, 48, 3)),
        ((4, 84, 84), {}, (84, 84, 4)),
        ((64, 48), {}, (64, 48, 1)),
        ((2, 64, 48, 3), {}, (64, 48, 6)),
        ((64, 48, 20), {"image_layout": "hwc"}, (64, 48, 20)),
        ((20, 64, 48), {"image_layout": "chw"}, (64, 48, 20)),
        ((3, 64, 48), {"gray": True}, (64, 48, 1)),
        ((96, 96, 3), {"size": (64, 32)}, (64, 32, 3)),
        ((3, 96, 96), {"size": 64, "gray": True}, (64, 64, 1)),
    ],
)
def test_images_become_hwc(shape, options, result):
    convert = ObsMap("task", Box(0, 255, shape, np.uint8), ObsOptions(**options))
    assert convert.space == {"image": Space("image", result)}
    out = convert.batch(RNG.integers(0, 256, (5, *shape), dtype=np.uint8))["image"]
    assert out.shape == (5, *result) and out.dtype == np.uint8 and out.flags.c_contiguous


def test_image_values_move_with_their_axes():
    x = RNG.integers(0, 256, (2, 3, 16, 20), dtype=np.uint8)
    out = ObsMap("task", Box(0, 255, (3, 16, 20), np.uint8), ObsOptions()).batch(x)["image"]
    assert all((out[:, :, :, c] == x[:, c]).all() for c in range(3))
    stack = RNG.integers(0, 256, (2, 2, 16, 20, 3), dtype=np.uint8)
    out = ObsMap("task", Box(0, 255, (2, 16, 20, 3), np.uint8), ObsOptions()).batch(stack)["image"]
    assert (out[..., :3] == stack[:, 0]).all() and (out[..., 3:] == stack[:, 1]).all()


@pytest.mark.parametrize(("shape", "layout"), [((64, 64, 64), "auto"), ((96, 96, 3), "chw")])
def test_image_of_the_wrong_layout(shape, layout):
    with pytest.raises(envs.EnvSpaceError, match=r"expected an image of .*got (shape )?\("):
        ObsMap("task", Box(0, 255, shape, np.uint8), ObsOptions(image_layout=layout))


def test_small_grids_are_vectors():
    space = ObsMap("task", Box(0, 255, (7, 7, 3), np.uint8), ObsOptions(size=(64, 64))).space
    assert space == {"vector": Space("vector", (7, 7, 3))}


def test_resize_is_pillow_bilinear():
    image = pytest.importorskip("PIL.Image")
    x = RNG.integers(0, 256, (3, 96, 90, 3), dtype=np.uint8)
    wanted = [image.fromarray(y).resize((40, 64), image.Resampling.BILINEAR) for y in x]
    difference = resize(x, (64, 40)).astype(int) - np.stack([np.asarray(y) for y in wanted])
    assert abs(difference).max() <= 1


def test_gray_is_luminance():
    x = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    assert to_gray(x.reshape(1, 1, 5, 3)).reshape(-1).tolist() == [255, 0, 77, 149, 29]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64, np.bool_])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4)])
def test_boxes_become_float32_vectors(dtype, shape):
    convert = ObsMap("task", Box(0, 1, shape, dtype), ObsOptions())
    assert convert.space == {"vector": Space("vector", shape or (1,))}
    x = np.ones((5, *shape), dtype)
    out = convert.batch(x)["vector"]
    assert out.shape == (5, *(shape or (1,))) and out.dtype == np.float32
    assert not np.shares_memory(out, x) and (out == 1).all()


def test_discrete_observations_count_from_zero():
    convert = ObsMap("task", Discrete(3, start=5), ObsOptions())
    assert convert.space == {"vector": Space("discrete", (), (3,))}
    out = convert.batch(np.array([5, 7]))["vector"]
    assert out.tolist() == [0, 2] and out.dtype == np.int32
    convert = ObsMap("task", MultiDiscrete([[2, 3]], start=[[0, 1]]), ObsOptions())
    assert convert.space == {"vector": Space("discrete", (1, 2), (2, 3))}
    out = convert.batch(np.array([[[1, 1]], [[0, 3]]]))["vector"]
    assert out.tolist() == [[[1, 0]], [[0, 2]]]
    convert = ObsMap("task", MultiBinary((2, 2)), ObsOptions())
    assert convert.space == {"vector": Space("vector", (2, 2))}


def test_nested_names_and_ignored_ones():
    inner = Dict(a=Box(0, 255, (32, 32, 3), np.uint8), b=Discrete(2))
    space = Dict(cam=inner, pair=Tuple([Box(-1, 1, (2,)), MultiBinary(3)]), mission=Text(5))
    convert = ObsMap("task", space, ObsOptions(ignore=("mission", "cam.b")))
    assert list(convert.space) == ["cam.a", "pair.0", "pair.1"]
    assert convert.space["cam.a"].kind == "image"
    samples = [space.sample() for _ in range(3)]
    assert convert.stack(samples)["pair.0"].tolist() == [s["pair"][0].tolist() for s in samples]


def test_names_of_the_replay_are_not_taken():
    names = ["reward", "is_first", "is_happy", "action", "reward_sum", "x"]
    space = Dict({name: Box(-1, 1, (1,)) for name in names})
    wanted = {f"obs_{name}" for name in names[:-1]} | {"x"}
    assert set(ObsMap("task", space, ObsOptions()).space) == wanted


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        (Dict(x=Discrete(2), text=Text(3)), {}, "'text': expected Box.*got Text.*`ignore`"),
        (Discrete(5000), {}, "at most 4096 classes.*got 5000"),
        (Dict(x=Discrete(2)), {"ignore": ("y",)}, r"got \['y'\]; there are \['x'\]"),
        (Dict(x=Discrete(2)), {"ignore": "x"}, "at least one observation"),
        (Box(0, 1, (0,)), {}, r"non-empty Box, got shape \(0,\)"),
    ],
)
def test_observations_that_are_refused(space, options, message):
    with pytest.raises(envs.EnvSpaceError, match=message):
        ObsMap("task", space, ObsOptions(**options))


# ----------------------------------------------------------------------------------------- actions


def test_boxes_are_scaled_and_clipped():
    space = Box(np.array([-2, 0, -1], np.float32), np.array([2, 1, 1], np.float32))
    convert = ActMap("task", space, 4)
    assert convert.space == Space("continuous", (3,))
    action = np.array([[-1] * 3, [0] * 3, [1] * 3, [9, -9, 0.5]], np.float32)
    out = convert.batch(action)
    assert out.tolist() == [[-2, 0, -1], [0, 0.5, 0], [2, 1, 1], [2, 0, 0.5]]
    assert out.dtype == np.float32 and action[3, 0] == 9  # the caller's array is left alone


def test_discrete_actions_keep_their_start_and_dtype():
    assert ActMap("task", Discrete(3, start=-1), 3).space == Space("discrete", (), (3,))
    out = ActMap("task", Discrete(3, start=-1), 3).batch(np.arange(3, dtype=np.int32))
    assert out.tolist() == [-1, 0, 1] and out.dtype == np.int64
    convert = ActMap("task", MultiDiscrete([[3, 5], [2, 2]]), 1)
    assert convert.space == Space("discrete", (2, 2), (3, 5, 2, 2))
    assert ActMap("task", MultiBinary(4), 1).space == Space("discrete", (4,), (2, 2, 2, 2))


def test_nested_actions():
    space = Dict(a=Discrete(3, start=1), b=Tuple([MultiBinary(2), MultiDiscrete([4, 2])]))
    convert = ActMap("task", space, 2)
    assert convert.space == Space("discrete", (5,), (3, 2, 2, 4, 2))
    out = convert.batch(np.array([[0, 1, 0, 3, 1], [2, 0, 1, 0, 0]], np.int32))
    assert all(pick(out, i) in space for i in range(2))
    assert pick(out, 0)["a"] == 1 and pick(out, 0)["b"][1].tolist() == [3, 1]
    space = Tuple([Box(0, 4, (2, 1)), Box(-1, 1, (), np.float64)])
    convert = ActMap("task", space, 1)
    assert convert.space == Space("continuous", (3,))
    out = pick(convert.batch(np.array([[-1, 1, 0.5]], np.float32)), 0)
    assert out[0].tolist() == [[0], [4]] and out[1] == 0.5


ABSURD = [
    Box(-np.inf, np.inf, (2,)),
    Box(2.2e-308, 1.8e308, (2,), np.float64),
    Box(1.2e-38, 1.0, (2,)),
    Box(-1e7, 1e7, (2,)),
]


@pytest.mark.parametrize("space", ABSURD, ids=str)
def test_bounds_that_mean_nothing(space):
    with pytest.raises(envs.EnvSpaceError, match=r"'steer'.*Box.*bounds=\(low, high\)"):
        ActMap("task", Dict(steer=space), 1)
    convert = ActMap("task", space, 1, bounds=(-3, [1, 3]))
    assert convert.batch(np.ones((1, 2), np.float32)).tolist() == [[1, 3]]


@pytest.mark.parametrize(
    ("space", "bounds", "message"),
    [
        (Dict(a=Box(-1, 1, (1,)), b=Discrete(2)), None, r"continuous \['a'\].*\['a', 'b'\]"),
        (Box(1, 1, (2,)), None, "expected low < high"),
        (Box(-1, 1, (2,)), (0, [1, 2, 3]), r"1 or 2 numbers each, got \(0, \[1, 2, 3\]\)"),
        (Discrete(2), (0, 1), "`bounds` for continuous"),
        (Text(3), None, "to be Box, Discrete.*got Text"),
        (Dict(), None, "at least one action"),
    ],
)
def test_actions_that_are_refused(space, bounds, message):
    with pytest.raises(envs.EnvSpaceError, match=message):
        ActMap("task", space, 1, bounds)


# --------------------------------------------------------------------------------- generated spaces

shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)
counts = st.integers(1, 5)
starts = st.integers(-3, 3)
boxes = st.builds(
    lambda shape, low, width, dtype: Box(low, low + width, shape, dtype),
    shapes,
    st.integers(-5, 5),
    st.integers(1, 9),
    st.sampled_from([np.float32, np.float64, np.int32]),
)
pictures = st.builds(
    lambda shape: Box(0, 255, shape, np.uint8),
    st.sampled_from([(16, 20, 3), (3, 16, 20), (17, 16), (2, 16, 16, 3), (5,), (7, 7, 3)]),
)
choices = st.one_of(
    st.builds(lambda n, start: Discrete(n, start=start), counts, starts),
    st.builds(MultiDiscrete, st.lists(counts, min_size=1, max_size=3)),
    st.builds(MultiBinary, st.lists(st.integers(1, 3), min_size=1, max_size=2)),
)


def nested(leaf):
    return st.recursive(
        leaf,
        lambda child: st.one_of(
            st.lists(child, min_size=1, max_size=3).map(Tuple),
            st.dictionaries(st.sampled_from("abc"), child, min_size=1).map(Dict),
        ),
        max_leaves=4,
    )


class Generated(gymnasium.Env):
    """Samples its observations and refuses actions outside its space."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        self.observation_space.seed(seed)
        self.count = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert action in self.action_space, (action, self.action_space)
        self.count += 1
        return self.observation_space.sample(), float(self.count), False, self.count == 3, {}


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    nested(st.one_of(boxes, pictures, choices)), st.one_of(nested(boxes), nested(choices))
)
def test_generated_spaces(observation_space, action_space):
    """Loop and vector adapters agree, hold the contract, and send legal actions only."""

    def factory():
        return Generated(observation_space, action_space)

    env = envs.Journal(lambda: GymEnv(factory, 2))
    report = check(env, 8)
    assert not report.errors and env.crashes == 0
    assert len(env.obs_space) == len(list(leaves(observation_space)))
    for name in env.obs_space:
        assert not name.startswith(("is_", "reward"))
    vector = envs.gymnasium.GymVectorEnv(gymnasium.vector.SyncVectorEnv([factory] * 2))
    assert vector.obs_space == env.obs_space and vector.act_space == env.act_space
    single, rng = GymEnv(factory, 2), np.random.default_rng(0)
    rows, others = single.reset(), vector.reset()
    for _ in range(5):
        for name in rows:
            assert rows[name].dtype == others[name].dtype
            assert rows[name].shape == others[name].shape
        action = random_action(single, rng)
        rows, others = single.step(action), vector.step(action)
