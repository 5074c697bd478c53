"""The raw operators under the RSSM stem: schemas, fakes, and what they refuse."""

import pytest
import torch
from test_rssm import make_inputs, make_weights

from fastwm.ops import _rssm_sequence as sequence
from fastwm.ops import available
from fastwm.ops._backend import raw

fused_only = pytest.mark.skipif(not available("cpu"), reason="no compiled kernels")


def raw_arguments(sizes):
    """What the autograd node passes to the two raw loops."""
    weights, inputs = make_weights(**sizes), make_inputs(**sizes)
    inputs = {k: x.detach() for k, x in inputs.items()}
    flat = [x.detach() for x in sequence.flatten(weights)]
    batch, time = inputs["is_first"].shape
    action = torch.randn(batch, time, weights.deter_in[0].shape[1])
    token = torch.randn(batch, time, weights.deter_in[0].shape[0])
    dyn = len(weights.hidden)
    ahead = [flat, dyn, inputs["deter"], inputs["stoch"], action, token, inputs["is_first"],
             inputs["noise"], 0.01, True, False]  # fmt: skip
    saved = raw.rssm_scan(*ahead)
    grads = [torch.randn(x.shape) for x in saved[:2]] + [torch.randn(*inputs["noise"].shape, 5)]
    grads[1] = grads[1].view_as(grads[2])
    back = [flat, dyn, saved, inputs["deter"], inputs["is_first"], 0.01, *grads, False]
    return ahead, back


@fused_only
@pytest.mark.parametrize("sizes", [{}, {"dyn": 2, "obs": 2}], ids=str)
def test_opcheck(sizes):
    ahead, back = raw_arguments(sizes)
    torch.library.opcheck(raw.rssm_scan.default, tuple(ahead))
    torch.library.opcheck(raw.rssm_scan.default, (*ahead[:7], None, 0.01, False, False))
    torch.library.opcheck(raw.rssm_scan_backward.default, tuple(back))
    gates, bias, deter = torch.randn(4, 36), torch.randn(36), torch.randn(4, 12)
    torch.library.opcheck(raw.gru_gates.default, (gates, bias, deter, 3))


def step_arguments(count=5):
    """What a rollout of one step passes to its raw op."""
    weights, inputs = make_weights(imgs=1), make_inputs()
    heads = weights._replace(post=weights.prior, post_logit=weights.prior_logit)
    flat = [x.detach() for x in sequence.flatten(heads)]
    deters, stochs = torch.zeros(count, 2, 12), torch.zeros(count, 2, 3, 5)
    action, noise = torch.randn(count, 2), torch.rand(count, 3)
    assert inputs["stoch"].shape[1:] == stochs.shape[2:]
    packed = raw.rssm_pack(flat, 1, 3, False)
    return [packed, flat, 1, deters, stochs, action, None, noise, 0, 0.01]


@fused_only
def test_opcheck_of_the_step():
    args = step_arguments()
    torch.library.opcheck(raw.rssm_pack.default, (args[1], 1, 3, False))
    torch.library.opcheck(raw.rssm_step_.default, tuple(args))


@fused_only
def test_step_refuses_forged_input():
    args = step_arguments()
    places = [(0, lambda x: x[1:]), (3, lambda x: x[1:]), (3, lambda x: x.double()),
              (3, lambda x: x[:, ::2]), (4, lambda x: x[..., 1:]), (4, lambda x: x[:, :1]),
              (5, lambda x: x[:, 1:]), (7, lambda x: x[1:]), (8, lambda x: 1), (8, lambda x: -1),
              (6, lambda x: torch.zeros(1, 1)), (6, lambda x: torch.zeros(5, 8).double()),
              (2, lambda x: 0), (1, lambda x: x[:5])]  # fmt: skip
    for place, forge in places:
        forged = list(args)
        forged[place] = forge(args[place])
        with pytest.raises(RuntimeError, match="expected"):
            raw.rssm_step_(*forged)
    for hidden, groups in ((0, 3), (1, 0), (1, 4), (2, 3)):
        with pytest.raises(RuntimeError, match="expected"):
            raw.rssm_pack(args[1], hidden, groups, False)


@fused_only
def test_step_of_a_posterior_needs_its_tokens():
    weights, args = make_weights(), step_arguments()
    flat = [x.detach() for x in sequence.flatten(weights)]
    args[:3] = raw.rssm_pack(flat, len(weights.hidden), 3, False), flat, len(weights.hidden)
    with pytest.raises(RuntimeError, match="tokens' part"):
        raw.rssm_step_(*args)


@fused_only
def test_raw_ops_refuse_forged_input():
    """Every tensor in turn with a wrong shape, then with a wrong dtype: never a read outside."""
    for op, args in zip((raw.rssm_scan, raw.rssm_scan_backward), raw_arguments({}), strict=True):
        places = [(i, None) for i, x in enumerate(args) if isinstance(x, torch.Tensor)]
        places += [(i, j) for i, x in enumerate(args) if isinstance(x, list) for j in range(len(x))]
        unread = [(0, 6), (0, 7), (0, 8), (2, 2)]  # action_in, and the indices in the backward
        for i, j in places:
            if (i, j) in unread:
                continue
            for forge in (lambda x: x[1:], lambda x: x.long() if x.dtype != torch.bool
                          else x.float()):  # fmt: skip
                forged = list(args)
                forged[i] = (
                    forge(args[i])
                    if j is None
                    else [forge(x) if k == j else x for k, x in enumerate(args[i])]
                )
                with pytest.raises(RuntimeError, match="expected"):
                    op(*forged)
        with pytest.raises(RuntimeError, match="expected weights of"):
            op(args[0][:-1], *args[1:])
        with pytest.raises(RuntimeError, match="expected weights of"):
            op(args[0], 7, *args[2:])
    gates, bias, deter = torch.randn(4, 36), torch.randn(36), torch.randn(4, 12)
    for wrong in ((gates[1:], bias, deter, 3), (gates, bias[1:], deter, 3)):
        with pytest.raises(RuntimeError, match="expected"):
            raw.gru_gates(*wrong)
    with pytest.raises(RuntimeError, match="multiple of the blocks"):
        raw.gru_gates(gates, bias, deter, 5)
