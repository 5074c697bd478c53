"""Episodes on disk: whole or not at all, split by episode, cut into windows that never cross."""

import json

import numpy as np
import pytest

from fastwm.episodes import EpisodeError, EpisodeStore, Frames, Latents, Sequences, Windows

LENGTHS, ENDS = (5, 3, 9), (True, False, True)


def fill(store: EpisodeStore, lengths=LENGTHS, ends=ENDS) -> EpisodeStore:
    """Every number tells its episode and row: 10 * episode + row."""
    for episode, (rows, end) in enumerate(zip(lengths, ends, strict=True)):
        mark = 10 * episode + np.arange(rows)
        image = np.broadcast_to(mark[:, None, None, None], (rows, 4, 4, 3)).astype(np.uint8)
        store.append(image, np.stack([mark, -mark], 1), mark, end)
    return store


@pytest.fixture
def store(tmp_path):
    return fill(EpisodeStore.create(tmp_path / "data", (4, 4, 3), 2))


def test_what_goes_in_comes_out(store):
    for opened in (store, EpisodeStore(store.folder)):
        assert len(opened) == 3 and opened.rows == 17
        assert opened.lengths.tolist() == list(LENGTHS) and opened.terminal.tolist() == list(ENDS)
        episode = opened.episode(1)
        assert episode["image"][:, 0, 0, 0].tolist() == [10, 11, 12]
        assert episode["reward"].tolist() == [10, 11, 12] and episode["terminal"] is False
        assert episode["action"].tolist() == [[10, -10], [11, -11], [0, 0]]  # the last one is none


