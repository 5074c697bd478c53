"""The RSSM op stem: goldens, parity with the reference, semantics, errors."""

import pytest
import torch

from fastwm.ops import rssm as R


def golden_weights(arrays):
    """RSSMWeights and its leaves by the reference names; Linear kernels there are (in, out)."""
    leaves = {}

    def get(name):
        return arrays[f"rssm/w/dyn/{name}"].clone().requires_grad_()

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
        layer("dynin0"),
        layer("dynin1"),
        layer("dynin2"),
        stack("dynhid"),
        layer("dyngru"),
        stack("obs"),
        layer("obslogit"),
        stack("prior"),
        layer("priorlogit"),
    )
    return weights, leaves


STATES = ("deter", "stoch", "tokens", "prev_action")
# Odd sizes, every layer count, one block, one class, one row, one step, more rows than a tile.
CASES = {
    "odd": {},
    "layers": {"dyn": 3, "obs": 2, "imgs": 1, "K": 6},
    "deep": {"dyn": 2, "obs": 3, "G": 1, "U": 5},
    "one-of-each": {"B": 1, "T": 1, "K": 1, "S": 1, "A": 1, "E": 1, "D": 3, "U": 2},
    "wide": {"B": 19, "T": 4, "D": 96, "G": 2, "U": 33, "S": 5, "K": 16, "E": 40},
    "aligned": {"B": 16, "T": 3, "D": 64, "G": 4, "U": 32, "S": 8, "K": 4},
}


def make_weights(D=12, U=7, S=3, K=5, A=2, E=4, G=3, dyn=1, obs=1, imgs=2, **_):
    """Random weights whose layers neither die nor saturate."""

    def leaf(*shape):
        return (torch.randn(*shape) * 1.5 / shape[-1] ** 0.5).requires_grad_()

    def layer(out, into):
        return leaf(out, into), leaf(out), (1 + 0.3 * torch.randn(out)).requires_grad_()

    def blocks(into, out):
        return leaf(G, into, out // G), leaf(out)

    d = D // G
    return R.RSSMWeights(
        layer(U, D),
        layer(U, S * K),
        layer(U, A),
        tuple((*blocks(d if i else d + 3 * U, D), layer(D, 1)[2]) for i in range(dyn)),
        blocks(d, 3 * D),
        tuple(layer(U, U if i else D + E) for i in range(obs)),
        layer(S * K, U)[:2],
        tuple(layer(U, U if i else D) for i in range(imgs)),
        layer(S * K, U)[:2],
    )


def make_inputs(B=3, T=5, D=12, S=3, K=5, A=2, E=4, **_):
    index = torch.randint(K, (B, S))
    first = torch.rand(B, T) < 0.3
    first[0, 0] = True
    return {
        "deter": torch.randn(B, D).requires_grad_(),
        "stoch": torch.nn.functional.one_hot(index, K).float().requires_grad_(),
        "tokens": torch.randn(B, T, E).requires_grad_(),
        "prev_action": (2 * torch.randn(B, T, A)).requires_grad_(),
        "is_first": first,
        "noise": torch.rand(B, T, S),
    }


def names(weights):
    """{"hidden[0][1]": tensor, ...} of everything the posterior sequence reads."""
    out = {}
    for field, value in weights._asdict().items():
        layers = (
            {field: value}
            if isinstance(value[0], torch.Tensor)
            else {f"{field}[{i}]": layer for i, layer in enumerate(value)}
        )
        out |= {f"{name}[{i}]": x for name, layer in layers.items() for i, x in enumerate(layer)}
    return out


def double(weights, inputs):
    """The same leaves in float64."""

    def wide(x):
        if x is None:
            return None
        return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x

    def layers(value):
        return wide(value) if isinstance(value, torch.Tensor) else tuple(map(layers, value))

    return R.RSSMWeights(*map(layers, weights)), {k: wide(x) for k, x in inputs.items()}


def away_from_edges(weights, inputs, unimix=0.01):
    """Moves each noise to the middle of the bin it falls into, so that rounding cannot flip it."""
    wide, args = double(weights, inputs)
    with torch.no_grad():
        for t in range(args["noise"].shape[1]):
            until = {k: x[:, : t + 1] if k not in STATES[:2] else x for k, x in args.items()}
            _, logits, stoch = R.rssm_observe_ref(wide, **until, unimix=unimix)
            probs = (1 - unimix) * logits[:, t].softmax(-1) + unimix / logits.shape[-1]
            index = stoch[:, t].argmax(-1, keepdim=True)
            middle = (probs.cumsum(-1) - probs / 2).gather(-1, index).squeeze(-1)
            args["noise"][:, t] = middle
            inputs["noise"][:, t] = middle.float()
    return inputs


def all_gradients(function, weights, inputs, cotangents, **options):
    leaves = {k: x for k, x in names(weights).items() if not k.startswith("prior")}
    leaves |= {k: inputs[k] for k in STATES}
    out = function(weights, **inputs, **options)
    loss = sum((x * c.to(x.dtype)).sum() for x, c in zip(out, cotangents, strict=True))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return out, dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["sample", "mode"])
