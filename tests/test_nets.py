"""Encoder and decoder against the goldens, and initialisation."""

from __future__ import annotations

import math
import re

import pytest
import torch
from reference_names import channel_widths, our_layout, our_name

from fastwm.distributions import image_mse, multi_categorical_loss, symlog_mse
from fastwm.nets import BlockLinear, Conv, Decoder, Encoder, Linear, select_keys
from fastwm.spaces import Space


@pytest.fixture
def case(golden):
    data = golden("dreamerv3_head_pieces")
    head = "encdec/pool/"
    data = {k.removeprefix(head): v for k, v in data.items() if k.startswith(head)}
    classes = data["w/dec/vec/disc/logits/kernel"].shape[1]
    obs_space = {
        "image": Space("image", data["obs/image"].shape[2:]),
        "vec": Space("vector", data["obs/vec"].shape[2:]),
        "disc": Space("discrete", data["obs/disc"].shape[2:], (classes,)),
    }
    weights = {k.removeprefix("w/"): v for k, v in data.items() if k.startswith("w/")}
    encoder_mults, decoder_mults = channel_widths(weights)
    stages = len(encoder_mults)
    layers = sum(bool(re.fullmatch(r"w/enc/mlp\d+/kernel", key)) for key in data)
    units = data["w/enc/mlp0/kernel"].shape[1]
    shared = {"depth": 1, "layers": layers, "units": units, "kernel": 5}
    encoder = Encoder(obs_space, symlog=True, mults=encoder_mults, **shared)
    deter, stoch = data["feat/deter"].shape[-1], data["feat/stoch"].shape[-2:].numel()
    bspace = data["w/dec/sp0/kernel"].shape[0]
    more = {"mults": decoder_mults, "bspace": bspace, "outscale": 1.0}
    decoder = Decoder(obs_space, deter, stoch, **more, **shared)
    for prefix, module in (("enc", encoder), ("dec", decoder)):
        tensors = {
            our_name(key, stages).split(".", 2)[2]: our_layout(value)
            for key, value in weights.items()
            if key.startswith(f"{prefix}/")
        }
        module.load_state_dict(tensors)
    return data, encoder, decoder


def test_encoder_matches(case, close):
    data, encoder, _ = case
    obs = {key: data[f"obs/{key}"] for key in ("image", "vec", "disc")}
    close(encoder(obs), data["tokens"], atol=2e-5)


def test_decoder_matches(case, close):
    data, _, decoder = case
    recon = decoder(data["feat/deter"], data["feat/stoch"].flatten(-2))
    for key in ("vec", "disc", "image"):
        close(recon[key], data[f"rec/{key}"], atol=5e-5)
    classes = decoder.space["disc"].classes
    losses = {
        "vec": symlog_mse(recon["vec"], data["obs/vec"], 1),
        "disc": multi_categorical_loss(recon["disc"], data["obs/disc"], classes),
        "image": image_mse(recon["image"], data["obs/image"]),
    }
    for key, loss in losses.items():
        close(loss, data[f"loss/{key}"], rtol=2e-5)


@pytest.mark.parametrize("outscale", [1.0, 0.01, 0.0])
def test_initial_deviation_is_that_of_the_fan_in(outscale):
    torch.manual_seed(0)
    std = Linear(400, 500, outscale=outscale).weight.std().item()
    assert std == pytest.approx(outscale / math.sqrt(400), rel=0.02)


def test_initial_deviation_of_blocks_counts_all_inputs():
    torch.manual_seed(0)
    assert BlockLinear(400, 800, 8).weight.std().item() == pytest.approx(0.05, rel=0.03)
    assert Conv(16, 64, 5).weight.std().item() == pytest.approx(1 / 20, rel=0.03)


def test_block_linear_mixes_only_within_blocks():
    layer = BlockLinear(8, 12, 4)
    x = torch.randn(3, 2, 8)
    other = x.clone()
    other[..., 2:4] += 1.0
    changed = (layer(x) != layer(other)).reshape(-1, 12).any(0)
    assert changed.tolist() == [False] * 3 + [True] * 3 + [False] * 6
    dense = torch.block_diag(*layer.weight)
    torch.testing.assert_close(layer(x), x @ dense + layer.bias)


def test_block_linear_refuses_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="divisible by blocks = 3, got 8 -> 12"):
        BlockLinear(8, 12, 3)


def test_images_of_different_sizes_are_refused():
    spaces = {"a": Space("image", (64, 64, 3)), "b": Space("image", (32, 32, 3))}
    with pytest.raises(ValueError, match="all images of one height and width"):
        Encoder(spaces, depth=2, mults=(1, 2), layers=1, units=4, kernel=5, symlog=True)


def test_observation_keys_may_hold_dots_and_method_names():
    spaces = {"robot.arm": Space("vector", (3,)), "keys": Space("vector", (2,))}
    shared = {"depth": 2, "mults": (1,), "layers": 1, "units": 4, "kernel": 5}
    decoder = Decoder(spaces, 8, 6, bspace=2, outscale=1.0, **shared)
    out = decoder(torch.zeros(5, 8), torch.zeros(5, 6))
    assert {key: tuple(x.shape) for key, x in out.items()} == {"robot.arm": (5, 3), "keys": (5, 2)}


def test_observations_are_chosen_by_regular_expression():
    obs_space = {
        "image": Space("image", (16, 16, 3)),
        "map": Space("image", (16, 16, 1)),
        "position": Space("vector", (2,)),
        "velocity": Space("vector", (3,)),
    }
    assert list(select_keys(obs_space, ".*", ".*")) == list(obs_space)
    assert list(select_keys(obs_space, "image", "$^")) == ["image"]
    assert list(select_keys(obs_space, "$^", "pos|vel")) == ["position", "velocity"]
    assert list(select_keys(obs_space, "ma", "osition")) == ["map"]  # from the beginning
    with pytest.raises(ValueError, match="expected regular expressions"):
        select_keys(obs_space, "(", ".*")
    sizes = {"depth": 2, "mults": (1, 2), "layers": 1, "units": 8, "kernel": 5}
    encoder = Encoder(obs_space, symlog=True, **sizes, cnn_keys="$^", mlp_keys="position")
    tokens = encoder({"position": torch.zeros(1, 1, 2)})  # nothing else is looked at
    assert tokens.shape == (1, 1, 8)
    with pytest.raises(ValueError, match="at least one observation"):
        Encoder(obs_space, symlog=True, **sizes, cnn_keys="$^", mlp_keys="$^")
