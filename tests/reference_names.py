"""Maps the parameter names and layouts of the public JAX reference to ours."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastwm.config import DreamerConfig
from fastwm.spaces import Space

PREFIXES = {
    "enc": "world.encoder",
    "dec": "world.decoder",
    "dyn": "world.rssm",
    "rew": "world.reward",
    "con": "world.cont",
    "pol": "actor",
    "val": "critic.net",
    "slowval": "critic.slow",
}
LEAVES = {"kernel": "weight", "bias": "bias", "scale": "scale"}
RULES = [
    (r"enc/mlp(\d+)(norm)?", r"mlp.\1"),
    (r"enc/cnn(\d+)(norm)?", r"convs.\1"),
    (r"dec/mlp/(?:linear|norm)(\d+)", r"mlp.\1"),
    (r"dec/vec/(\w+)/(?:pred|logits)", r"heads.obs_\1"),
    (r"dec/sp0", r"from_deter"),
    (r"dec/sp1(norm)?", r"from_stoch.0"),
    (r"dec/sp2", r"from_stoch.1"),
    (r"dec/imgout", r"image_out"),
    (r"dyn/dynin0(norm)?", r"deter_in"),
    (r"dyn/dynin1(norm)?", r"stoch_in"),
    (r"dyn/dynin2(norm)?", r"action_in"),
    (r"dyn/dynhid(\d+)(norm)?", r"hidden.\1"),
    (r"dyn/dyngru", r"gru"),
    (r"dyn/obslogit", r"post_logit"),
    (r"dyn/obs(\d+)(norm)?", r"post.\1"),
    (r"dyn/priorlogit", r"prior_logit"),
    (r"dyn/prior(\d+)(norm)?", r"prior.\1"),
    (r"pol/head/action/stddev", r"heads.std"),
    (r"pol/head/action/(\w+)", r"heads.\1"),
    (r"pol/mlp/(?:linear|norm)(\d+)", r"mlp.\1"),
    (r"\w+/mlp/(?:linear|norm)(\d+)", r"mlp.\1"),
    (r"\w+/head/logits?", r"out"),
]


def our_name(name: str, stages: int) -> str:
    """Name of our parameter for a reference name such as `dyn/dynhid0norm/scale`."""
    path, leaf = name.rsplit("/", 1)
    prefix = PREFIXES[path.split("/")[0]]
    if path == "dec/spnorm":
        return f"{prefix}.scale"
    upsampling = re.fullmatch(r"dec/conv(\d+)(norm)?", path)
    if upsampling:  # the reference counts from the image inwards
        return f"{prefix}.convs.{stages - 2 - int(upsampling[1])}.{LEAVES[leaf]}"
    for pattern, ours in RULES:
        if re.fullmatch(pattern, path):
            return f"{prefix}.{re.sub(pattern, ours, path)}.{LEAVES[leaf]}"
    raise KeyError(name)


def our_layout(tensor: Tensor) -> Tensor:
    """Linear (in, out) -> (out, in); convolution HWIO -> OIHW; block kernels stay."""
    if tensor.dim() == 2:
        return tensor.t()
    if tensor.dim() == 4:
        return tensor.permute(3, 2, 0, 1)
    return tensor


def named(golden: dict[str, Tensor], group: str, stages: int) -> dict[str, Tensor]:
    """All tensors below `group/`, under our names and in our layout."""
    skip = ("retnorm/", "slowval_count/")
    out = {}
    for key, array in golden.items():
        name = key.removeprefix(f"{group}/")
        if name != key and not name.startswith(skip):
            out[our_name(name, stages)] = our_layout(array)
    return out


def load_parameters(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    params = dict(module.named_parameters())
    assert set(params) == set(tensors), set(params) ^ set(tensors)
    with torch.no_grad():
        for name, param in params.items():
            assert param.shape == tensors[name].shape, (name, param.shape, tensors[name].shape)
            param.copy_(tensors[name])


def spaces_of(golden: dict[str, Tensor]) -> tuple[dict[str, Space], Space]:
    """Observation and action spaces, read off the replay rows."""
    taken = {"reward", "is_first", "is_last", "is_terminal", "action", "consec", "stepid"}
    obs_space = {}
    for key, array in golden.items():
        name = key.removeprefix("data/")
        if name == key or name in taken or name.startswith("dyn/"):
            continue
        shape = array.shape[2:]
        obs_space[name] = Space("image" if array.dtype == torch.uint8 else "vector", shape)
    kernel = golden.get("params/pol/head/action/logits/kernel")
    if kernel is not None:
        return obs_space, Space("discrete", golden["data/action"].shape[2:], (kernel.shape[1],))
    return obs_space, Space("continuous", golden["data/action"].shape[2:])


def count(golden: dict[str, Tensor], pattern: str) -> int:
    return sum(bool(re.fullmatch(f"params/{pattern}/kernel", key)) for key in golden)


def replace_groups(imag_horizon: int, **groups: dict) -> DreamerConfig:
    """The default configuration with other values in some groups."""
    config = DreamerConfig()
    parts = {name: replace(getattr(config, name), **values) for name, values in groups.items()}
    return replace(config, imag_horizon=imag_horizon, **parts)


def channel_widths(weights: dict[str, Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels per stage of encoder and decoder, outermost first; weights by reference name."""
    stages = sum(bool(re.fullmatch(r"enc/cnn\d+/kernel", key)) for key in weights)
    if not stages:
        return (1,), (1,)
    encoder = tuple(weights[f"enc/cnn{i}/kernel"].shape[-1] for i in range(stages))
    decoder = tuple(weights[f"dec/conv{i}/kernel"].shape[-1] for i in range(stages - 1))
    return encoder, (*decoder, weights["dec/spnorm/scale"].shape[0])


