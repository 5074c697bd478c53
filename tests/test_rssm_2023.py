"""The 2023 RSSM: goldens of both latents, and what holds for any weights."""

import pytest
import torch

from fastwm.rssm_2023 import RSSM

NAMES = {
    "W": "start",
    "_img_in_layers.0.weight": "inputs.weight",
    "_img_in_layers.1.weight": "inputs.scale",
    "_img_in_layers.1.bias": "inputs.shift",
    "_cell.layers.GRU_linear.weight": "cell",
    "_cell.layers.GRU_norm.weight": "cell_scale",
    "_cell.layers.GRU_norm.bias": "cell_shift",
    "_img_out_layers.0.weight": "prior.0.weight",
    "_img_out_layers.1.weight": "prior.0.scale",
    "_img_out_layers.1.bias": "prior.0.shift",
    "_obs_out_layers.0.weight": "post.0.weight",
    "_obs_out_layers.1.weight": "post.0.scale",
    "_obs_out_layers.1.bias": "post.0.shift",
    "_imgs_stat_layer.weight": "prior_stats.weight",
    "_imgs_stat_layer.bias": "prior_stats.bias",
    "_obs_stat_layer.weight": "post_stats.weight",
    "_obs_stat_layer.bias": "post_stats.bias",
}


def make(tokens=7, action=3, **options):
    defaults = dict(deter=8, hidden=6, stoch=5, classes=4, latent="onehot", obslayers=1)
    defaults |= dict(imglayers=1, unimix=0.01, initial="learned")
    defaults |= dict(mean="none", std="sigmoid2", min_std=0.1)
    return RSSM(tokens, action, **{**defaults, **options})