def test_observe_matches_reference(case, mode, variant, near):
    weights, inputs = make_weights(**CASES[case]), make_inputs(**CASES[case])
    inputs = away_from_edges(weights, inputs)
    if mode == "mode":
        inputs["noise"] = None
    wide, args = double(weights, inputs)
    with torch.no_grad():
        cotangents = [torch.randn(x.shape) for x in R.rssm_observe_ref(wide, **args)]
    expected, expected_grads = all_gradients(R.rssm_observe_ref, wide, args, cotangents)
    actual, grads = all_gradients(R.rssm_observe, weights, inputs, cotangents)
    for name, got, want in zip(("deter", "logits", "stoch"), actual, expected, strict=True):
        near(got, want, rtol=1e-5, who=name)
    assert torch.equal(actual[2].detach().sum(-1), torch.ones(actual[2].shape[:-1]))
    for name, want in expected_grads.items():
        near(grads[name], want, rtol=1e-4, who=name)
    with torch.no_grad():  # the path that saves nothing
        for got, want in zip(R.rssm_observe(weights, **inputs), actual, strict=True):
            near(got, want, rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_hoisted_equals_loop_in_float64(case, near):
    """The hoisting is exact: what is left is rounding of float64."""
    weights, inputs = double(make_weights(**CASES[case]), make_inputs(**CASES[case]))
    with torch.no_grad():
        cotangents = [torch.randn_like(x) for x in R.rssm_observe_ref(weights, **inputs)]
    expected, expected_grads = all_gradients(R.rssm_observe_ref, weights, inputs, cotangents)
    actual, grads = all_gradients(R.rssm_observe, weights, inputs, cotangents)
    for got, want in zip(actual, expected, strict=True):
        near(got, want, rtol=1e-12)
    for name, want in expected_grads.items():
        near(grads[name], want, rtol=1e-12, who=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["sample", "mode"])
def test_imagine_matches_reference(case, mode, variant, near):
    """Values along the rollout; the policy is called at every state, the last one included."""
    weights, sizes = make_weights(**CASES[case]), {"T": 3} | CASES[case]
    inputs, calls = make_inputs(**sizes), []
    project = torch.randn(inputs["deter"].shape[1], weights.action_in[0].shape[1]).double()
    noise = torch.rand(3, len(inputs["deter"]), inputs["stoch"].shape[1]).double()
    noise = noise if mode == "sample" else None

    def policy(deter, stoch):
        calls.append(stoch)
        return deter @ project.to(deter.dtype) + stoch.sum((1, 2))[:, None]

    wide, args = double(weights, inputs)
    start = (args["deter"].detach(), args["stoch"].detach())
    expected = R.rssm_imagine_ref(wide, *start, policy, 3, noise)
    narrow = [x.float() for x in start]
    actual = R.rssm_imagine(weights, *narrow, policy, 3, None if noise is None else noise.float())
    assert len(calls) == 8
    assert [x.shape for x in actual] == [x.shape for x in expected]
    assert not any(x.requires_grad for x in actual)
    same = (actual[1] == expected[1]).flatten(1).all(1)  # a draw at the edge of a bin may flip
    assert same.float().mean() > 0.9 if len(same) > 10 else same.all()
    for got, want in zip(actual, expected, strict=True):
        near(got[same], want[same], rtol=1e-4)
    for got, want in zip(actual[:2], narrow, strict=True):
        assert torch.equal(got[:, 0], want)


def test_imagine_under_autocast(variant, near):
    """Products in bfloat16, states in float32."""
    weights, inputs = make_weights(), make_inputs()
    project = torch.randn(12, 2)

    def roll():
        return R.rssm_imagine(
            weights, inputs["deter"], inputs["stoch"], lambda d, s: (d @ project).float(), 1
        )

    plain = roll()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = roll()
    assert low[0].dtype == torch.float32
    near(low[0], plain[0], rtol=3e-2)


def test_imagine_bad_input(variant):
    weights, inputs = make_weights(), make_inputs()
    args = (weights, inputs["deter"], inputs["stoch"], lambda d, s: d[:, :2])
    with pytest.raises(ValueError, match=r"noise of shape \(length, N, S\) = \(2, 3, 3\)"):
        R.rssm_imagine(*args, 2, torch.rand(3, 3, 3))
    with pytest.raises(ValueError, match="length >= 0"):
        R.rssm_imagine(*args, -1)
    with pytest.raises(ValueError, match=r"deter of shape \(N, D\) = \(3, 12\)"):
        R.rssm_imagine(weights, inputs["deter"][:, 1:], *args[2:], 1)
    with pytest.raises(ValueError, match="groups to divide"):
        R.rssm_prior(weights, inputs["deter"], 4)


@pytest.mark.parametrize("case", CASES)
def test_step_and_prior_match_reference(case, variant, near):
    """The ops that stand alone, with and without gradient."""
    weights, inputs = make_weights(**CASES[case]), make_inputs(**CASES[case])
    wide, args = double(weights, inputs)
    groups = inputs["stoch"].shape[1]
    state = [inputs["deter"], inputs["stoch"].flatten(1), inputs["prev_action"][:, 0]]
    other = [args["deter"], args["stoch"].flatten(1), args["prev_action"][:, 0]]
    expected = R.gru_step_ref(wide, *other)
    near(R.gru_step(weights, *state), expected)
    with torch.no_grad():
        near(R.gru_step(weights, *state), expected)
    prior = R.rssm_prior(weights, inputs["deter"], groups)
    wanted = R.rssm_prior_ref(wide, args["deter"], groups)
    near(prior, wanted)
    leaves = [(n, x, names(wide)[n]) for n, x in names(weights).items() if n.startswith("prior")]
    cotangent = torch.randn(prior.shape)
    grads = torch.autograd.grad((prior * cotangent).sum(), [x for _, x, _ in leaves])
    wants = torch.autograd.grad((wanted * cotangent).sum(), [x for _, _, x in leaves])
    for (name, _, _), got, want in zip(leaves, grads, wants, strict=True):
        near(got, want, rtol=1e-4, who=name)


@pytest.mark.parametrize("batch, time", [(0, 5), (3, 0)])
def test_observe_of_nothing(batch, time, variant):
    weights, inputs = make_weights(), {k: x.detach()[:batch] for k, x in make_inputs().items()}
    inputs = {k: x if k in STATES[:2] else x[:, :time] for k, x in inputs.items()}
    out = R.rssm_observe(weights, **inputs)
    assert [x.shape[2:] for x in out] == [(12,), (3, 5), (3, 5)]
    assert all(x.shape[:2] == (batch, time) for x in out)


def test_sequence_equals_single_steps(variant, near):
    weights, inputs = make_weights(), make_inputs()
    inputs["is_first"][:] = False
    whole = R.rssm_observe(weights, **inputs)
    deter, stoch = inputs["deter"], inputs["stoch"]
    for t in range(5):
        step = {k: inputs[k][:, t : t + 1] for k in ("tokens", "prev_action", "is_first", "noise")}
        alone = R.gru_step(weights, deter, stoch.flatten(1), inputs["prev_action"][:, t])
        out = R.rssm_observe(weights, deter, stoch, **step)
        deter, stoch = out[0][:, 0], out[2][:, 0]
        near(alone, deter)
        for got, want in zip(out, whole, strict=True):
            near(got[:, 0], want[:, t])


@pytest.mark.parametrize("first", [[0], [2], [2, 3], [0, 1, 4]], ids=str)
def test_an_episode_never_reaches_the_next(first, variant):
    """Whatever lies before a reset, outputs and gradients after it are bit-equal."""
    weights, inputs = make_weights(), make_inputs()
    inputs["is_first"][:] = False
    inputs["is_first"][:, first] = True
    last = max(first)
    runs = []
    for other in (False, True):
        args = {k: x.detach().clone() for k, x in inputs.items()}
        if other:
            garbage = float("nan") if 0 in first else 7.0
            args["deter"].fill_(garbage)
            args["stoch"].fill_(garbage)
            args["tokens"][:, :last] += 3
            args["prev_action"][:, : last + 1] = float("nan")
            args["prev_action"][:, :last] = 9
        args["tokens"].requires_grad_()
        out = R.rssm_observe(weights, **args)
        loss = sum((x[:, last:] * x[:, last:].detach().cos()).sum() for x in out)
        tokens, weight = torch.autograd.grad(loss, [args["tokens"], weights.stoch_in[0]])
        assert not tokens[:, :last].any()
        runs.append([*(x[:, last:] for x in out), tokens[:, last:], weight])
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)