def config_of(golden: dict[str, Tensor]) -> DreamerConfig:
    """The configuration whose networks have the sizes of the golden parameters."""

    def width(name: str, axis: int = -1, default: int = 8) -> int:
        array = golden.get(f"params/{name}/kernel")
        return default if array is None else array.shape[axis]

    stoch, classes = golden["data/dyn/stoch"].shape[2:]
    weights = {k.removeprefix("params/"): v for k, v in golden.items() if k.startswith("params/")}
    encoder_mults, decoder_mults = channel_widths(weights)
    decoder_units = width("dec/mlp/linear0", default=width("dec/sp1", default=16) // 2)
    return replace_groups(
        imag_horizon=int(golden["meta/imag_length"]),
        encoder=dict(
            depth=1,
            mults=encoder_mults,
            layers=count(golden, r"enc/mlp\d+") or 1,
            units=width("enc/mlp0"),
        ),
        decoder=dict(
            depth=1,
            mults=decoder_mults,
            layers=count(golden, r"dec/mlp/linear\d+") or 1,
            units=decoder_units,
            bspace=int(golden["meta/bspace"]),
        ),
        rssm=dict(
            deter=golden["data/dyn/deter"].shape[2],
            hidden=width("dyn/dynin0"),
            stoch=stoch,
            classes=classes,
            blocks=int(golden["meta/blocks"]),
            dynlayers=count(golden, r"dyn/dynhid\d+"),
            obslayers=count(golden, r"dyn/obs\d+"),
            imglayers=count(golden, r"dyn/prior\d+"),
        ),
        reward=dict(
            layers=count(golden, r"rew/mlp/linear\d+"),
            units=width("rew/mlp/linear0"),
            bins=width("rew/head/logits"),
        ),
        cont=dict(layers=count(golden, r"con/mlp/linear\d+"), units=width("con/mlp/linear0")),
        actor=dict(
            layers=count(golden, r"pol/mlp/linear\d+"), units=width("pol/mlp/linear0"), unimix=0.0
        ),
        critic=dict(
            layers=count(golden, r"val/mlp/linear\d+"),
            units=width("val/mlp/linear0"),
            bins=width("val/head/logits"),
        ),
    )
