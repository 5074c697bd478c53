"""V, M and C of World Models: sizes, shapes, likelihoods, sampling, and one step equals a scan."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastwm import ops
from fastwm.spaces import Space
from fastwm.worldmodels import ha
from fastwm.worldmodels.ha_controller import ActionCode, Controller

LSTM_SECOND_BIAS = 4  # times hidden: torch keeps two biases where the paper's count has one


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_the_paper():
    assert count(ha.ConvVAE(32)) == 4_348_547
    assert count(ha.ConvVAE(64)) == 4_446_915
    assert count(ha.MDNRNN(32, 3)) - LSTM_SECOND_BIAS * 256 == 422_368
    doom = ha.MDNRNN(64, 1, 512, done=True, restart=True)
    assert count(doom) - LSTM_SECOND_BIAS * 512 == 1_678_785
    assert Controller(32, 256, 3).size == 867
    assert Controller(64, 512, 1, "zch", bias=False).size == 1088
    assert Controller(32, 256, 3, "z", units=40).size == 1443


# ---------------------------------------------------------------------------------------------- V


def test_vae_shapes_of_both_inputs_agree():
    vae, image = ha.ConvVAE(8), torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    mu, logvar = vae.encode(image)
    again, _ = vae.encode(image.permute(0, 3, 1, 2).float() / 255)
    assert mu.shape == logvar.shape == (2, 8)
    torch.testing.assert_close(mu, again)
    recon = vae.decode(mu)
    assert recon.shape == (2, 3, 64, 64) and 0 <= recon.min() and recon.max() <= 1


@pytest.mark.parametrize("shape", [(2, 96, 96, 3), (2, 64, 64, 1), (64, 64, 3)])
def test_vae_refuses_pictures_of_another_size(shape):
    with pytest.raises(ValueError, match=r"expected uint8 images of shape \(N, \(64, 64, 3\)\)"):
        ha.ConvVAE(8).encode(torch.zeros(shape, dtype=torch.uint8))


def test_decoder_relu_is_the_only_difference():
    plain = ha.ConvVAE(4)
    rectified = ha.ConvVAE(4, decoder_relu=True)
    rectified.load_state_dict(plain.state_dict())
    z = torch.randn(1, 4)
    assert not torch.equal(plain.decode(z), rectified.decode(z))
    with torch.no_grad():
        plain.expand.weight.zero_()
        plain.expand.bias.fill_(0.5)  # positive everywhere: nothing to rectify
    rectified.load_state_dict(plain.state_dict())
    assert torch.equal(plain.decode(z), rectified.decode(z))


def test_vae_loss_by_hand():
    image, recon = torch.zeros(2, 3, 64, 64), torch.full((2, 3, 64, 64), 0.5)
    mu = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    loss, parts = ha.vae_loss(image, recon, mu, torch.zeros(2, 2), free_nats=0.5)
    assert parts["rec"].item() == pytest.approx(0.25 * 3 * 64 * 64)
    assert parts["kl"].item() == pytest.approx(0.5 * 9 / 2)
    # The floor 0.5 * 2 is per picture: the second one's KL of 0 counts as 1, the first one as 4.5.
    assert loss.item() == pytest.approx(0.25 * 3 * 64 * 64 + (4.5 + 1.0) / 2)
    scaled, _ = ha.vae_loss(image, recon, mu, torch.zeros(2, 2), free_nats=0.5, kl_scale=0.1)
    assert scaled.item() == pytest.approx(0.25 * 3 * 64 * 64 + 0.1 * (4.5 + 1.0) / 2)


def test_free_nats_stop_the_pull_of_the_prior():
    mu = torch.full((1, 4), 0.1, requires_grad=True)
    image = torch.zeros(1, 3, 64, 64)
    ha.vae_loss(image, image, mu, torch.zeros(1, 4), free_nats=0.5)[0].backward()
    assert mu.grad.abs().max() == 0
    mu.grad = None
    ha.vae_loss(image, image, mu, torch.zeros(1, 4), free_nats=0.0)[0].backward()
    torch.testing.assert_close(mu.grad, mu.detach())


def test_latent_sample_uses_the_log_variance():
    z = ha.latent_sample(torch.ones(3), torch.full((3,), 2 * math.log(5.0)), torch.tensor(2.0))
    torch.testing.assert_close(z, torch.full((3,), 11.0))


def test_look_crops_the_dashboard_and_keeps_bytes():
    image = torch.zeros(1, 96, 96, 3, dtype=torch.uint8)
    image[:, :84] = 200
    seen = ha.look(image, 84)
    assert seen.shape == (1, 64, 64, 3) and (seen == 200).all()
    assert (ha.look(image)[0, -1] < 200).all()
    small = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    assert ha.look(small) is small
    with pytest.raises(ValueError, match="H of at least 84"):
        ha.look(small, 84)


# ---------------------------------------------------------------------------------------------- M


def rnn_case(mixture: str, **flags) -> tuple[ha.MDNRNN, torch.Tensor]:
    rnn = ha.MDNRNN(6, 2, hidden=16, mixtures=3, mixture=mixture, **flags)
    return rnn, rnn.features(torch.randn(4, 7, 6), torch.randn(4, 7, 2))


@pytest.mark.parametrize("mixture", ha.LAYOUTS)
@pytest.mark.parametrize("flags", [{}, {"reward": True, "done": True, "restart": True}])
def test_steps_equal_the_scan(mixture, flags, close):
    rnn, x = rnn_case(mixture, **flags)
    whole, hidden, last = rnn.scan(x)
    state, seen = rnn.initial(4), []
    for t in range(x.shape[1]):
        before = state
        h, state = rnn.step(x[:, t], state)
        assert not torch.equal(state[0], before[0])  # the state goes on: it is not the first again
        seen.append(rnn.predict(h))
    close(state[0], last[0])
    close(state[1], last[1])
    for name, part in whole._asdict().items():
        if part is not None:
            close(torch.stack([getattr(one, name) for one in seen], 1), part)
    assert (whole.reward is not None) == bool(flags) == (whole.done is not None)


def test_scan_goes_on_from_a_state(close):
    rnn, x = rnn_case("factored")
    _, whole, _ = rnn.scan(x)
    _, _, state = rnn.scan(x[:, :3])
    _, rest, _ = rnn.scan(x[:, 3:], state)
    close(rest, whole[:, 3:])


def test_a_torch_lstm_state_dict_loads(close):
    rnn, x = rnn_case("factored")
    lstm = nn.LSTM(8, 16, batch_first=True)
    rnn.lstm.load_state_dict(lstm.state_dict())
    close(rnn.scan(x)[1], lstm(x)[0])
    cell = nn.LSTMCell(8, 16)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in lstm.state_dict().items()})
    h, state = rnn.step(x[:, 0], rnn.initial(4))
    close(state[1], cell(x[:, 0])[1])


def test_forget_gates_start_open():
    torch.manual_seed(1)
    rnn = ha.MDNRNN(32, 3)
    torch.manual_seed(1)
    plain = nn.LSTM(35, 256, batch_first=True)
    raised = rnn.lstm.bias_ih_l0 - plain.bias_ih_l0
    assert torch.allclose(raised[256:512], torch.ones(256))
    assert raised[:256].abs().max() == raised[512:].abs().max() == 0


def test_joint_mixture_matches_the_published_forward(golden, close):
    data = golden("mdrnn")
    weights = {k.removeprefix("params/"): v for k, v in data.items() if k.startswith("params/")}
    latent, action = data["latents"].shape[-1], data["actions"].shape[-1]
    hidden, mixtures = weights["rnn.weight_hh_l0"].shape[1], data["mus"].shape[2]
    rnn = ha.MDNRNN(latent, action, hidden, mixtures, "joint", reward=True, done=True)
    rnn.lstm.load_state_dict({k.removeprefix("rnn."): v for k, v in weights.items() if "rnn" in k})
    rnn.head.load_state_dict({k.rpartition(".")[2]: v for k, v in weights.items() if "gmm" in k})
    # There time comes first, and actions stand before latents.
    weight = weights["rnn.weight_ih_l0"]
    with torch.no_grad():
        rnn.lstm.weight_ih_l0.copy_(torch.cat([weight[:, action:], weight[:, :action]], 1))
    mixture, _, _ = rnn.scan(rnn.features(data["latents"].transpose(0, 1),
                                          data["actions"].transpose(0, 1)))  # fmt: skip
    close(mixture.mean.transpose(0, 1), data["mus"])
    close(mixture.log_std.exp().transpose(0, 1), data["sigmas"])
    close(mixture.logits.log_softmax(-1).transpose(0, 1), data["logpi"])
    close(mixture.reward.transpose(0, 1), data["reward"])
    close(mixture.done.transpose(0, 1), data["terminal_logit"])


@pytest.mark.parametrize("layout", ha.LAYOUTS)
def test_likelihood_against_torch_distributions(layout, variant, close):
    from torch import distributions as D

    rnn, x = rnn_case(layout)
    mixture = rnn.scan(x)[0]
    target = torch.randn(4, 7, 6)
    scale = mixture.log_std.exp()
    part = D.Normal(mixture.mean, scale)
    part = part if layout == "factored" else D.Independent(part, 1)
    theirs = -D.MixtureSameFamily(D.Categorical(logits=mixture.logits), part).log_prob(target)
    theirs = theirs.sum(-1) if layout == "factored" else theirs
    loss, parts = ha.mdn_loss(mixture, layout, target, torch.ones(4, 7))
    close(parts["nll"], theirs.mean() / 6)
    ours = torch.autograd.grad(loss, rnn.head.weight, retain_graph=True)[0]
    close(ours, torch.autograd.grad(theirs.mean() / 6, rnn.head.weight)[0])


def test_likelihood_gradcheck_float64():
    rnn, x = rnn_case("factored")
    target = torch.randn(4, 7, 6, dtype=torch.float64)
    parts = [p.detach().double().requires_grad_() for p in rnn.scan(x)[0][:3]]
    assert torch.autograd.gradcheck(
        lambda *p: ops.gmm_nll_ref(target[:1, :2], *(q[:1, :2] for q in p), "factored"), parts
    )


def test_loss_scale_of_the_sum_form():
    """The seed's scaling: everything summed, divided by Z + 2, or Z + 1 without the reward."""
    rnn, x = rnn_case("joint", reward=True, done=True)
    mixture, target = rnn.scan(x)[0], torch.randn(4, 7, 6)
    zeros, ones = torch.zeros(4, 7), torch.ones(4, 7)
    loss, parts = ha.mdn_loss(
        mixture, "joint", target, ones, zeros, zeros, reduce="sum", done_weight=1.0
    )
    whole = parts["nll"] * 6 + parts["reward"] + parts["done"]
    assert loss.item() == pytest.approx(whole.item() / 8, rel=1e-5)
    less = mixture._replace(reward=None)
    loss, _ = ha.mdn_loss(less, "joint", target, ones, None, zeros, reduce="sum", done_weight=1.0)
    assert loss.item() == pytest.approx((parts["nll"] * 6 + parts["done"]).item() / 7, rel=1e-5)


