"""The kernels on plain tensors, one after the other; needs PyTorch and nothing else of fastwm.

    python examples/use_kernels.py

Each part stands alone: copy the lines that you need into your own project. Without a compiled
extension the same calls run in plain PyTorch.
"""

import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

from fastwm import ops


def twohot() -> str:
    """A critic that predicts a distribution over bins instead of a number."""
    bins = ops.symexp_bins(255)
    logits = torch.zeros(16, 255, requires_grad=True)  # what your network gives
    returns = 100 * torch.randn(16)
    loss = ops.twohot_loss(logits, returns, bins).mean()
    loss.backward()
    return f"loss {loss:.3f} (ln 255 = 5.541), value {ops.twohot_mean(logits, bins)[0]:.1f}"


def lambda_return() -> str:
    """Returns of 16 rollouts of 15 steps, from rewards, values and discounts."""
    reward, value = torch.randn(2, 16, 16)
    discount = torch.full((16, 16), 0.997)
    returns = ops.lambda_return(reward, value, discount, 0.95)
    return f"returns {tuple(returns.shape)}"


def mixture() -> str:
    """The likelihood of an MDN-RNN, read out of its projection without a copy."""
    projection = torch.randn(8, 20, 3, 32, 5, requires_grad=True)  # (B, T, 3, Z, M)
    mean, log_std, logits = projection.unbind(2)
    target = torch.randn(8, 20, 32)
    nll = ops.gmm_nll(target, mean, log_std, logits, "factored")
    nll.mean().backward()
    same = MixtureSameFamily(Categorical(logits=logits), Normal(mean, log_std.exp()))
    gap = (nll + same.log_prob(target)).abs().max()
    return f"nll {tuple(nll.shape)}, off torch.distributions by {gap:.1e}"


def latent() -> str:
    """A categorical latent: sample it, send gradients through it, hold its KL in balance."""
    post, prior = torch.randn(2, 16, 32, 16).requires_grad_()  # (B, S, K) logits each
    index, _ = ops.latent_sample(post, torch.rand(16, 32))
    stoch = ops.straight_through(index, post)
    dyn, rep, _, _ = ops.kl_balance(post, prior, free_nats=1.0)
    (dyn.mean() + 0.1 * rep.mean() + stoch.square().mean()).backward()
    return f"sample {tuple(stoch.shape)}, KL {dyn.mean():.2f}"


def rssm_weights(deter=64, units=32, groups=8, classes=8, action=3, embed=20, blocks=4):
    """An RSSMWeights of plain tensors; take yours from your modules instead."""

    def layer(inputs: int, outputs: int = units):
        weight = torch.randn(outputs, inputs) / inputs**0.5
        return weight, torch.zeros(outputs), torch.ones(outputs)  # weight, bias, norm's scale

    part, stoch = deter // blocks, groups * classes
    core = torch.randn(blocks, part + 3 * units, part) / (part + 3 * units) ** 0.5
    gru = torch.randn(blocks, part, 3 * part) / part**0.5
    return ops.RSSMWeights(
        deter_in=layer(deter),
        stoch_in=layer(stoch),
        action_in=layer(action),
        hidden=((core, torch.zeros(deter), torch.ones(deter)),),
        gru=(gru, torch.zeros(3 * deter)),
        post=(layer(deter + embed),),
        post_logit=layer(units, stoch)[:2],
        prior=(layer(deter), layer(units)),
        prior_logit=layer(units, stoch)[:2],
    )


def rssm() -> str:
    """A whole sequence of a recurrent state-space model, and a rollout with a policy."""
    weights, batch, time = rssm_weights(), 4, 10
    deter, stoch = torch.zeros(batch, 64), torch.zeros(batch, 8, 8)
    tokens, action = torch.randn(batch, time, 20), torch.randn(batch, time, 3)
    is_first = torch.zeros(batch, time, dtype=torch.bool)
    is_first[:, 0] = True
    deters, *_ = ops.rssm_observe(
        weights, deter, stoch, tokens, action, is_first, torch.rand(batch, time, 8), 0.01
    )
    prior = ops.rssm_prior(weights, deters, 8)  # logits of the prior, for the KL
    one_step = ops.gru_step(weights, deter, stoch.flatten(1), action[:, 0])
    dream = ops.rssm_imagine(
        weights, deter, stoch, lambda deter, stoch: deter[:, :3].tanh(), 15,
        torch.rand(15, batch, 8), 0.01,
    )  # fmt: skip
    return (
        f"sequence {tuple(deters.shape)}, prior {tuple(prior.shape)}, "
        f"step {tuple(one_step.shape)}, dream {tuple(dream[0].shape)}"
    )


