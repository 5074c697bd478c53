"""The RSSM op stem: goldens, parity with the reference, semantics, errors."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fastwm.ops import rssm as R

GOLDEN = Path(os.environ.get("FASTWM_GOLDEN") or Path(__file__).parents[1] / "golden")


def golden_weights(arrays):
    """RSSMWeights and its leaves by the reference names; Linear kernels there are (in, out)."""
    leaves = {}

    def get(name):
        return torch.tensor(arrays[f"rssm/w/dyn/{name}"]).requires_grad_()

    def layer(name):
        leaf = [get(f"{name}/kernel"), get(f"{name}/bias")]
        if f"rssm/w/dyn/{name}norm/scale" in arrays:
            leaf.append(get(f"{name}norm/scale"))
        leaves[name] = leaf
        return (leaf[0].T if leaf[0].ndim == 2 else leaf[0], *leaf[1:])

    def stack(name):
        count = sum(f"rssm/w/dyn/{name}{i}/kernel" in arrays for i in range(9))
        return tuple(layer(f"{name}{i}") for i in range(count))

    weights = R.RSSMWeights(
        layer("dynin0"), layer("dynin1"), layer("dynin2"), stack("dynhid"), layer("dyngru"),
        stack("obs"), layer("obslogit"), stack("prior"), layer("priorlogit"))
    return weights, leaves


@pytest.fixture(scope="module")
def pieces():
    path = GOLDEN / "dreamerv3_head_pieces.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return dict(np.load(path))


def close(actual, expected, rtol=5e-5, who=""):
    actual, expected = torch.as_tensor(actual).detach(), torch.as_tensor(expected).detach()
    assert actual.shape == expected.shape, who
    if not expected.numel():
        return
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    assert error <= rtol, f"{who}: {error:.3g}"


def test_golden_step_gradients(pieces):
    """The gradients of one step for the golden's cotangent, without resets."""
    weights, leaves = golden_weights(pieces)
    deter, stoch, action = (
        torch.tensor(pieces[f"rssm/{k}"]).requires_grad_() for k in ("deter", "stoch", "action"))
    out = R.gru_step(weights, deter, stoch.flatten(1), action)
    out.backward(torch.tensor(pieces["rssm/core_cot"]))
    close(deter.grad, pieces["rssm/g_deter"], who="g_deter")
    close(stoch.grad, pieces["rssm/g_stoch"], who="g_stoch")
    close(action.grad, pieces["rssm/g_action"], who="g_action")
    for key in (k for k in pieces if k.startswith("rssm/gw/dyn/")):
        name, kind = key.removeprefix("rssm/gw/dyn/").split("/")
        part = ["kernel", "bias", "scale"].index(kind)
        close(leaves[name.removesuffix("norm")][part].grad, pieces[key], who=key)


def test_golden_observe(pieces):
    """One step of the sequence, with the golden's reset: deter, posterior and prior logits."""
    weights, _ = golden_weights(pieces)
    deter, stoch, action, tokens, reset = (
        torch.tensor(pieces[f"rssm/{k}"])
        for k in ("deter", "stoch", "action", "tokens", "reset"))
    out, logits, sample = R.rssm_observe(
        weights, deter, stoch, tokens[:, None], action[:, None], reset[:, None])
    close(out[:, 0], pieces["rssm/out_deter"], who="deter")
    close(logits[:, 0], pieces["rssm/out_post"], who="post")
    assert torch.equal(sample.argmax(-1), logits.argmax(-1))
    prior = R.rssm_prior(weights, out[:, 0], stoch.shape[1])
    close(prior, pieces["rssm/out_prior"], who="prior")