def reference_model(weights):
    """The RSSM with the parameters of the public implementation, sizes read off them."""
    outputs, hidden = weights["_imgs_stat_layer.weight"].shape
    deter = weights["W"].shape[1]
    wide, tokens = weights["_img_in_layers.0.weight"].shape[1], weights["_obs_out_layers.0.weight"]
    options = dict(deter=deter, hidden=hidden, stoch=5)
    if wide == outputs + 3:
        model = make(tokens.shape[1] - deter, 3, **options, classes=outputs // 5)
    else:
        model = make(tokens.shape[1] - deter, 3, **options, latent="normal")
    params = dict(model.named_parameters())
    assert set(params) == set(NAMES.values())
    with torch.no_grad():
        for theirs, ours in NAMES.items():
            params[ours].copy_(weights[theirs].reshape(params[ours].shape))
    return model


def group(arrays, prefix):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def stats_of(arrays, prefix):
    if f"{prefix}logit" in arrays:
        return arrays[f"{prefix}logit"]
    return torch.stack([arrays[f"{prefix}mean"], arrays[f"{prefix}std"]], -1)


@pytest.mark.parametrize("name", ["rssm_2023_discrete", "rssm_2023_gaussian"])
def test_sequence_golden(name, golden, variant, near):
    g = golden(name)
    model = reference_model(group(g, "params/"))
    first = g["is_first"].bool()
    assert first[:, 1:].any()  # resets inside of the sequence
    first[:, 0] = True
    start = model.initial(len(first))
    deter, stats, stoch = model.observe(*start, g["embed"], g["action"], first, None)
    near(deter, g["post/deter"], 2e-6, "deter")
    near(stats, stats_of(g, "post/"), 5e-6, "posterior")
    near(stoch.reshape_as(g["post/stoch"]), g["post/stoch"], 5e-6, "stoch")
    prior = model.prior_logits(deter)
    near(prior, stats_of(g, "prior/"), 5e-6, "prior")
    mode = model.latent.sample(prior, None)
    near(mode.reshape_as(g["prior/stoch"]), g["prior/stoch"], 5e-6, "prior mode")
    free, dyn_scale, rep_scale = (float(g[k]) for k in ("free", "dyn_scale", "rep_scale"))
    dyn, rep, _, _ = model.latent.kl(stats, prior, free)
    near(dyn, g["dyn"], 2e-5, "dyn")
    near(rep, g["rep"], 2e-5, "rep")
    near(dyn_scale * dyn + rep_scale * rep, g["kl_loss"], 2e-5, "kl")
    near(model.latent.kl(stats, prior, 0.0)[0], g["kl_value"], 2e-5, "kl value")


@pytest.mark.parametrize("kind", ["rssm_disc", "rssm_gauss"])
def test_step_golden(kind, golden, variant, near):
    g = group(golden("dreamerv3_2023_pieces"), f"{kind}/")
    model = reference_model(group(g, "w/"))
    deter, stoch = model.initial(2)
    near(deter, g["initial_deter"], 2e-6, "initial deter")
    near(stoch.reshape_as(g["initial_stoch"]), g["initial_stoch"], 5e-6, "initial stoch")
    stoch = g["prev_stoch"].reshape(2, *model.latent.shape)
    first = torch.zeros(2, 1, dtype=torch.bool)
    args = (g["prev_deter"], stoch, g["emb"].unsqueeze(1), g["act"].unsqueeze(1), first, None)
    deter, stats, _ = model.observe(*args)
    near(deter[:, 0], g["post_deter"], 2e-6, "deter")
    near(stats[:, 0], stats_of(g, "post_"), 5e-6, "posterior")
    prior = model.prior_logits(deter)
    near(prior[:, 0], stats_of(g, "prior_"), 5e-6, "prior")
    dyn, rep, _, _ = model.latent.kl(stats, prior, 1.0)
    near((0.5 * dyn + 0.1 * rep)[:, 0], g["kl_loss"], 2e-5, "kl")
    near(model.latent.kl(stats, prior, 0.0)[0][:, 0], g["kl_value"], 2e-5, "kl value")


KINDS = [dict(), dict(latent="normal"), dict(latent="normal", mean="tanh5", std="softplus")]
KINDS += [dict(obslayers=2, imglayers=3), dict(initial="zeros", latent="normal", std="abs")]


def make_inputs(model, batch=3, time=6):
    first = torch.rand(batch, time) < 0.3
    first[0] = False
    stoch = torch.randn(batch, *model.latent.shape)
    tokens, action = torch.randn(batch, time, 7), torch.randn(batch, time, 3)
    return [torch.randn(batch, 8), stoch, tokens, action, first, torch.rand(batch, time, 5)]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_sequence_equals_single_steps(options, near):
    model = make(**options)
    torch.nn.init.normal_(model.start)
    deter, stoch, *rows = make_inputs(model)
    whole = model.observe(deter, stoch, *rows)
    for t in range(rows[0].shape[1]):
        one = model.observe(deter, stoch, *(x[:, t : t + 1] for x in rows))
        for a, b in zip(one, whole, strict=True):
            near(a[:, 0], b[:, t], 1e-5)
        deter, stoch = one[0][:, 0], one[2][:, 0]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_an_episode_starts_from_the_learned_state_alone(options, near):
    model = make(**options)
    torch.nn.init.normal_(model.start)
    deter, stoch, tokens, action, first, noise = make_inputs(model)
    first[:], first[:, 3] = False, True
    one = model.observe(deter, stoch, tokens, action, first, noise)
    changed = [x.clone() for x in (deter, stoch, tokens, action)]
    for x in changed[:2]:
        x += 1
    changed[2][:, :3] += 1
    changed[3][:, :4] += 1  # the action that led to a first row belongs to the episode before
    two = model.observe(*changed, first, noise)
    start = model.initial(3)
    alone = model.observe(*start, tokens[:, 3:], torch.zeros(3, 3, 3), first[:, 4:5], noise[:, 3:])
    assert torch.equal(one[0][:, 3:], two[0][:, 3:]) and not torch.equal(one[0], two[0])
    near(alone[0][:, 0], one[0][:, 3], 1e-5)


def test_gradients_reach_the_start_through_resets():
    model = make()
    inputs = make_inputs(model)
    inputs[4][:, 2] = True
    model.observe(*inputs)[0].square().sum().backward()
    assert model.start.grad.abs().sum() > 0
    zeros = make(initial="zeros")
    assert not zeros.start.requires_grad


@pytest.mark.parametrize("latent", ["onehot", "normal"])
def test_gradients_equal_those_of_the_reference_kernels(latent, near):
    from fastwm import ops

    model = make(latent=latent)
    torch.nn.init.normal_(model.start)
    inputs = make_inputs(model)
    grads = []
    for backend in ("reference", "fused"):
        with ops.use_backend(backend):
            out = model.observe(*inputs)
            loss = sum((x * x.detach().cos()).sum() for x in out)
            used = [p for n, p in model.named_parameters() if not n.startswith("prior_stats")]
            grads.append(torch.autograd.grad(loss, used, materialize_grads=True))
    for a, b in zip(*grads, strict=True):
        near(a, b, 2e-5)


def test_kl_of_normals_is_the_library_s(close):
    latent = make(latent="normal").latent
    post, prior = (latent.stats(torch.randn(4, 10)) for _ in range(2))
    p, q = (torch.distributions.Normal(*x.unbind(-1)) for x in (post, prior))
    dyn, rep, entropy, other = latent.kl(post, prior, 0.0)
    close(dyn, torch.distributions.kl_divergence(p, q).sum(-1))
    close(rep, dyn)
    close(entropy, p.entropy().sum(-1))
    close(other, q.entropy().sum(-1))
    wide = [x.detach().requires_grad_() for x in (post, prior)]
    grads = torch.autograd.grad(latent.kl(*wide, 0.0)[0].sum(), wide, allow_unused=True)
    assert grads[0] is None and grads[1].abs().sum() > 0
    grads = torch.autograd.grad(latent.kl(*wide, 0.0)[1].sum(), wide, allow_unused=True)
    assert grads[1] is None and grads[0].abs().sum() > 0
    dyn = latent.kl(*wide, 1e3)[0]
    assert (dyn == 1e3).all()
    assert torch.autograd.grad(dyn.sum(), wide[1])[0].abs().sum() == 0


def test_normal_samples_have_their_moments():
    latent = make(latent="normal").latent
    stats = torch.tensor([[3.0, 0.5]] * 5).expand(20_000, 5, 2)
    noise = torch.rand(20_000, 5)
    noise[0] = 0.0
    x = latent.sample(stats, noise)
    assert x.isfinite().all()
    assert abs(float(x.mean()) - 3.0) < 0.01 and abs(float(x.std()) - 0.5) < 0.01
    assert torch.equal(latent.sample(stats, None)[..., 0], stats[..., 0])


@pytest.mark.parametrize("latent", ["onehot", "normal"])
def test_imagination_follows_the_prior(latent, near):
    model = make(latent=latent)
    deter, stoch = torch.randn(4, 8), torch.randn(4, *model.latent.shape)
    noise, actions = torch.rand(3, 4, 5), torch.randn(4, 4, 3)
    given = iter(actions)
    features, taken = model.imagine(deter, stoch, lambda features: next(given), 3, noise)
    deters, stochs = model.split(features)
    assert torch.equal(taken, actions.transpose(0, 1))
    for i in range(3):
        x = model.inputs(torch.cat([stochs[:, i].flatten(1), actions[i]], -1))
        near(deters[:, i + 1], model.core(x, deters[:, i]), 1e-5)
        near(stochs[:, i + 1], model.latent.sample(model.prior_logits(deters[:, i + 1]), noise[i]))


@pytest.mark.parametrize("latent", ["onehot", "normal"])
def test_imagination_is_differentiable_through_the_actions(latent):
    """Against finite differences in float64; one-hot samples jump, so there the deter is read."""
    torch.set_default_dtype(torch.float64)
    try:
        model = make(latent=latent, classes=4)
        deter, stoch = torch.randn(2, 8), torch.randn(2, *model.latent.shape)
        noise, weight = torch.rand(2, 2, 5), torch.randn(2, 8)
        action = torch.randn(2, 3, requires_grad=True)

        def result(action):
            later = torch.zeros_like(action)
            given = iter([action, later, later])
            features, _ = model.imagine(deter, stoch, lambda features: next(given), 2, noise)
            deters, _ = model.split(features)
            return (deters[:, 1 if latent == "onehot" else 2] * weight).sum()

        assert torch.autograd.gradcheck(result, action, eps=1e-6, atol=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)
