"""Weights of other PyTorch World Models code (ctallec/world-models, torchwm), to and from ours.

What differs there: the VAE's second head is log sigma, half of our log-variance, and its decoder
has one more activation; the LSTM reads the action before the latent; the mixture is the joint one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastwm.worldmodels.ha import MDNRNN, ConvVAE

Weights = dict[str, Tensor]
_LAYERS = (
    *((f"encoder.conv{i + 1}", f"convs.{i}") for i in range(4)),
    *((f"decoder.deconv{i + 1}", f"deconvs.{i}") for i in range(4)),
    ("encoder.fc_mu", "mu"),
    ("encoder.fc_logsigma", "logvar"),
    ("decoder.fc1", "expand"),
)
_LSTM = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def is_foreign(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a VAE or MDN-RNN under the names of other code."""
    return any(name.startswith(("encoder.", "rnn.", "gmm_linear.")) for name in bare(weights))


def bare(weights: Mapping[str, Tensor]) -> Weights:
    """Without the prefixes that torch.compile and DataParallel put before every name."""
    return {
        name.removeprefix("_orig_mod.").removeprefix("module."): value
        for name, value in weights.items()
    }


def vae_from(weights: Mapping[str, Tensor]) -> tuple[ConvVAE, dict[str, Any]]:
    """A ConvVAE with these weights, and its options. ValueError for what does not fit."""
    found = bare(weights)
    found = {name.replace("decoder.fc.", "decoder.fc1."): value for name, value in found.items()}
    ours: Weights = {}
    for theirs, name in _LAYERS:
        for kind in ("weight", "bias"):
            value = _take(found, f"{theirs}.{kind}", "VAE")
            ours[f"{name}.{kind}"] = 2 * value if name == "logvar" else value
    vae = ConvVAE(len(ours["mu.bias"]), ours["convs.0.weight"].shape[1], decoder_relu=True)
    _load(vae, ours, "VAE")
    return vae, vae.options()


def vae_to(vae: ConvVAE) -> Weights:
    """The weights under the names of ctallec/world-models."""
    if not vae.decoder_relu:
        raise ValueError(
            "convert: expected a VAE with --vae.decoder_relu true, which other code has built in, "
            "got one without; train one with it to export it"
        )
    ours = vae.state_dict()
    return {
        f"{theirs}.{kind}": ours[f"{name}.{kind}"] / (2 if name == "logvar" else 1)
        for theirs, name in _LAYERS
        for kind in ("weight", "bias")
    }


def rnn_from(weights: Mapping[str, Tensor]) -> tuple[MDNRNN, dict[str, Any]]:
    """An MDN-RNN of the joint mixture, from the weights of an LSTM or of an LSTMCell."""
    found = {name.replace("_l0", ""): value for name, value in bare(weights).items()}
    lstm = {name: _take(found, f"rnn.{name}", "MDN-RNN") for name in _LSTM}
    head = {kind: _take(found, f"gmm_linear.{kind}", "MDN-RNN") for kind in ("weight", "bias")}
    latent, mixtures = _sizes(len(head["bias"]), lstm["weight_ih"].shape[1])
    hidden = lstm["weight_hh"].shape[1]
    action = lstm["weight_ih"].shape[1] - latent
    rnn = MDNRNN(latent, action, hidden, mixtures, "joint", reward=True, done=True)
    order = _input_order(action, latent)
    lstm["weight_ih"] = lstm["weight_ih"][:, order]
    ours = {f"lstm.{name}_l0": value for name, value in lstm.items()}
    _load(rnn, ours | {f"head.{kind}": value for kind, value in head.items()}, "MDN-RNN")
    return rnn, rnn.options()


def rnn_to(rnn: MDNRNN) -> Weights:
    """The weights under the names of ctallec/world-models."""
    if rnn.mixture != "joint" or not (rnn.reward and rnn.done) or rnn.restart:
        raise ValueError(
            "convert: expected an MDN-RNN with --rnn.mixture joint --rnn.reward true --rnn.done "
            f"true --rnn.restart false, the only kind that other code knows, got {rnn.options()}"
        )
    ours = rnn.state_dict()
    back = torch.argsort(torch.tensor(_input_order(rnn.action, rnn.latent)))
    lstm = {f"rnn.{name}_l0": ours[f"lstm.{name}_l0"] for name in _LSTM}
    lstm["rnn.weight_ih_l0"] = lstm["rnn.weight_ih_l0"][:, back]
    return lstm | {f"gmm_linear.{kind}": ours[f"head.{kind}"] for kind in ("weight", "bias")}


def _input_order(action: int, latent: int) -> list[int]:
    """Columns of (action, latent) in the order (latent, action)."""
    return [*range(action, action + latent), *range(action)]


def _sizes(outputs: int, inputs: int) -> tuple[int, int]:
    """(Z, M) of a head with (2 Z + 1) M + 2 outputs, whose LSTM reads Z + A numbers.

    Several pairs may fit; other code has 5 components and 32 latents unless it is told otherwise,
    and an action is narrower than a latent.
    """
    pairs = [
        (latent, (outputs - 2) // (2 * latent + 1))
        for latent in range(inputs - 1, 0, -1)
        if (outputs - 2) % (2 * latent + 1) == 0
    ]
    usual = [pair for pair in pairs if pair[1] == 5] or [pair for pair in pairs if pair[0] == 32]
    if not pairs:
        raise ValueError(
            f"convert: expected an MDN-RNN with (2 Z + 1) M + 2 outputs, got {outputs} outputs "
            f"and {inputs} inputs"
        )
    return (usual or pairs)[0]


def _take(found: Weights, name: str, what: str) -> Tensor:
    if name not in found:
        raise ValueError(
            f"convert: expected weights of a {what} with {name!r}, got {sorted(found)[:6]}"
        )
    return found[name].float()


def _load(module: torch.nn.Module, weights: Weights, what: str) -> None:
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for name, value in weights.items():
        if tuple(value.shape) != shapes[name]:
            raise ValueError(
                f"convert: expected {name} of the {what} of shape {shapes[name]}, got "
                f"{tuple(value.shape)}"
            )
    module.load_state_dict(weights)
