"""The replay against a plain model: lists of rows, one per env, that never forget."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replay_model import BACKENDS, choose, filled, ring_of, rows_of, spec

from fastwm import replay as replay_module
from fastwm.replay import Replay


@pytest.fixture(params=[*BACKENDS, "device"])
def backend(request, monkeypatch):
    """Every test runs on numpy slices, on tensors and, where it is built, the compiled module."""
    choose(monkeypatch, request.param)
    return request.param


def check_window(model, batch, b, length):
    """One sampled sequence equals the rows of the model, key by key."""
    env, first = batch["ids"][b].tolist()
    rows = model[env][first - 1 : first + length]  # context row and T rows
    assert len(rows) == length + 1
    for name in ("image", "position", "reward", "is_first", "is_terminal"):
        want = np.stack([r[name] for r in rows[1:]])
        assert np.array_equal(batch[name][b].numpy(), want), name
    last = np.stack([r["is_last"] for r in rows[1:]])
    last[:-1] |= np.stack([r["is_first"] for r in rows[2:]]) if length > 1 else last[:-1]
    assert np.array_equal(batch["is_last"][b].numpy(), last)
    want = np.stack([r["action"] for r in rows[:-1]])
    assert np.array_equal(batch["prev_action"][b].numpy(), want)
    deter = torch.as_tensor(rows[0]["deter"]).to(torch.bfloat16)
    assert torch.equal(batch["deter"][b], deter)
    assert np.array_equal(batch["stoch"][b].numpy(), rows[0]["stoch"])


@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_history_matches_the_model(backend, data):
    num_envs = data.draw(st.integers(1, 3), "num_envs")
    length = data.draw(st.integers(1, 4), "T")
    ring = data.draw(st.integers(length + 1, 14), "rows per env")
    replay = Replay(
        spec(), num_envs, ring * num_envs, length,
        online=data.draw(st.booleans(), "online"), seed=data.draw(st.integers(0, 9), "seed"),
    )  # fmt: skip
    model = [[] for _ in range(num_envs)]
    for _ in range(data.draw(st.integers(1, 40), "actions")):
        what = data.draw(st.sampled_from(["all", "all", "all", "some", "sample", "latents"]))
        if what == "all":
            envs = list(range(num_envs))
        else:
            envs = data.draw(st.lists(st.integers(0, num_envs - 1), min_size=1, unique=True))
        if what in ("all", "some"):
            rows = rows_of(envs, [len(model[env]) for env in envs])
            replay.add(rows, None if what == "all" else np.array(envs))
            for i, env in enumerate(envs):
                model[env].append({name: value[i] for name, value in rows.items()})
        elif replay.windows and replay.can_sample(1):
            batch = replay.sample(data.draw(st.integers(1, min(4, replay.windows))))
            for b, (env, first) in enumerate(batch["ids"].tolist()):
                oldest = max(0, len(model[env]) - ring)
                assert oldest <= first - 1 and first + length <= len(model[env])
                check_window(model, batch, b, length)
            if what == "latents":
                write_back(replay, model, batch["ids"], data.draw(st.integers(0, 99)))
    assert len(replay) == sum(min(len(rows), ring) for rows in model)
    assert replay.windows == sum(max(0, min(len(rows), ring) - length) for rows in model)


def write_back(replay, model, ids, seed):
    rng = np.random.default_rng(seed)
    deter = rng.normal(size=(len(ids), replay.batch_length, 5)).astype(np.float32)
    stoch = rng.integers(0, 200, (len(ids), replay.batch_length, 2)).astype(np.uint8)
    replay.update_latents(ids, torch.as_tensor(deter).to(torch.bfloat16), torch.as_tensor(stoch))
    for b, (env, first) in enumerate(ids.tolist()):
        for t in range(replay.batch_length):
            model[env][first + t] |= {"deter": deter[b, t], "stoch": stoch[b, t]}


@pytest.mark.parametrize("ring", range(4, 12))
def test_windows_never_cross_the_seam(backend, ring):
    """reward = time, so a window that crosses the write head shows a jump."""
    replay = Replay(spec(), 2, 2 * ring, 3, seed=1)
    for time in range(3 * ring + 2):
        replay.add(rows_of([0, 1], [time, time]))
        if not replay.windows:
            continue
        batch = replay.sample(min(8, replay.windows))
        time_in = batch["reward"].numpy() % 1000
        assert (np.diff(time_in, axis=1) == 1).all()
        assert time_in.max() <= time and time_in.min() - 1 >= max(0, time + 1 - ring)
        assert np.array_equal(time_in[:, 0], batch["ids"][:, 1].numpy())


def test_every_valid_window_is_drawn_equally_often(backend):
    """Chi-square over envs of 8, 8 and 3 windows; the seed is fixed, so this never flakes."""
    replay = Replay(spec(), 3, 36, 4, seed=5)
    for time in range(20):
        envs = [0, 1, 2] if time < 7 else [0, 1]
        replay.add(rows_of(envs, [time] * len(envs)), envs=envs)
    counts: dict[tuple, int] = {}
    for _ in range(500):
        for pair in replay.sample(19, online=False)["ids"].tolist():
            counts[tuple(pair)] = counts.get(tuple(pair), 0) + 1
    assert len(counts) == replay.windows == 19
    chi = sum((n - 500) ** 2 / 500 for n in counts.values())
    # Wilson and Hilferty's approximation of the 99.9 % quantile with 18 degrees of freedom
    assert chi < 18 * (1 - 2 / (9 * 18) + 3.09 * math.sqrt(2 / (9 * 18))) ** 3


def test_online_windows_come_first_oldest_first_and_once(backend):
    num_envs, length = 4, 3
    replay = Replay(spec(), num_envs, 400, length, seed=0)
    seen = []
    for time in range(60):
        replay.add(rows_of(range(num_envs), [time] * num_envs))
        before = replay._totals["online"]
        if replay.windows >= 2:
            ids = replay.sample(2)["ids"].tolist()
            seen += [tuple(pair) for pair in ids[: replay._totals["online"] - before]]
    assert len(seen) == len(set(seen)) == num_envs * 60 // (length + 1) - num_envs + 1
    firsts = [first for _, first in seen]
    assert firsts == sorted(firsts)
    for env in range(num_envs):
        mine = [first for e, first in seen if e == env]
        assert mine[0] == env + 1, "phases are spread over the envs"
        assert (np.diff(mine) == length + 1).all(), "neither overlap nor gap"


def test_online_windows_arrive_evenly(backend):
    """With as many envs as a batch has elements no batch is all online, once it keeps up."""
    replay = Replay(spec(), 16, 16 * 40, 7, seed=0)
    shares = []
    for time in range(80):
        replay.add(rows_of(range(16), [time] * 16))
        if replay.can_sample(16):
            before = replay._totals["online"]
            replay.sample(16)
            shares.append(replay._totals["online"] - before)
    assert set(shares[8:]) == {2}


def test_overwritten_online_windows_are_dropped_and_reports_leave_the_queue_alone(backend):
    replay = filled(num_envs=1, rows=30, capacity=10, length=4)
    cursor = replay._next.copy()
    replay.sample(4, online=False)
    assert np.array_equal(replay._next, cursor)
    batch = replay.sample(4)
    # rows 20..29 are alive; windows began at 0, 5, ...: four are gone, 20 and 25 are whole
    assert batch["ids"][:2].tolist() == [[0, 21], [0, 26]]
    assert replay.stats()["online_dropped"] == 4
    assert replay.stats()["samples"] == 8 and replay.stats()["online_share"] == 0.25


@pytest.mark.parametrize("actions", [1, 4, 18])
def test_prev_action_holds_the_exact_previous_actions(backend, actions):
    """An overlapping in-place copy would corrupt most rows at the larger widths."""
    replay = Replay(spec(actions, deter=0), 2, 200, 64)
    want = np.arange(2 * 90 * actions, dtype=np.float32).reshape(2, 90, actions)
    for time in range(90):
        rows = rows_of([0, 1], [time, time])
        del rows["deter"], rows["stoch"]
        replay.add(rows | {"action": want[:, time]})
    for _ in range(4):
        batch = replay.sample(16)
        for b, (env, first) in enumerate(batch["ids"].tolist()):
            assert np.array_equal(batch["prev_action"][b], want[env, first - 1 : first + 63])


def test_discrete_actions_and_many_classes_keep_their_types(backend):
    described = spec(stoch_dtype="int32") | {"action": ((2,), "int32")}
    replay = Replay(described, 1, 20, 3)
    for time in range(6):
        rows = rows_of([0], [time])
        replay.add(rows | {"action": np.array([[time, 7]], np.int64),
                           "stoch": torch.tensor([[300 + time, 5]])})  # fmt: skip
    batch = replay.sample(3)
    assert batch["prev_action"].dtype == torch.int32 and batch["stoch"].dtype == torch.int32
    assert torch.equal(batch["stoch"][:, 0], 299 + batch["ids"][:, 1].int())
    assert torch.equal(batch["prev_action"][:, 0, 0], batch["ids"][:, 1].int() - 1)


def test_latents_round_trip_and_old_windows_are_not_written(backend):
    replay = filled(num_envs=1, rows=12, capacity=12, length=4)
    ids = torch.tensor([[0, 1], [0, 5]])
    deter = torch.arange(2 * 4 * 5).reshape(2, 4, 5).to(torch.bfloat16)
    stoch = torch.arange(2 * 4 * 2).reshape(2, 4, 2).to(torch.uint8)
    for time in range(12, 15):
        replay.add(rows_of([0], [time]))
    before = {name: ring_of(replay, name) for name in ("deter", "stoch")}
    replay.update_latents(ids, deter, stoch)
    # rows 0, 1, 2 gave their slots to rows 12, 13, 14: of the first window only 3 and 4 are left
    assert replay.stats()["latents_dropped"] == 2
    for name in before:
        assert np.array_equal(ring_of(replay, name)[0, :3], before[name][0, :3]), name
    for row_number, b, t in [(3, 0, 2), (4, 0, 3), (5, 1, 0), (8, 1, 3)]:
        assert np.array_equal(ring_of(replay, "stoch")[0, row_number], stoch[b, t])
        bits = deter[b, t].view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(ring_of(replay, "deter")[0, row_number], bits)


def test_abandoned_episodes_end_where_the_next_begins(backend):
    replay = Replay(spec(), 1, 40, 6, online=False)
    for time in range(10):
        rows = rows_of([0], [time])
        flags = {"is_first": [time in (0, 5)], "is_last": [False], "is_terminal": [False]}
        replay.add(rows | {name: np.array(value) for name, value in flags.items()})
    batch = replay.sample(4)
    for b, (_, first) in enumerate(batch["ids"].tolist()):
        want = [first + t == 4 for t in range(6)]
        assert batch["is_last"][b].tolist() == want
    assert not batch["is_terminal"].any()


def test_reset_stream_cuts_the_episode_and_asks_for_fresh_environments(backend):
    replay = filled(num_envs=2, rows=9, capacity=60, length=3)
    replay.reset_stream()
    stale = rows_of([0, 1], [9, 9]) | {"is_first": np.array([True, False])}
    with pytest.raises(ValueError, match="expected is_first in the first row"):
        replay.add(stale)
    assert len(replay) == 18
    replay.add(stale | {"is_first": np.array([True, True])})
    replay.add(rows_of([0, 1], [10, 10]))
    for _ in range(10):
        batch = replay.sample(4, online=False)
        time = batch["ids"][:, 1:] + torch.arange(3)
        assert batch["is_last"][time == 8].all(), "also as the last row of a window"
        assert not batch["is_terminal"][(time == 8) & (batch["ids"][:, :1] == 0)].any()


def test_same_seed_same_batches_and_seeds_differ(backend):
    first, again, other = filled(seed=7), filled(seed=7), filled(seed=8)
    ids = []
    for replay in (first, again, other):
        replay.sample(5)
        ids.append(torch.cat([replay.sample(6)["ids"] for _ in range(4)]))
    assert torch.equal(ids[0], ids[1]) and not torch.equal(ids[0], ids[2])


def test_native_equals_numpy(monkeypatch):
    """Same bits from both, over wraps, online windows, ragged adds and write-back."""
    choose(monkeypatch, "native")
    native = Replay(spec(), 3, 51, 4, seed=2)
    monkeypatch.setattr(replay_module, "_replay", None)
    plain = Replay(spec(), 3, 51, 4, seed=2)
    assert (native.backend, plain.backend) == ("native", "numpy")
    rng = np.random.default_rng(0)
    times = np.zeros(3, int)
    for step in range(120):
        envs = np.arange(3) if step % 3 else rng.permutation(3)[:2]
        for replay in (native, plain):
            replay.add(rows_of(envs, times[envs]), None if step % 3 else envs)
        times[envs] += 1
        if not plain.can_sample(3):
            continue
        batches = [replay.sample(3, online=step % 5 > 0) for replay in (native, plain)]
        for name in batches[0]:
            assert torch.equal(batches[0][name], batches[1][name]), name
        deter, stoch = torch.randn(3, 4, 5), torch.randint(0, 9, (3, 4, 2), dtype=torch.uint8)
        for replay in (native, plain):
            replay.update_latents(batches[0]["ids"], deter, stoch)
    assert native.stats() == plain.stats()
    for name, key in plain.keys.items():
        assert np.array_equal(native.keys[name].ring, key.ring), name


PLAIN = {
    "vector": ((3,), "float32"), "wide": ((2, 5), "uint8"), "action": ((), "int32"),
    "reward": ((), "float32"), "is_first": ((), "bool"), "is_last": ((), "bool"),
    "is_terminal": ((), "bool"),
}  # fmt: skip


def plain_rows(rng, num_envs=3):
    shapes = {name: ((num_envs, *shape), dtype) for name, (shape, dtype) in PLAIN.items()}
    return {name: rng.integers(0, 2, s).astype(dtype) for name, (s, dtype) in shapes.items()}


@pytest.mark.parametrize("num_envs", [3, 7000])  # the GIL is kept, and given back
def test_rows_in_their_stored_form_go_in_by_one_call(monkeypatch, num_envs):
    choose(monkeypatch, "native")
    native = Replay(PLAIN, num_envs, num_envs * 7, 4)
    monkeypatch.setattr(replay_module, "_replay", None)
    plain = Replay(PLAIN, num_envs, num_envs * 7, 4)
    rng = np.random.default_rng(0)
    for _ in range(16):
        rows = plain_rows(rng, num_envs)
        assert native.rings.add_whole(rows) and not plain.rings.add_whole(rows)
        plain.add(rows)
    assert np.array_equal(native._count, plain._count) and native._count[0] == 16
    for name, key in plain.keys.items():
        assert np.array_equal(native.keys[name].ring, key.ring), name


def test_rows_in_another_form_are_converted_or_refused(monkeypatch):
    choose(monkeypatch, "native")
    replay = Replay(PLAIN, 3, 60, 4)
    rng = np.random.default_rng(1)

    def stored(**other):
        rows = plain_rows(rng)
        assert not replay.rings.add_whole(rows | other) and not replay._count.any()
        replay.add(rows | other)
        found = {name: key.ring[:, 0].copy() for name, key in replay.keys.items()}
        replay._count[:] = 0
        for name, value in (rows | other).items():
            assert np.array_equal(found[name], np.asarray(value)), name

    turned = np.asfortranarray(rng.integers(0, 9, (3, 2, 5)).astype(np.uint8))
    stored(wide=turned)
    stored(wide=turned[:, :, ::-1])
    stored(vector=torch.ones(3, 3))
    stored(action=np.array([0, 1, 1], np.int64))
    for error, match, other in [
        (ValueError, "unknown", {"more": np.zeros(3)}),
        (ValueError, "of shape", {"vector": np.zeros((2, 3), np.float32)}),
        (ValueError, "of shape", {"vector": np.zeros((3, 4), np.float32)}),
        (ValueError, "of shape", {"reward": np.zeros((3, 1), np.float32)}),
        (TypeError, "as float32, got float64", {"reward": np.zeros(3)}),
        (TypeError, "as float32, got >f4", {"reward": np.zeros(3, ">f4")}),
        (TypeError, "as bool, got uint8", {"is_last": np.zeros(3, np.uint8)}),
    ]:
        with pytest.raises(error, match=match):
            replay.add(plain_rows(rng) | other)
    with pytest.raises(ValueError, match=r"missing \['wide'\]"):
        replay.add({name: rows for name, rows in plain_rows(rng).items() if name != "wide"})
    assert not replay._count.any()


def test_out_is_filled_in_place_and_checked(backend):
    replay = filled()
    out = replay.empty_batch(3)
    pointers = {name: value.data_ptr() for name, value in out.items()}
    assert replay.sample(3, out=out) is out
    assert pointers == {name: value.data_ptr() for name, value in out.items()}
    draws = replay._draws
    for name, wrong in [("image", out["image"][:2]), ("reward", out["reward"].double())]:
        with pytest.raises(ValueError, match=rf"out\['{name}'\] contiguous .* got "):
            replay.sample(3, out=out | {name: wrong})
    with pytest.raises(ValueError, match="got nothing"):
        replay.sample(3, out={})
    assert replay._draws == draws


def test_too_few_rows_to_sample(backend):
    replay = Replay(spec(), 2, 40, 4)
    for time in range(4):
        replay.add(rows_of([0, 1], [time, time]))
        assert not replay.can_sample(1)
    with pytest.raises(ValueError, match="at least 2 windows of 5 rows, got 0 from 8 rows"):
        replay.sample(2)
    replay.add(rows_of([0, 1], [4, 4]))
    assert replay.can_sample(2) and not replay.can_sample(3)
    small = filled(num_envs=1, rows=9, capacity=7, length=4)
    assert small.can_sample(99), "a ring of three windows can be full"


BAD_ROWS = [
    (lambda rows: rows.pop("reward"), ValueError, r"missing \['reward'\], unknown \[\]"),
    (lambda rows: rows.update(log=rows["reward"]), ValueError, r"unknown \['log'\]"),
    (lambda rows: rows.update(image=rows["image"][:1]), ValueError,
     r"expected image of shape \(N, \*\(2, 3, 1\)\) = \(2, 2, 3, 1\), got \(1, 2, 3, 1\)"),
    (lambda rows: rows.update(position=rows["position"].astype("f8")), TypeError,
     r"expected position of shape \(2, 3\) as float32, got float64"),
    (lambda rows: rows.update(stoch=rows["stoch"].astype("i8")), TypeError, "as uint8, got int64"),
    (lambda rows: rows.update(is_first=[1.0, 0.0]), TypeError, "as bool, got float64"),
]  # fmt: skip


@pytest.mark.parametrize("spoil, error, message", BAD_ROWS)
def test_bad_rows_raise_and_change_nothing(backend, spoil, error, message):
    replay = filled(num_envs=2)
    before = {name: ring_of(replay, name) for name in replay.keys}
    count = replay._count.copy()
    rows = rows_of([0, 1], [20, 20])
    spoil(rows)
    with pytest.raises(error, match=message):
        replay.add(rows)
    assert np.array_equal(replay._count, count)
    for name, ring in before.items():
        assert np.array_equal(ring_of(replay, name), ring), name


@pytest.mark.parametrize("envs", [[0, 0], [2], [-1], [[0, 1]]])
def test_bad_env_numbers(backend, envs):
    replay = filled(num_envs=2)
    with pytest.raises(ValueError, match=r"expected envs .* in \[0, 2\)"):
        replay.add(rows_of([0] * len(envs), [0] * len(envs)), envs=envs)


def test_bad_write_back(backend):
    replay = filled(num_envs=2, rows=8, capacity=40)
    deter, stoch = torch.zeros(1, 4, 5), torch.zeros(1, 4, 2, dtype=torch.uint8)
    for ids in ([[0, 0]], [[2, 1]], [[-1, 1]], [[0, 5]]):
        with pytest.raises(ValueError, match="rows written before"):
            replay.update_latents(torch.tensor(ids), deter, stoch)
    with pytest.raises(ValueError, match=r"expected deter of shape \(B, T, \*\(5,\)\)"):
        replay.update_latents(torch.tensor([[0, 1]]), deter[:, :3], stoch)
    with pytest.raises(ValueError, match="expected stoch exactly if the spec has it"):
        replay.update_latents(torch.tensor([[0, 1]]), deter, None)
    assert replay.stats()["latents_dropped"] == 0


def test_bad_settings():
    with pytest.raises(ValueError, match=r"at least num_envs \* \(batch_length \+ 1\) = 10 rows"):
        Replay(spec(), 2, 9, 4)
    with pytest.raises(ValueError, match="replay.storage: expected 'ram', 'cuda', or 'mmap' t"):
        Replay(spec(), 2, 20, 4, storage="mmap")
    with pytest.raises(ValueError, match=r"expected spec\['is_last'\] = .* got no such key"):
        Replay({name: v for name, v in spec().items() if name != "is_last"}, 2, 20, 4)
    with pytest.raises(ValueError, match=r"expected spec\['reward'\] = \(\(\), 'float32'\)"):
        Replay(spec() | {"reward": ((1,), "float32")}, 2, 20, 4)
    with pytest.raises(ValueError, match="rename the observation"):
        Replay(spec() | {"ids": ((1,), "float32")}, 2, 20, 4)
    with pytest.raises(TypeError, match="expected dtype of image"):
        Replay(spec() | {"image": ((1,), "float64")}, 2, 20, 4)


def test_bytes_are_what_the_rows_hold(backend):
    """size12m beside a 64 x 64 x 3 image: latents in 4,128 bytes, everything else in 31."""
    row_spec = spec(actions=6, deter=2048, stoch=32) | {"image": ((64, 64, 3), "uint8")}
    del row_spec["position"]
    replay = Replay(row_spec, 2, 20, 4)
    assert replay.bytes_per_row == 64 * 64 * 3 + 2048 * 2 + 32 + 6 * 4 + 4 + 3
    assert replay.nbytes == 20 * replay.bytes_per_row
    assert sum(key.ring.nbytes for key in replay.keys.values()) == replay.nbytes


def test_one_thread_adds_while_another_samples(backend):
    """Rewards count up, so a torn window or a half-written row would show."""
    replay = filled(num_envs=2, rows=20, capacity=40, length=4)
    stop = threading.Event()
    errors = []

    def sampler():
        while not stop.is_set():
            batch = replay.sample(4, online=False)
            time = batch["reward"].numpy() % 1000
            if not np.array_equal(time, batch["ids"][:, 1:].numpy() + np.arange(4)):
                errors.append(time)

    thread = threading.Thread(target=sampler)
    thread.start()
    try:
        for time in range(20, 320):
            replay.add(rows_of([0, 1], [time, time]))
    finally:
        stop.set()
        thread.join()
    assert not errors
