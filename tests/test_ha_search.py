"""The population in one batch, and the search over it."""

import pickle

import numpy as np
import pytest
import torch

from fastwm.envs.lanes import make_lanes
from fastwm.loops.ha_search import Search
from fastwm.loops.ha_world import RealWorld, play
from fastwm.worldmodels.ha import MDNRNN, ConvVAE
from fastwm.worldmodels.ha_controller import ActionCode, Controller


class Counting:
    """A world whose lane i ends after lengths[i] steps, and that pays what the controller says.

    It refuses lanes that have ended, and remembers how many lanes each step had.
    """

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.lanes = torch.tensor(lengths), len(lengths)
        self.count, self.sizes = torch.zeros(self.lanes, dtype=torch.int64), []

    def reset(self):
        return torch.ones(self.lanes, 1)

    def start(self, raw, lanes):
        assert (self.count[lanes] < self.lengths[lanes]).all(), "an ended lane was stepped"
        self.count[lanes] += 1
        self.sizes.append(len(lanes))
        done = self.count[lanes] == self.lengths[lanes]
        return lambda: (torch.ones(len(lanes), 1), raw[:, 0], done)


def test_ended_lanes_leave_the_batch_and_their_returns_freeze():
    controller = Controller(1, 0, 1, "z", bias=False)
    world = Counting([1, 4, 2, 9])
    params = torch.tensor([[1.0], [2.0]])
    returns, lengths = play([world], controller, params, limit=6)
    assert lengths.tolist() == [[1, 4], [2, 6]]
    assert returns.tolist() == [[1, 4], [4, 12]]
    assert world.sizes == [4, 3, 2, 2, 1, 1]


def test_patience_ends_lanes_without_reward():
    controller = Controller(1, 0, 1, "z", bias=False)
    params = torch.tensor([[1.0], [-1.0]])
    _, lengths = play([Counting([9, 9])], controller, params, limit=9, patience=3)
    assert lengths.tolist() == [[9], [3]]
    _, lengths = play([Counting([9, 9])], controller, params, limit=9)
    assert lengths.tolist() == [[9], [9]]


def test_two_worlds_in_turns_equal_one():
    controller = Controller(1, 0, 1, "z", bias=False)
    params, lengths = torch.randn(3, 1), [3, 1, 4, 1, 5, 9]
    one = play([Counting(lengths)], controller, params, limit=7)
    two = play([Counting(lengths[:4]), Counting(lengths[4:])], controller, params, limit=7)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    with pytest.raises(ValueError, match="expected worlds with a multiple of 3 lanes"):
        play([Counting(lengths[:5])], controller, params, limit=7)


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    vae, rnn = ConvVAE(4).eval(), MDNRNN(4, 3, 8).eval()
    return vae, rnn, Controller(4, 8, 3), ActionCode.of("car")


def car_world(nets, seeds, candidates, **more) -> RealWorld:
    lanes = make_lanes("carracing", seeds * candidates, size=(96, 96))
    assert lanes.common
    return RealWorld(lanes, *nets, rows=84, samples=len(seeds), **more)


@pytest.mark.parametrize("noise", [None, 5])
def test_common_random_numbers(nets, noise):
    """Permuting the candidates permutes their returns: all of them meet the same episodes."""
    pytest.importorskip("envpool")
    params = torch.randn(4, nets[2].size)
    order = torch.tensor([2, 0, 3, 1])
    found = []
    for picked in (params, params[order]):
        world = car_world(nets, [3, 8], 4, noise=noise)
        found.append(play([world], nets[2], picked, limit=60)[0])
        world.close()
    assert torch.equal(found[1], found[0][order])
    assert len(found[0].unique()) > 2  # and they are not all alike


def test_one_pass_of_every_network_per_step_whatever_the_population(nets, monkeypatch):
    """No copies of the networks, no workers: memory does not grow with the population."""
    pytest.importorskip("envpool")
    vae, rnn = nets[:2]
    calls = {"encode": [], "step": []}
    for model, name in ((vae, "encode"), (rnn, "step")):
        plain = getattr(model, name)
        monkeypatch.setattr(
            model, name, lambda x, *a, f=plain, n=name: (calls[n].append(len(x)), f(x, *a))[1]
        )
    world = car_world(nets, [1], 6)
    play([world], nets[2], torch.zeros(6, nets[2].size), limit=3)
    world.close()
    assert calls == {"encode": [6] * 4, "step": [6] * 3}


def test_memory_advances_through_play(nets):
    """The hidden state of every step goes into the next one, and starts at zero."""
    pytest.importorskip("envpool")
    vae, rnn, controller, code = nets
    world = car_world(nets, [1], 1)
    features = [world.reset().clone()]
    z = world.z.clone()
    h = c = torch.zeros(1, 8)
    assert (features[0][:, 4:] == 0).all()
    for _ in range(3):
        raw = torch.full((1, 3), 0.3)
        h, (h, c) = rnn.step(rnn.features(z, code.code(raw), torch.zeros(1)), (h, c))
        features.append(world.start(raw, torch.arange(1))()[0])
        torch.testing.assert_close(features[-1][:, 4:], h)
        z = world.z.clone()
    world.close()
    assert not torch.equal(features[2], features[3])


# ------------------------------------------------------------------------------------- the search


def bandit(params: np.ndarray) -> np.ndarray:
    """Highest, 0, where every parameter is 1."""
    return -np.square(params - 1.0).sum(1)


def test_the_search_climbs():
    search = Search(5, 16, 0.3, seed=0)
    before = bandit(search.mean[None])[0]
    for _ in range(30):
        search.tell(bandit(search.ask()))
    assert bandit(search.mean[None])[0] > before / 50


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_restored_search_goes_on_exactly(diagonal):
    np.random.seed(7)
    ambient = np.random.get_state()[1].copy()
    search = Search(6, 8, 0.5, seed=3, diagonal=diagonal)
    for _ in range(3):
        search.tell(bandit(search.ask()))
    other = Search.restore(search.state())
    for _ in range(4):
        one, two = search.ask(), other.ask()
        assert np.array_equal(one, two)
        search.tell(bandit(one))
        other.tell(bandit(two))
    assert np.array_equal(search.mean, other.mean) and search.sigma == other.sigma
    assert np.array_equal(np.random.get_state()[1], ambient)  # it draws from nowhere else


def test_a_forged_search_is_not_executed(tmp_path):
    class Forged:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    state = np.frombuffer(pickle.dumps(Forged()), np.uint8)
    with pytest.raises(ValueError, match="expected a stored search .* it names"):
        Search.restore(state)
    assert not (tmp_path / "made").exists()


def test_returns_must_be_finite():
    search = Search(2, 4, 0.1, seed=0)
    search.ask()
    with pytest.raises(ValueError, match="expected finite returns, got nan"):
        search.tell(np.array([1.0, np.nan, 0.0, 2.0]))