def test_a_torn_write_is_cut_off(store):
    """Rows without an index, as a crash leaves them, are neither seen nor mixed in."""
    with open(store.folder / "image.bin", "ab") as file:
        file.write(b"\xff" * 100)
    again = EpisodeStore(store.folder)
    assert again.rows == 17
    fill(again, (4,), (False,))
    assert EpisodeStore(store.folder).episode(3)["image"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_files_that_are_too_short_are_one_clear_error(store):
    path = store.folder / "reward.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EpisodeError, match=r"expected 68 bytes in .*reward.bin .* got 67"):
        EpisodeStore(store.folder)


@pytest.mark.parametrize(
    "name, array, text",
    [
        ("image", np.zeros((5, 8, 8, 3), np.uint8), r"image of shape \(T, 4, 4, 3\)"),
        ("image", np.zeros((5, 4, 4, 3), np.float32), "expected image as .*uint8"),
        ("action", np.zeros((5, 3), np.float32), r"action of shape \(T, 2\) .* got \(5, 3\)"),
        ("reward", np.zeros((4,), np.float32), "reward of shape"),
    ],
)
def test_rows_that_do_not_fit_change_nothing(store, name, array, text):
    good = {
        "image": np.zeros((5, 4, 4, 3), np.uint8),
        "action": np.zeros((5, 2), np.float32),
        "reward": np.zeros(5, np.float32),
    }
    before = {p.name: p.read_bytes() for p in store.folder.iterdir()}
    with pytest.raises(EpisodeError, match=text):
        store.append(**{**good, name: array}, terminal=False)
    assert {p.name: p.read_bytes() for p in store.folder.iterdir()} == before


def test_a_folder_without_episodes_is_one_clear_error(tmp_path):
    with pytest.raises(EpisodeError, match="expected a folder with index.json, got .*empty"):
        EpisodeStore(tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
    (tmp_path / "index.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(EpisodeError, match="expected format"):
        EpisodeStore(tmp_path)


def test_an_existing_store_of_another_kind_is_refused(store):
    with pytest.raises(EpisodeError, match=r"expected pictures \(64, 64, 3\)"):
        EpisodeStore.create(store.folder, (64, 64, 3), 2)
    assert len(EpisodeStore.create(store.folder, (4, 4, 3), 2)) == 3


def test_split_by_episode_and_none_is_legal(store):
    learned, tested = store.split(1)
    assert (learned.tolist(), tested.tolist()) == ([0, 1], [2])
    learned, tested = store.split(0)  # where files[:-0] would be empty
    assert (learned.tolist(), tested.tolist()) == ([0, 1, 2], [])
    assert len(Frames(store, learned)) == 17 and len(Frames(store, tested)) == 0
    learned, tested = store.split(3)  # not more than that: all are learned from
    assert (len(learned), len(tested)) == (3, 0)
    learned, tested = store.split(1, (0, 2))
    assert (learned.tolist(), tested.tolist()) == ([0], [1])
    with pytest.raises(EpisodeError, match="expected at least 4 .* 2 to 4 .* got 3"):
        store.split(0, (2, 4))


def test_windows_never_cross_episodes(store):
    windows = Windows(store, np.arange(3), 4)
    assert len(windows) == 2 + 1 + 6  # of 4, 2 and 8 decisions
    rows, weight, first, done = windows.rows(np.arange(9))
    assert rows[0].tolist() == [0, 1, 2, 3, 4] and weight[0].tolist() == [1] * 4
    assert done[0].tolist() == [0, 0, 0, 1] and first[0].tolist() == [1, 0, 0, 0]
    assert rows[1].tolist() == [1, 2, 3, 4, 4] and weight[1].tolist() == [1, 1, 1, 0]
    assert rows[2].tolist() == [5, 6, 7, 7, 7] and weight[2].tolist() == [1, 1, 0, 0]
    assert done[2].tolist() == [0] * 4  # the time limit ended it, not the game
    assert rows[3].tolist() == [8, 9, 10, 11, 12] and rows[7].tolist() == [12, 13, 14, 15, 16]
    assert done[7].tolist() == [0, 0, 0, 1] and done[6].tolist() == [0] * 4
    assert rows[8].tolist() == [13, 14, 15, 16, 16] and done[8].tolist() == [0, 0, 1, 0]


def test_sequences_pair_an_action_with_what_it_led_to(store):
    item = Sequences(store, np.array([2]), 3)[1]
    assert item["image"][:, 0, 0, 0].tolist() == [21, 22, 23]
    assert item["action"][:, 0].tolist() == [21, 22, 23]
    assert item["next_image"][:, 0, 0, 0].tolist() == [22, 23, 24]
    assert item["reward"].tolist() == [22, 23, 24]


def test_latents_must_be_of_these_rows(store):
    mu = np.zeros((17, 2), np.float16)
    assert Latents(store, np.arange(3), 4, mu, mu)[0]["mu"].shape == (5, 2)
    with pytest.raises(EpisodeError, match=r"expected latents of 17 rows, got \(16, 2\)"):
        Latents(store, np.arange(3), 4, mu[:-1], mu[:-1])


def test_loader_workers_see_the_same(store):
    """Nothing is buffered in the data sets, so that processes of a DataLoader may share them."""
    from torch.utils.data import DataLoader

    mu = np.arange(34, dtype=np.float16).reshape(17, 2)
    for data in (
        Frames(store, np.arange(3)),
        Sequences(store, np.arange(3), 3),
        Latents(store, np.arange(3), 3, mu, mu),
    ):
        alone = list(DataLoader(data, batch_size=4))
        shared = list(DataLoader(data, batch_size=4, num_workers=2))
        assert len(alone) == len(shared) > 1
        for one, two in zip(alone, shared, strict=True):
            one, two = (x if isinstance(x, dict) else {"frame": x} for x in (one, two))
            assert all((one[key] == two[key]).all() for key in one)


def test_frames_of_a_batch_keep_their_order(store):
    frames = Frames(store, np.array([0, 2]))
    batch = frames.batch(np.array([6, 0, 13, 5]))
    assert batch[:, 0, 0, 0].tolist() == [21, 0, 28, 20]
    assert frames[6][0, 0, 0] == 21
