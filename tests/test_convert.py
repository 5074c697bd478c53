"""`python -m fastwm.convert`: folders of other code in, and out again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastwm import checkpoint, convert
from fastwm.episodes import EpisodeStore
from fastwm.loops.ha_exchange import import_models
from fastwm.worldmodels.ha import MDNRNN, ConvVAE
from fastwm.worldmodels.ha_convert import rnn_from, rnn_to, vae_from, vae_to


def rollout(path, length=5):
    random = np.random.default_rng(length)
    np.savez(
        path,
        observations=random.integers(0, 255, (length, 96, 96, 3)).astype(np.uint8),
        actions=random.uniform(-1, 1, (length, 3)).astype(np.float32),
        rewards=np.arange(length, dtype=np.float32),
        terminals=np.arange(length) == length - 1,
    )


@pytest.fixture
def others(tmp_path):
    """Models as other code stores them; the weights go back by `vae_to` and `rnn_to`."""
    vae = ConvVAE(32, decoder_relu=True)
    rnn = MDNRNN(32, 3, 16, 5, "joint", reward=True, done=True)
    weights = {
        "vae": vae_to(vae),
        "mdrnn": rnn_to(rnn),
        "ctrl": {"fc.weight": torch.randn(3, 48), "fc.bias": torch.randn(3)},
    }
    for name, state in weights.items():
        (tmp_path / "others" / name).mkdir(parents=True)
        parts = {"epoch": 7, "state_dict": state, "precision": 31.5, "reward": 640.0}
        torch.save(parts, tmp_path / "others" / name / "best.tar")
    return tmp_path / "others", vae, rnn, weights


def test_rollouts_become_episodes_and_files_again(tmp_path, capsys):
    (tmp_path / "npz").mkdir()
    for i in range(2):
        rollout(tmp_path / "npz" / f"rollout_{i}.npz", 5 + i)
    data, out = tmp_path / "data", tmp_path / "out"
    assert convert.main(["import", str(tmp_path / "npz"), str(data), "--rows", "84"]) == 0
    assert f"2 episodes, 13 rows: --data_dir {data}" in capsys.readouterr().out
    store = EpisodeStore(data)
    assert store.lengths.tolist() == [6, 7] and store.shape == (64, 64, 3)
    assert store.terminal.all() and store.reward[:6].tolist() == [0, 0, 1, 2, 3, 4]
    assert convert.main(["export", str(data), str(out)]) == 0
    with np.load(out / "rollout_00001.npz") as file:
        assert file["rewards"].tolist() == [0, 1, 2, 3, 4, 5]
        assert np.array_equal(file["actions"], store.action[6:12])
    again = tmp_path / "again"
    assert convert.main(["import", str(out), str(again)]) == 0
    assert np.array_equal(EpisodeStore(again).image, store.image)


def test_models_are_read_and_written(tmp_path, others, capsys):
    folder, vae, rnn, weights = others
    run, out = tmp_path / "run", tmp_path / "out"
    assert convert.main(["import", str(folder), str(run)]) == 0
    text = capsys.readouterr().out
    assert "--vae.latent 32 --vae.decoder_relu true --rnn.hidden 16 --rnn.mixtures 5" in text
    stored = checkpoint.load(run / "vae" / "best.tar")
    assert stored["options"] == vae.options() and stored["precision"] == 31.5
    for name, value in vae.state_dict().items():
        assert torch.equal(stored["state_dict"][name], value)
    ctrl = checkpoint.load(run / "ctrl" / "best.tar")
    assert ctrl["reward"] == 640 and torch.equal(
        ctrl["state_dict"]["fc.weight"], weights["ctrl"]["fc.weight"]
    )
    assert convert.main(["export", str(run), str(out)]) == 0
    for name in ("vae", "mdrnn", "ctrl"):
        back = torch.load(out / name / "best.tar", weights_only=True)
        assert back["epoch"] == 7
        for key, value in weights[name].items():
            assert torch.equal(back["state_dict"][key], value), key
    count = len(list(rnn.parameters()))
    assert len(back_groups(out / "mdrnn" / "best.tar")) == count
    again, _ = vae_from(torch.load(out / "vae" / "best.tar", weights_only=True)["state_dict"])
    assert torch.equal(again.mu.weight, vae.mu.weight)
    assert rnn_from(weights["mdrnn"])[1] == rnn.options()


def back_groups(path):
    return torch.load(path, weights_only=True)["optimizer"]["param_groups"][0]["params"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: None, "expected .npz files with the arrays observations, actions"),
        (
            lambda f: (f / "vae").mkdir() or (f / "vae" / "best.tar").write_bytes(b"no"),
            "state_dict",
        ),
        (
            lambda f: (
                (f / "vae").mkdir()
                or torch.save({"state_dict": {"mu.bias": torch.zeros(3)}}, f / "vae" / "best.tar")
            ),
            "to be of other code, got one of fastwm",
        ),
    ],
)
def test_mistakes_end_with_one_line_and_write_nothing(tmp_path, capsys, make, message):
    folder = tmp_path / "in"
    folder.mkdir()
    make(folder)
    assert convert.main(["import", str(folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_episodes_are_not_mixed(tmp_path, capsys):
    (tmp_path / "npz").mkdir()
    rollout(tmp_path / "npz" / "rollout_0.npz")
    argv = ["import", str(tmp_path / "npz"), str(tmp_path / "data")]
    assert convert.main(argv) == 0 and convert.main(argv) == 2
    assert "expected an empty folder or none" in capsys.readouterr().err
    assert len(EpisodeStore(tmp_path / "data")) == 1
    assert convert.main(["export", str(tmp_path / "npz"), str(tmp_path / "out")]) == 2
    assert "found neither models nor episodes" in capsys.readouterr().err


def test_flags_name_what_the_models_need(tmp_path, others):
    flags = import_models(others[0], tmp_path / "run", lambda text: None)
    assert flags[:4] == ["--vae.latent", "32", "--vae.decoder_relu", "true"]
    assert flags[-2:] == ["--rnn.done", "true"]