def test_two_runs_are_bit_equal(variant):
    weights, inputs = make_weights(**CASES["wide"]), make_inputs(**CASES["wide"])
    runs = []
    for _ in range(2):
        out = R.rssm_observe(weights, **inputs)
        loss = sum((x * x).sum() for x in out[:2])
        runs.append([*out, *torch.autograd.grad(loss, weights.gru + weights.stoch_in)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_any_number_of_threads_gives_the_same_bits(near):
    """Large enough for a team of workers; its result may not depend on who computes what."""
    sizes = {"B": 21, "T": 3, "D": 512, "U": 64, "S": 8, "K": 4, "G": 8, "obs": 2, "dyn": 2}
    weights, inputs = make_weights(**sizes), make_inputs(**sizes)
    threads, runs, rolls = torch.get_num_threads(), [], []
    start = (torch.randn(150, 512), inputs["stoch"].detach()[:1].expand(150, -1, -1))
    noise = torch.rand(2, 150, 8)
    cotangents = [torch.randn(x.shape) for x in R.rssm_observe(weights, **inputs)]
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            runs.append(all_gradients(R.rssm_observe, weights, inputs, cotangents))
            rolls.append(R.rssm_imagine(weights, *start, lambda d, s: d[:, :2], 2, noise))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in rolls for a, b in zip(r, rolls[0], strict=True))
    for outputs, grads in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs, runs[0][0], strict=True))
        for name, grad in grads.items():  # products of the library may split their sums
            near(grad, runs[0][1][name], who=name)


