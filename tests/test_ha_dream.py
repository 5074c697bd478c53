"""The dream: temperature, ends, noise, and what a search in it does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastwm.episodes import EpisodeStore, Windows
from fastwm.loops.ha_search import Search
from fastwm.loops.ha_world import play
from fastwm.worldmodels.ha import MDNRNN, Mixture, sample_next
from fastwm.worldmodels.ha_controller import ActionCode, Controller
from fastwm.worldmodels.ha_dream import DreamWorld, Noise

Z, R, M = 3, 8, 4
CODE = ActionCode.of("thirds")


def model(layout="factored", seed=0, done=True, restart=True):
    torch.manual_seed(seed)
    return MDNRNN(Z, 1, R, M, layout, done=done, restart=restart)


def world(lanes=4, rnn=None, seeds=None, inputs="zch", **options):
    rnn = rnn or model()
    controller = Controller(Z, rnn.hidden, 1, inputs, bias=False)
    starts = torch.randn(5, Z), torch.zeros(5, Z)
    return DreamWorld(
        rnn, controller, CODE, starts, list(range(lanes)) if seeds is None else seeds, **options
    )


def alive(rnn, logit=-10.0):
    """M that gives this done logit whatever it sees."""
    with torch.no_grad():
        rnn.head.weight[-1] = 0
        rnn.head.bias[-1] = logit
    return rnn


def run(dream, raw, steps):
    """Features of every step for constant controller outputs."""
    lanes = torch.arange(dream.lanes)
    found = [dream.reset().clone()]
    for _ in range(steps):
        found.append(dream.start(raw.expand(dream.lanes, 1), lanes)()[0])
    return torch.stack(found)


@pytest.mark.parametrize("layout", ["factored", "joint"])
def test_zero_temperature_is_the_most_likely_mean(layout):
    rnn = alive(model(layout))
    dream = world(2, rnn, temperature=0.0)
    dream.reset()
    z, state = dream.z.clone(), dream.state
    raw = torch.tensor([[0.3], [-2.0]])
    dream.start(raw, torch.arange(2))()
    x = torch.cat([z, torch.tanh(raw), torch.ones(2, 1)], -1)
    with torch.no_grad():
        h, _ = rnn.step(x, state)
        said = rnn.predict(h)
    for lane in range(2):
        if layout == "joint":
            wanted = said.mean[lane, int(said.logits[lane].argmax())]
        else:
            best = said.logits[lane].argmax(-1)
            wanted = torch.stack([said.mean[lane, d, best[d]] for d in range(Z)])
        assert torch.allclose(dream.z[lane], wanted, atol=1e-6)


def test_temperature_scales_the_variance():
    """One component: the standard deviation is exp(log_std) sqrt(temperature)."""
    count = 40_000
    generator = torch.Generator().manual_seed(0)
    one = Mixture(
        torch.full((count, 1, 1), 2.0),
        torch.full((count, 1, 1), math.log(0.5)),
        torch.zeros(count, 1, 1),
    )
    pick = torch.rand(count, 1, generator=generator)
    noise = torch.randn(count, 1, generator=generator)
    for temperature in (0.25, 1.0, 2.0):
        drawn = sample_next(one, "factored", pick, noise, temperature)
        assert drawn.mean().item() == pytest.approx(2.0, abs=0.02)
        assert drawn.var().item() == pytest.approx(0.25 * temperature, rel=0.03)


def test_temperature_flattens_the_choice():
    """Frequencies of the components are softmax(logits / temperature)."""
    count, logits = 40_000, torch.tensor([2.0, 0.0, -1.0])
    pick = torch.rand(count, 1, generator=torch.Generator().manual_seed(0))
    mixture = Mixture(
        torch.tensor([0.0, 1.0, 2.0]).expand(count, 1, 3),
        torch.full((count, 1, 3), -20.0),
        logits.expand(count, 1, 3),
    )
    for temperature in (0.5, 1.0, 1.3, 4.0):
        drawn = sample_next(mixture, "factored", pick, torch.zeros(count, 1), temperature)
        found = torch.bincount(drawn.round().long().flatten(), minlength=3) / count
        assert torch.allclose(found, torch.softmax(logits / temperature, -1), atol=0.01)


def test_the_dream_ends_above_one_half():
    for logit, ends in ((-0.01, False), (0.01, True)):
        dream = world(3, alive(model(), logit))
        dream.reset()
        _, reward, done = dream.step(torch.zeros(3, 1), torch.arange(3))
        assert (done == ends).all() and (reward == 1).all()


def test_the_time_limit_ends_it():
    dream = world(2, alive(model()), max_steps=3)
    dream.reset()
    ends = [dream.step(torch.zeros(2, 1), torch.arange(2))[2].tolist() for _ in range(3)]
    assert ends == [[False] * 2, [False] * 2, [True] * 2]


def test_without_a_done_head_the_limit_ends_it_and_a_reward_head_pays():
    rnn = MDNRNN(Z, 1, R, M, reward=True)
    with torch.no_grad():
        rnn.head.weight[-1], rnn.head.bias[-1] = 0, -2.5
    dream = world(2, rnn, max_steps=2)
    dream.reset()
    for over in (False, True):
        _, reward, done = dream.step(torch.zeros(2, 1), torch.arange(2))
        assert reward.tolist() == [-2.5, -2.5] and done.tolist() == [over, over]


def test_restart_is_seen_at_the_first_step_only():
    """The flag's weights are the only thing that changes M: with them at zero it has no effect."""
    rnn = alive(model())
    seen = []
    step = rnn.step
    rnn.step = lambda x, state: (seen.append(x[:, -1].clone()), step(x, state))[1]
    run(world(2, rnn), torch.zeros(1), 3)
    assert [flags.tolist() for flags in seen] == [[1, 1], [0, 0], [0, 0]]