def dense_gru() -> str:
    """One step of the 2023 algorithm's GRU, whose gates share a LayerNorm."""
    x, deter, weight = torch.randn(4, 10), torch.zeros(4, 32), torch.randn(96, 42) / 42**0.5
    deter = ops.gru_step_layernorm(x, deter, weight, torch.ones(96), torch.zeros(96))
    return f"state {tuple(deter.shape)}"


def head() -> str:
    """A value head: layers in one call, its mean and its loss without the logits' gradient."""
    x, bins = torch.randn(16, 24), ops.symexp_bins(255)
    layers = [torch.randn(64, 24) / 5, torch.zeros(64), torch.ones(64)]  # weight, bias, scale
    hidden = ops.mlp(x, layers, squash=True)
    weight, bias = torch.zeros(255, 64, requires_grad=True), torch.zeros(255)
    value = ops.twohot_mean_linear(hidden, weight.detach(), bias, bins)
    loss = ops.twohot_loss_linear(hidden, weight, bias, torch.full((16,), 3.0), bins).mean()
    loss.backward()
    return f"hidden {tuple(hidden.shape)}, value {value[0]:.1f}, loss {loss:.2f}"


def lookup() -> str:
    """A layer that reads one-hots."""
    latents = torch.nn.functional.one_hot(torch.randint(16, (4, 32)), 16).float().flatten(1)
    out = ops.sparse_linear(latents, torch.randn(64, 512) / 6, torch.zeros(64))
    return f"out {tuple(out.shape)}"


def norm() -> str:
    """A normalised activation."""
    x, scale = torch.randn(16, 256), torch.ones(256)
    return f"activation {tuple(ops.rms_silu(x, scale).shape)}"


def images() -> str:
    """Stages of an encoder, one whole and one behind a convolution of your own; a decoder layer
    that upsamples without upsampling, with a norm and alone; the squared error from logits."""
    pixels, bias, scale = torch.rand(2, 3, 32, 32), torch.zeros(8), torch.ones(8)
    first = ops.conv_pool_silu(pixels, torch.randn(8, 3, 5, 5) / 9, bias, scale)
    own = torch.nn.functional.conv2d(first, torch.randn(8, 8, 5, 5) / 14, padding=2)
    second = ops.pool_silu(own, bias, scale)
    back = ops.upsample_conv2d_silu(second, torch.randn(8, 8, 5, 5) / 14, bias, scale)
    logits = ops.upsample_conv2d(back, torch.randn(3, 8, 5, 5) / 14).movedim(1, -1)
    target = torch.randint(256, logits.shape, dtype=torch.uint8)
    loss = ops.image_loss(logits, target).mean()
    return f"stages {tuple(first.shape)}, {tuple(second.shape)}, loss {loss:.1f}"


def replay() -> str:
    """Sequences of 8 rows out of a ring of 100 rows for each of 4 environments, on any device."""
    images = torch.randint(256, (4, 100, 16, 16, 3), dtype=torch.uint8)
    actions = torch.randn(4, 100, 2)
    ids = torch.tensor([[0, 5], [3, 96]])  # environment and first row; the second one wraps
    image, prev_action = ops.gather_windows(
        [images, actions], ids, offsets=[0, -1], rows=[8, 8], dtypes=[torch.float32, None]
    )
    return (
        f"images {tuple(image.shape)} up to {image.max():.2f}, actions {tuple(prev_action.shape)}"
    )


def optimizer() -> str:
    """All parameters of a network in one step of Adam, with a slow copy in the same pass."""
    net = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    params = list(net.parameters())
    mu, nu = ([torch.zeros_like(p) for p in params] for _ in range(2))
    slow = [p.detach().clone() for p in params]
    step, lr, x = torch.tensor(0), torch.tensor(1e-2), torch.randn(64, 6)
    for _ in range(100):
        loss = (net(x).squeeze(-1) - x.sum(-1)).square().mean()
        grads = torch.autograd.grad(loss, params)
        ops.adam_(params, grads, mu, nu, step, lr, clip_norm=10.0, copies=ops.Copies(slow, 0.02))
    norm, finite = ops.laprop_agc_(params, grads, mu, nu, step, lr)  # the optimizer of DreamerV3
    ops.ema_(slow, params, 0.02, finite)
    return f"loss {loss:.4f} after {int(step)} steps, last gradient {norm:.2f}"


def main() -> None:
    torch.manual_seed(0)
    print(", ".join(f"{key} {value}" for key, value in ops.backend_info().items()))
    for part in (
        twohot,
        lambda_return,
        mixture,
        latent,
        rssm,
        dense_gru,
        head,
        lookup,
        norm,
        images,
        replay,
        optimizer,
    ):
        print(f"{part.__name__:<18}{part()}")


if __name__ == "__main__":
    main()
