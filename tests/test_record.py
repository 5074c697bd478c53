"""What an evaluation shows: the recorded batch is what the replay would have sampled."""

import numpy as np
import torch

from fastwm import assemble, config
from fastwm.agents.video import open_loop_video, strip
from fastwm.envs.dummy import DummyEnv, DummyImageEnv
from fastwm.loops.evaluate import evaluate
from fastwm.loops.record import Recorder, videos
from fastwm.replay import Replay


class Counter:
    """Acts by counting, so that every row knows its action; latents say the row's number."""

    device = torch.device("cpu")

    def __init__(self):
        self.calls = 0

    def initial_state(self, num_envs):
        return None

    def act(self, rows, state, mode, generator):
        self.calls += 1
        count = len(rows["reward"])
        action = np.full(count, self.calls % 2, np.int32)
        return action, None, {"deter": torch.full((count, 2), float(self.calls)).bfloat16()}


def recorded(env_class, length, **options):
    agent, recorder = Counter(), Recorder(length)
    evaluate(
        agent, env_class, episodes=4, envs=2, mode="greedy", seed=0, record=recorder, **options
    )
    return recorder


def test_the_batch_is_what_the_replay_would_have_given():
    recorder = recorded(DummyEnv, 6)
    batch = recorder.batch()
    env, agent = DummyEnv(2, 0), Counter()
    spec = {name: ((), "bool") for name in ("is_first", "is_last", "is_terminal")}
    spec |= {"action": ((), "int32"), "reward": ((), "float32"), "vector": ((3,), "float32")}
    spec |= {"deter": ((2,), "bfloat16")}
    replay = Replay(spec, 2, 14, 6)
    rows = env.reset()
    for _ in range(7):
        action, _, latents = agent.act(rows, None, "greedy", None)
        stored = np.where(rows["is_last"], 0, action).astype(np.int32)
        replay.add({**rows, "action": stored, **latents})
        rows = env.step(action)
    want = replay.sample(2)
    order = torch.argsort(want["ids"][:, 0])
    assert set(batch) == set(want) - {"ids"}
    for name, value in batch.items():
        assert value.dtype == want[name].dtype
        assert torch.equal(value, want[name][order]), name


def test_too_short_an_evaluation_has_no_batch():
    def short(num_envs, seed):
        return DummyEnv(num_envs, seed, lengths=(1,) * num_envs)

    agent, recorder = Counter(), Recorder(20)
    evaluate(agent, short, episodes=2, envs=2, mode="greedy", seed=0, record=recorder)
    assert recorder.batch() is None and recorder.pictures() is None
    assert videos(agent, None) == {}


def test_the_film_is_the_first_episode_alone():
    def images(num_envs, seed):
        return DummyImageEnv(num_envs, seed, size=16, length=5)

    film = recorded(images, 3).pictures()
    assert film.shape == (6, 16, 16, 3) and film.dtype == np.uint8  # five decisions, six rows


def test_a_run_films_its_evaluations(tmp_path):
    argv = "dreamerv3 debug --task dummy_image --steps 64 --log.every_s 0 --log.tensorboard false "
    argv += "--eval.every 64 --eval.episodes 2 --checkpoint.every 0 --log.histogram_every 32"
    run = assemble.online_run(config.load(argv.split())[0], tmp_path)
    from fastwm.loops import online

    assert online.train(run) == 0
    names = {path.name for path in (tmp_path / "videos").iterdir()}
    assert names >= {
        "eval_openl_image-000000064.gif",
        "eval_openl_image-000000064.png",
        "eval_policy-000000064.gif",
    }


def test_a_strip_shows_time_from_left_to_right():
    truth = torch.zeros(3, 5, 4, 6, 3, dtype=torch.uint8)
    truth[:] = torch.arange(5)[:, None, None, None] * 40
    frames = open_loop_video(truth, truth.float() / 255, context=2)
    picture = strip(frames, 6, rows=2, columns=3)
    one = (3 * 4 + 4, 6 + 4)
    assert picture.shape == (2 * one[0], 3 * one[1], 3)
    inside = picture[2:6, [5, 15, 25]]  # truth of the first sequence at the moments 0, 2, 4
    assert (inside == np.array([0, 80, 160])[None, :, None]).all()
    assert np.array_equal(picture[: one[0]], picture[one[0] :])  # equal sequences, equal rows
    assert strip(frames, 6, rows=9, columns=99).shape == (3 * one[0], 5 * one[1], 3)