def test_lanes_that_ended_change_nothing_for_the_others():
    whole, part = world(4), world(4)
    a, b = whole.reset(), part.reset()
    assert torch.equal(a, b)
    every, left = torch.arange(4), torch.tensor([1, 3])
    for t in range(6):
        raw = torch.linspace(-1, 1, 4)[:, None] * t
        a = whole.step(raw, every)[0]
        b = part.step(raw[left] if t >= 2 else raw, left if t >= 2 else every)[0]
        if t >= 2:
            assert torch.allclose(a[left], b, atol=1e-6)
    with pytest.raises(ValueError, match="a lane that was left out has ended"):
        part.step(torch.zeros(2, 1), torch.tensor([0, 1]))


def test_equal_seeds_dream_the_same():
    """Common random numbers: also beside other lanes, and again after a reset."""
    rnn = alive(model())
    torch.manual_seed(1)
    many = world(5, rnn, seeds=[7, 8, 7, 9, 8])
    raw = torch.zeros(1)
    found = run(many, raw, 70)  # beyond one chunk of noise
    assert torch.equal(found[:, 0], found[:, 2]) and torch.equal(found[:, 1], found[:, 4])
    assert not torch.allclose(found[-1, 0], found[-1, 1])
    assert torch.equal(run(many, raw, 70), found)
    alone = world(1, rnn, seeds=[9])
    alone.mu, alone.logvar = many.mu, many.logvar
    assert torch.allclose(run(alone, raw, 70)[:, 0], found[:, 3], atol=1e-5)


def test_noise_is_uniform_and_normal():
    noise = Noise(range(50), 40)
    drawn = [noise.step(torch.arange(50)) for _ in range(20)]
    uniform, normal = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    assert 0 <= uniform.min() and uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert normal.mean().item() == pytest.approx(0, abs=0.02)
    assert normal.std().item() == pytest.approx(1, abs=0.02)
    flat = normal.flatten(1)
    assert abs(np.corrcoef(flat[0], flat[1])[0, 1]) < 0.1