def test_rows_without_weight_do_not_count():
    rnn, x = rnn_case("factored", done=True)
    target, done = torch.randn(4, 7, 6), torch.zeros(4, 7)
    weight = torch.ones(4, 7)
    weight[:, 5:] = 0
    mixture = rnn.scan(x)[0]
    one, _ = ha.mdn_loss(mixture, "factored", target, weight, done=done)
    target[:, 5:], done[:, 5:] = 99.0, 1.0
    two, _ = ha.mdn_loss(mixture, "factored", target, weight, done=done)
    assert one.item() == two.item()


def two_components(layout: str) -> ha.Mixture:
    """Means -1 and 2 with shares 0.3 and 0.7, std 0.5, of 4 dimensions."""
    mean, logits = torch.tensor([-1.0, 2.0]), torch.tensor([0.3, 0.7]).log()
    if layout == "factored":
        mean, logits = mean.expand(4, 2), logits.expand(4, 2)
    else:
        mean = mean[:, None].expand(2, 4)
    return ha.Mixture(mean, torch.full(mean.shape, math.log(0.5)), logits)


@pytest.mark.parametrize("layout", ha.LAYOUTS)
def test_temperature_zero_is_the_most_likely_mean(layout):
    pick = torch.zeros(4) if layout == "factored" else torch.zeros(())
    z = ha.sample_next(two_components(layout), layout, pick, torch.randn(4), 0.0)
    assert (z == 2.0).all()
    z = ha.sample_next(two_components(layout), layout, pick + 0.5, torch.randn(4), 1e-3)
    assert (z - 2.0).abs().max() < 0.1


