"""Rollout files and weights of other code: what time a row belongs to, and equal outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastwm.episodes import EpisodeStore
from fastwm.episodes_npz import (
    RolloutError,
    find_rollouts,
    read_rollout,
    write_latents,
    write_rollout,
)
from fastwm.worldmodels.ha import MDNRNN, ConvVAE
from fastwm.worldmodels.ha_convert import rnn_from, rnn_to, vae_from, vae_to

ACTIONS = np.array([3, 1, 4, 1, 5, 9, 2], np.float32)


class Sum:
    """The picture shows the sum of all actions, and the reward is that sum."""

    def __init__(self):
        self.total, self.step_count = 10, 0

    def picture(self):
        return np.full((2, 2, 3), self.total, np.uint8)

    def step(self, action):
        self.total += int(action)
        self.step_count += 1
        return self.picture(), float(self.total), self.step_count == len(ACTIONS)


def record(path, order, ended=True):
    """A rollout as the two kinds of code write it."""
    env, lines = Sum(), []
    seen = env.picture()
    for action in ACTIONS:
        new, reward, done = env.step(action)
        lines.append((seen if order == "before" else new, [action], reward, done and ended))
        seen = new
    names = ("observations", "actions", "rewards", "terminals")
    columns = dict(zip(names, map(np.array, zip(*lines, strict=True)), strict=True))
    columns = {k: v if v.dtype == np.uint8 else v.astype(np.float32) for k, v in columns.items()}
    np.savez(path, **columns)


def sums(rows):
    return rows["image"][:, 0, 0, 0].astype(int)


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_action_leads_to_the_next_row(tmp_path, order):
    """image[t] + action[t] = image[t + 1], and the reward arrives with what it was given for."""
    record(tmp_path / "rollout_1.npz", order)
    rows = read_rollout(tmp_path / "rollout_1.npz", order)
    seen, count = sums(rows), len(rows["image"])
    known = count - 1 if order == "before" else count  # the copy of the last picture stands aside
    assert np.array_equal(seen[:-1][: known - 1] + rows["action"][: known - 1, 0], seen[1:known])
    assert np.array_equal(rows["reward"][1:known], seen[1:known])
    assert rows["reward"][0] == 0 and (rows["action"][-1] == 0).all() and rows["terminal"]
    assert count == (8 if order == "before" else 7)
    if order == "before":
        assert rows["reward"][-1] == seen[-2] + ACTIONS[-1] and seen[-1] == seen[-2]


def test_the_wrong_order_shows(tmp_path):
    """What the test above sees when the order is mistaken."""
    record(tmp_path / "rollout_1.npz", "after")
    rows = read_rollout(tmp_path / "rollout_1.npz", "before")
    assert not np.array_equal(sums(rows)[:5] + rows["action"][:5, 0], sums(rows)[1:6])


def test_an_end_by_time_limit_is_none(tmp_path):
    record(tmp_path / "rollout_1.npz", "before", ended=False)
    rows = read_rollout(tmp_path / "rollout_1.npz")
    assert not rows["terminal"] and len(rows["image"]) == 7 == len(rows["reward"])
    assert np.array_equal(sums(rows)[:-1] + rows["action"][:-1, 0], sums(rows)[1:])


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("terminal", [True, False])
def test_files_written_here_lose_nothing(tmp_path, order, terminal):
    random = np.random.default_rng(0)
    episode = {
        "image": random.integers(0, 255, (6, 4, 4, 3)).astype(np.uint8),
        "action": np.concatenate([random.normal(size=(5, 2)), np.zeros((1, 2))]).astype(np.float32),
        "reward": np.concatenate([[0], random.normal(size=5)]).astype(np.float32),
        "terminal": terminal,
    }
    path = tmp_path / "rollout_1.npz"
    write_rollout(path, episode, order)
    rows = read_rollout(path, order)
    for name, value in episode.items():
        assert np.array_equal(rows[name], value), name
    with np.load(path) as file:  # others read these four, all of one length
        names = ("observations", "actions", "rewards", "terminals")
        assert [len(file[name]) for name in names] == [5] * 4
        first = 0 if order == "before" else 1
        assert np.array_equal(file["observations"], episode["image"][first : first + 5])
        assert file["terminals"].tolist() == [0, 0, 0, 0, float(terminal)]


def test_record_files_of_2018(tmp_path):
    """`obs` and `action` in float16, no rewards."""
    obs = np.arange(4 * 12, dtype=np.uint8).reshape(4, 2, 2, 3)
    np.savez_compressed(tmp_path / "17.npz", obs=obs, action=np.ones((4, 3), np.float16))
    rows = read_rollout(tmp_path / "17.npz")
    assert np.array_equal(rows["image"], obs) and not rows["terminal"]
    assert rows["action"].tolist() == [[1, 1, 1]] * 3 + [[0, 0, 0]]
    assert rows["action"].dtype == rows["reward"].dtype == np.float32


def test_latents_files_are_no_rollouts(tmp_path):
    record(tmp_path / "rollout_1.npz", "before")
    (tmp_path / "latents").mkdir()
    np.savez(tmp_path / "latents" / "latents_32.npz", latents=np.zeros((3, 2)), actions=np.ones(3))
    assert [path.name for path in find_rollouts(tmp_path)] == ["rollout_1.npz"]


def test_latents_of_all_episodes(tmp_path):
    store = EpisodeStore.create(tmp_path / "data", (2, 2, 3), 1)
    for length, terminal in ((3, True), (4, False)):
        image = np.zeros((length, 2, 2, 3), np.uint8)
        action = np.arange(1, length + 1, dtype=np.float32)[:, None]
        store.append(image, action, 10 * action[:, 0], terminal)
    mu = np.arange(store.rows, dtype=np.float32)[:, None]
    write_latents(tmp_path / "latents_1.npz", mu, store)
    with np.load(tmp_path / "latents_1.npz") as file:
        assert file["latents"][:, 0].tolist() == [0, 1, 3, 4, 5]
        assert file["actions"][:, 0].tolist() == [1, 2, 1, 2, 3]
        assert file["rewards"].tolist() == [20, 30, 20, 30, 40]
        assert file["terminals"].tolist() == [0, 1, 0, 0, 0]
        assert file["lengths"].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"observations": np.zeros((4, 2, 2, 3)), "actions": np.zeros((4, 1))},
            "uint8 with T >= 2",
        ),
        (
            {"observations": np.zeros((4, 2, 2, 3), np.uint8), "actions": np.zeros((3, 1))},
            "expected actions of length T = 4",
        ),
    ],
)
def test_bad_files(tmp_path, arrays, message):
    np.savez(tmp_path / "rollout_1.npz", **arrays)
    with pytest.raises(RolloutError, match=message):
        read_rollout(tmp_path / "rollout_1.npz")


def test_bad_folders(tmp_path):
    with pytest.raises(RolloutError, match="expected a folder with .npz rollouts"):
        find_rollouts(tmp_path / "none")
    with pytest.raises(RolloutError, match="found none"):
        find_rollouts(tmp_path)
    (tmp_path / "rollout_1.npz").write_bytes(b"PK broken")
    with pytest.raises(RolloutError, match="expected a whole .npz file"):
        find_rollouts(tmp_path)
    with pytest.raises(RolloutError, match="expected the order of a line"):
        read_rollout(tmp_path / "rollout_1.npz", "between")


# ------------------------------------------------------------------------------------------ weights

Z, A, R, M = 6, 2, 9, 5


def foreign_vae(fc="fc1"):
    """Weights under the names of other code, and what they compute, written from their layout."""
    torch.manual_seed(0)
    shapes = {f"encoder.conv{i + 1}": (b, a, 4, 4) for i, (a, b) in enumerate(CONVS)}
    shapes |= {f"decoder.deconv{i + 1}": (a, b, k, k) for i, (a, b, k) in enumerate(DECONVS)}
    shapes |= {"encoder.fc_mu": (Z, 1024), "encoder.fc_logsigma": (Z, 1024)}
    shapes[f"decoder.{fc}"] = (1024, Z)
    weights = {}
    for name, shape in shapes.items():
        out = shape[1] if "deconv" in name else shape[0]
        weights[f"{name}.weight"] = torch.randn(shape) * 0.05
        weights[f"{name}.bias"] = torch.randn(out) * 0.1
    return weights


CONVS = ((3, 32), (32, 64), (64, 128), (128, 256))
DECONVS = ((1024, 128, 5), (128, 64, 5), (64, 32, 6), (32, 3, 6))


def run_foreign_vae(w, image, z, fc="fc1"):
    x = image
    for i in range(4):
        x = F.relu(F.conv2d(x, w[f"encoder.conv{i + 1}.weight"], w[f"encoder.conv{i + 1}.bias"], 2))
    x = x.flatten(1)
    mu = F.linear(x, w["encoder.fc_mu.weight"], w["encoder.fc_mu.bias"])
    log_sigma = F.linear(x, w["encoder.fc_logsigma.weight"], w["encoder.fc_logsigma.bias"])
    y = F.relu(F.linear(z, w[f"decoder.{fc}.weight"], w[f"decoder.{fc}.bias"]))[..., None, None]
    for i in range(4):
        name = f"decoder.deconv{i + 1}"
        y = F.conv_transpose2d(y, w[f"{name}.weight"], w[f"{name}.bias"], 2)
        y = F.relu(y) if i < 3 else torch.sigmoid(y)
    return mu, log_sigma.exp(), y


@pytest.mark.parametrize("fc", ["fc1", "fc"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_vae_sees_the_same(fc, prefix):
    weights = foreign_vae(fc)
    vae, options = vae_from({prefix + name: value for name, value in weights.items()})
    image, z = torch.rand(2, 3, 64, 64), torch.randn(2, Z)
    mu, sigma, recon = run_foreign_vae(weights, image, z, fc)
    with torch.no_grad():
        ours, logvar = vae.encode(image)
        assert torch.allclose(ours, mu, atol=1e-5)
        assert torch.allclose((logvar / 2).exp(), sigma, rtol=1e-4)
        assert torch.allclose(vae.decode(z), recon, atol=1e-5)
    assert options["latent"] == Z and options["decoder_relu"]
    back = vae_to(vae)
    assert set(back) == set(foreign_vae("fc1"))
    assert all(torch.equal(back[k.replace("fc.", "fc1.")], v) for k, v in weights.items())


@pytest.mark.parametrize("cell", [False, True])
def test_an_mdn_rnn_predicts_the_same(cell):
    torch.manual_seed(0)
    lstm = torch.nn.LSTMCell(A + Z, R) if cell else torch.nn.LSTM(A + Z, R)
    head = torch.nn.Linear(R, (2 * Z + 1) * M + 2)
    weights = {f"rnn.{k}": v.detach() for k, v in lstm.state_dict().items()}
    weights |= {f"gmm_linear.{k}": v.detach() for k, v in head.state_dict().items()}
    rnn, options = rnn_from(weights)
    wanted = {"latent": Z, "action": A, "hidden": R, "mixtures": M, "mixture": "joint"}
    assert {k: options[k] for k in wanted} == wanted
    z, action = torch.randn(1, Z), torch.randn(1, A)
    with torch.no_grad():
        both = torch.cat([action, z], -1)  # the action comes first there
        h = lstm(both)[0] if cell else lstm(both[None])[0][0]
        out = head(h)[0]
        said = rnn.predict(rnn.step(rnn.features(z, action), rnn.initial(1))[0])
    assert torch.allclose(said.mean[0], out[: M * Z].view(M, Z), atol=1e-6)
    assert torch.allclose(said.log_std[0], out[M * Z : 2 * M * Z].view(M, Z), atol=1e-6)
    assert torch.allclose(said.logits[0], out[2 * M * Z : 2 * M * Z + M], atol=1e-6)
    assert torch.allclose(said.reward[0], out[-2], atol=1e-6)
    assert torch.allclose(said.done[0], out[-1], atol=1e-6)
    back = rnn_to(rnn)
    again, _ = rnn_from(back)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in rnn.state_dict().items())
    if not cell:
        assert all(torch.equal(back[k], v) for k, v in weights.items())


def test_what_cannot_be_converted_is_named():
    with pytest.raises(ValueError, match="expected a VAE with --vae.decoder_relu true"):
        vae_to(ConvVAE(Z))
    with pytest.raises(ValueError, match="the only kind that other code knows"):
        rnn_to(MDNRNN(Z, A, R, M))
    with pytest.raises(ValueError, match="expected weights of a VAE with 'encoder.conv1.weight'"):
        vae_from({"layer.weight": torch.zeros(1)})
    wrong = foreign_vae() | {"encoder.conv2.weight": torch.zeros(64, 32, 3, 3)}
    with pytest.raises(ValueError, match=r"expected convs.1.weight of the VAE of shape \(64, 32"):
        vae_from(wrong)