def test_observe_fullgraph_compile(variant, near):
    torch._dynamo.reset()
    weights, inputs = make_weights(), make_inputs(T=2)
    inputs = away_from_edges(weights, inputs)
    compiled = torch.compile(R.rssm_observe, fullgraph=True, backend="aot_eager")
    cotangents = [torch.randn(x.shape) for x in R.rssm_observe(weights, **inputs)]
    expected, expected_grads = all_gradients(R.rssm_observe, weights, inputs, cotangents)
    actual, grads = all_gradients(compiled, weights, inputs, cotangents)
    for got, want in zip(actual, expected, strict=True):
        near(got, want)
    for name, want in expected_grads.items():
        near(grads[name], want, who=name)


def test_autocast_changes_nothing(variant):
    weights, inputs = make_weights(), make_inputs()
    plain = R.rssm_observe(weights, **inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = R.rssm_observe(weights, **inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_strides_and_low_precision_inputs(variant, near):
    weights, inputs = make_weights(), make_inputs()
    expected = R.rssm_observe(weights, **inputs)
    strided = {k: x.transpose(0, 1).contiguous().transpose(0, 1) for k, x in inputs.items()}
    strided["deter"] = inputs["deter"].detach().repeat_interleave(2, 1)[:, ::2]
    for got, want in zip(R.rssm_observe(weights, **strided), expected, strict=True):
        near(got, want, rtol=1e-6)
    low = inputs | {"tokens": inputs["tokens"].detach().bfloat16()}
    assert all(x.dtype == torch.float32 for x in R.rssm_observe(weights, **low))


def test_observe_bad_input(variant):
    weights, inputs = make_weights(), make_inputs()

    def call(**other):
        return R.rssm_observe(weights, **(inputs | other))

    with pytest.raises(ValueError, match=r"tokens of shape \(B, T, E\) = \(3, 5, 4\), got"):
        call(tokens=inputs["tokens"][:, 1:])
    with pytest.raises(ValueError, match=r"deter of shape \(B, D\) = \(3, 12\)"):
        call(deter=inputs["deter"][:, 1:])
    with pytest.raises(ValueError, match=r"noise of shape \(B, T, S\)"):
        call(noise=inputs["noise"][..., 1:])
    with pytest.raises(ValueError, match="unimix in"):
        call(unimix=1.5)
    with pytest.raises(TypeError, match="is_first of dtype bool"):
        call(is_first=inputs["is_first"].float())
    with pytest.raises(TypeError, match="tokens of dtype a floating type, got int64"):
        call(tokens=inputs["tokens"].long())
    short = (weights.gru[0][:, 1:], weights.gru[1])
    with pytest.raises(ValueError, match=r"weights.gru\[0\] of shape"):
        R.rssm_observe(weights._replace(gru=short), **inputs)


def test_golden_step_gradients(golden, variant, near):
    """The gradients of one step for the golden's cotangent, without resets."""
    pieces = golden("dreamerv3_head_pieces")
    weights, leaves = golden_weights(pieces)
    deter, stoch, action = (
        pieces[f"rssm/{k}"].clone().requires_grad_() for k in ("deter", "stoch", "action")
    )
    out = R.gru_step(weights, deter, stoch.flatten(1), action)
    out.backward(pieces["rssm/core_cot"])
    near(deter.grad, pieces["rssm/g_deter"], who="g_deter")
    near(stoch.grad, pieces["rssm/g_stoch"], who="g_stoch")
    near(action.grad, pieces["rssm/g_action"], who="g_action")
    for key in (k for k in pieces if k.startswith("rssm/gw/dyn/")):
        name, kind = key.removeprefix("rssm/gw/dyn/").split("/")
        part = ["kernel", "bias", "scale"].index(kind)
        near(leaves[name.removesuffix("norm")][part].grad, pieces[key], who=key)


def test_golden_observe(golden, variant, near):
    """One step of the sequence, with the golden's reset: deter, posterior and prior logits."""
    pieces = golden("dreamerv3_head_pieces")
    weights, _ = golden_weights(pieces)
    deter, stoch, action, tokens, reset = (
        pieces[f"rssm/{k}"] for k in ("deter", "stoch", "action", "tokens", "reset")
    )
    out, logits, sample = R.rssm_observe(
        weights, deter, stoch, tokens[:, None], action[:, None], reset[:, None]
    )
    near(out[:, 0], pieces["rssm/out_deter"], who="deter")
    near(logits[:, 0], pieces["rssm/out_post"], who="post")
    assert torch.equal(sample.argmax(-1), logits.argmax(-1))
    prior = R.rssm_prior(weights, out[:, 0], stoch.shape[1])
    near(prior, pieces["rssm/out_prior"], who="prior")