def test_starts_are_those_given():
    dream = world(200, alive(model()))
    dream.mu, dream.logvar = torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.full((2, Z), -40.0)
    dream.reset()
    rows = {tuple(row) for row in dream.z.round().tolist()}
    assert rows == {(1, 2, 3), (4, 5, 6)}
    assert torch.equal(dream.state[0], torch.zeros(200, R))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": []}, "expected a seed for each lane, got none"),
        ({"temperature": -1.0}, "expected a temperature >= 0"),
        ({"max_steps": 0}, "max_steps >= 1"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        world(4, **change)


def test_starts_of_another_latent_size():
    starts = torch.zeros(5, Z + 1), torch.zeros(5, Z + 1)
    with pytest.raises(ValueError, match=r"expected mu and logvar of shape \(E, Z\) = \(E, 3\)"):
        DreamWorld(model(), Controller(Z, R, 1), CODE, starts, [0])
    with pytest.raises(RuntimeError, match=r"expected reset\(\) before the first step"):
        world(1).step(torch.zeros(1, 1), torch.arange(1))


def lucky(hidden=4):
    """M that ends the dream at once unless the action's sign is that of the first latent."""
    rnn = MDNRNN(1, 1, hidden, 1, done=True)
    with torch.no_grad():
        for part in rnn.parameters():
            part.zero_()
    return rnn


def test_a_search_in_the_dream_gets_better():
    """Survival rises, so the sign of what the search maximises is right.

    The dream ends once the LSTM's first cell, which sums up sigmoid-gated tanh(4 a), exceeds a
    threshold: who keeps the action negative lives on.
    """
    rnn, limit = lucky(), 40
    with torch.no_grad():
        lstm, big = rnn.lstm, 20.0
        lstm.bias_ih_l0[0], lstm.bias_ih_l0[4], lstm.bias_ih_l0[12] = big, big, big  # gates open
        lstm.weight_ih_l0[8, 1] = 4.0  # the candidate of the first cell reads the action
        rnn.head.weight[-1, 0], rnn.head.bias[-1] = 10.0, -5.0
    controller = Controller(1, 4, 1, "z", bias=True)
    world = DreamWorld(rnn, controller, CODE, (torch.zeros(1, 1), torch.zeros(1, 1)), [5] * 24)
    search = Search(controller.size, 8, 0.5, seed=1)
    best = []
    for _ in range(8):
        params = torch.from_numpy(search.ask())
        returns, lengths = play([world], controller, params, limit=limit)
        assert torch.equal(returns, lengths.float())
        search.tell(returns.mean(1).numpy())
        best.append(returns.mean().item())
    assert best[0] < 30 < best[-1] == limit


def test_a_population_is_played_in_one_batch():
    """Returns are those of every candidate by itself: common numbers, freezing after the end."""
    rnn = alive(model(seed=3), 0.0)
    with torch.no_grad():
        rnn.head.weight[-1] = torch.randn(R) * 3
    controller = Controller(Z, R, 1, "zch", bias=False)
    params = torch.randn(3, controller.size)
    starts = torch.randn(5, Z), torch.zeros(5, Z)
    whole = DreamWorld(rnn, controller, CODE, starts, list(range(4)) * 3, 1.2)
    returns, lengths = play([whole], controller, params, limit=50)
    assert lengths.min() < lengths.max() <= 50
    for p in range(3):
        one = DreamWorld(rnn, controller, CODE, starts, range(4), 1.2)
        assert torch.equal(play([one], controller, params[p : p + 1], limit=50)[0][0], returns[p])


def test_ends_of_episodes_are_learned_from(tmp_path):
    """Over all windows an end counts half as often as a row of the middle, not 1 / T as often."""
    store = EpisodeStore.create(tmp_path, (2, 2, 3), 1)
    image, zeros = np.zeros((41, 2, 2, 3), np.uint8), np.zeros((41, 1), np.float32)
    store.append(image, zeros, zeros[:, 0], True)
    windows = Windows(store, np.array([0]), 8)
    rows, weight, _, done = windows.rows(np.arange(len(windows)))
    seen = np.bincount(rows[:, :-1].flatten(), weight.flatten(), 41)
    assert seen[20] == 8 and seen[39] == 4 == done.sum()
    assert (weight.sum(1) >= 4).all()


def test_lanes_are_dreamt_by_the_members_in_turn():
    """Each as its M alone would dream it, while the controller remembers by the first."""
    first, second = (alive(model(seed=seed)) for seed in (1, 2))
    starts = torch.randn(5, Z), torch.zeros(5, Z)
    seeds, raw = [7, 8, 9, 7], torch.tensor([[0.4]])
    controller = Controller(Z, R, 1, "zch", bias=False)
    options = (controller, CODE, starts, seeds, 1.2)
    both = DreamWorld(first, *options, others=[second])
    mine = torch.tensor([0, 2, 3])  # of the first: the lowest seed, the third, and 7 again
    together = run(both, raw, 12)
    one, two = (run(DreamWorld(rnn, *options), raw, 12) for rnn in (first, second))
    assert torch.allclose(together[:, mine], one[:, mine], atol=1e-6)
    assert torch.allclose(together[:, 1, :Z], two[:, 1, :Z], atol=1e-6)
    state = first.initial(1)
    for t in range(12):  # h and c of the first, on the z that the second dreamt
        x = torch.cat([together[t, 1, :Z], torch.tanh(raw)[0], torch.tensor([float(t == 0)])])
        _, state = first.step(x[None], state)
        wanted = controller.features(together[t + 1, 1:2, :Z], state)[0]
        assert torch.allclose(wanted, together[t + 1, 1], atol=1e-6)
    found = []
    for dream in (both, DreamWorld(second, *options)):  # lanes that leave take nothing along
        run(dream, raw, 3)
        for _ in range(3):
            dream.start(raw.expand(2, 1), torch.tensor([1, 3]))()
        found.append(dream.z[0])
    assert torch.allclose(*found, atol=1e-6)


def test_a_lane_ends_where_its_own_member_says_so():
    first, second = alive(model(seed=1)), alive(model(seed=2), 10.0)
    dream = world(4, first, others=[second])
    dream.reset()
    _, reward, done = dream.start(torch.zeros(4, 1), torch.arange(4))()
    assert done.tolist() == [False, True, False, True] and reward.tolist() == [1] * 4
    _, _, done = dream.start(torch.zeros(2, 1), torch.tensor([0, 2]))()
    assert done.tolist() == [False, False]