@pytest.mark.parametrize("layout", ha.LAYOUTS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_temperature_scales_variance_and_shares(layout, temperature):
    n = 20_000
    one = two_components(layout)
    many = ha.Mixture(*(p.expand(n, *p.shape) for p in one[:3]))
    pick = torch.rand(n, 4) if layout == "factored" else torch.rand(n)
    z = ha.sample_next(many, layout, pick, torch.randn(n, 4), temperature)
    share = 0.7 ** (1 / temperature) / (0.7 ** (1 / temperature) + 0.3 ** (1 / temperature))
    high = z > 0.5  # three standard deviations from either mean
    if temperature <= 1:
        assert high.float().mean().item() == pytest.approx(share, abs=0.02)
        assert z[high].std().item() == pytest.approx(0.5 * temperature**0.5, rel=0.05)
    if layout == "joint" and temperature < 1:  # all dimensions are of one component
        assert (high.all(1) | ~high.any(1)).float().mean() > 0.97


# ---------------------------------------------------------------------------------------------- C


@pytest.mark.parametrize("inputs", ["z", "zh", "zc", "zch"])
@pytest.mark.parametrize("units", [0, 5])
def test_population_equals_single_controllers(inputs, units, close):
    controller = Controller(4, 6, 2, inputs, units, bias=inputs != "zch")
    params = torch.randn(3, controller.size)
    z, h, c = torch.randn(5, 4), torch.randn(5, 6), torch.randn(5, 6)
    features = controller.features(z, (h, c))
    assert features.shape == (5, controller.width)
    raw = controller.act(params, features.expand(3, 5, -1))
    for p in range(3):
        parts = controller.state_dict(params[p])
        x = features
        if units:
            x = torch.tanh(nn.functional.linear(x, parts["hidden.weight"], parts["hidden.bias"]))
        close(raw[p], nn.functional.linear(x, parts["fc.weight"], parts.get("fc.bias")))
        assert torch.equal(controller.flat(parts), params[p])


@pytest.mark.parametrize("units", [0, 5])
def test_centred_parameters_see_features_minus_their_mean(units, close):
    controller = Controller(4, 6, 2, "zh", units)
    params, features, mean = torch.randn(3, controller.size), torch.randn(3, 5, 10), torch.randn(10)
    close(
        controller.act(controller.centred(params, mean), features),
        controller.act(params, features - mean),
    )


def test_a_controller_of_another_size_is_refused():
    small, large = Controller(32, 256, 3), Controller(64, 256, 3)
    with pytest.raises(
        ValueError, match=r"expected parameters of shape \(P, 963\), got \(1, 867\)"
    ):
        large.act(torch.zeros(1, small.size), torch.zeros(1, 1, 320))
    with pytest.raises(ValueError, match="expected weights of shapes"):
        large.flat(small.state_dict(torch.zeros(small.size)))


def test_car_actions_reach_their_ranges():
    code, space = ActionCode.of("car"), Space("continuous", (3,))
    raw = torch.tensor([[9.0, 9.0, 9.0], [-9.0, -9.0, -9.0], [0.0, 0.0, 0.0]])
    action = code.code(raw)
    torch.testing.assert_close(
        action, torch.tensor([[1.0, 1.0, 1.0], [-1.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
    )
    env = code.to_env(action.numpy(), space)  # -1 .. 1 of a VecEnv stands for 0 .. 1 there
    np.testing.assert_allclose(env, [[1, 1, 1], [-1, -1, -1], [0, 0, -1]], atol=1e-6)


def test_thirds_choose():
    space = Space("discrete", (), (3,))
    code = ActionCode("thirds", 1, (2, 0, 1))
    env = code.to_env(np.array([[-0.9], [-0.2], [0.2], [0.9]], np.float32), space)
    assert env.tolist() == [2, 0, 0, 1] and env.dtype == np.int32


def test_an_action_space_that_does_not_fit_is_one_clear_error():
    with pytest.raises(ValueError, match=r"space of 3 continuous .* got discrete"):
        ActionCode.of("car", Space("discrete", (), (5,)))
    with pytest.raises(ValueError, match=r"one choice of 3 .* got discrete \(18,\)"):
        ActionCode.of("auto", Space("discrete", (), (18,)))
