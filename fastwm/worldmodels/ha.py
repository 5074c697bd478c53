"""World Models (Ha and Schmidhuber, 2018): V sees, M remembers and predicts.

V, `ConvVAE`, turns a picture into a latent z. M, `MDNRNN`, is an LSTM over (z, action) that gives a
mixture of Gaussians over the next z. Letters as in docs/conventions.md (Z latent, M, R).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastwm import ops

SIDE = 64  # px; the four unpadded convolutions fit no other size
LAYOUTS = ("factored", "joint")
State = tuple[Tensor, Tensor]  # (h, c), each (N, R)


class ConvVAE(nn.Module):
    """Variational autoencoder of 64 x 64 pictures.

    latent: Z. channels: C. decoder_relu: an activation after the decoder's dense layer, which the
    original does not have and later PyTorch versions do.
    """

    def __init__(self, latent: int = 32, channels: int = 3, decoder_relu: bool = False) -> None:
        super().__init__()
        self.latent, self.channels, self.decoder_relu = latent, channels, decoder_relu
        widths = (channels, 32, 64, 128, 256)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 4, stride=2) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.mu, self.logvar = nn.Linear(1024, latent), nn.Linear(1024, latent)
        self.expand = nn.Linear(latent, 1024)
        shapes = ((1024, 128, 5), (128, 64, 5), (64, 32, 6), (32, channels, 6))
        self.deconvs = nn.ModuleList(nn.ConvTranspose2d(a, b, k, stride=2) for a, b, k in shapes)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:  # (N, 64, 64, C) uint8
        """Mean and log-variance (N, Z) of z. Also takes (N, C, 64, 64) floats in [0, 1]."""
        x = self.pixels(image)
        for conv in self.convs:
            x = F.relu(conv(x))
        x = x.flatten(1)
        return self.mu(x), self.logvar(x)

    def decode(self, z: Tensor) -> Tensor:  # (N, Z) -> (N, C, 64, 64) in [0, 1]
        x = self.expand(z)
        x = F.relu(x) if self.decoder_relu else x
        # A transposed convolution of one pixel is a product; torch's own takes 40 % of the step.
        first = self.deconvs[0]
        x = (x @ first.weight.flatten(1)).unflatten(1, first.weight.shape[1:])
        x = F.relu(x + first.bias[:, None, None])
        for deconv in self.deconvs[1:-1]:
            x = F.relu(deconv(x))
        return torch.sigmoid(self.deconvs[-1](x))

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, mu and logvar; noise (N, Z) is standard normal."""
        mu, logvar = self.encode(image)
        return self.decode(latent_sample(mu, logvar, noise)), mu, logvar

    def pixels(self, image: Tensor) -> Tensor:
        """(N, C, 64, 64) floats in [0, 1], channels last in memory; both kinds of input."""
        byte = image.dtype == torch.uint8
        shape = (SIDE, SIDE, self.channels) if byte else (self.channels, SIDE, SIDE)
        if image.ndim != 4 or tuple(image.shape[1:]) != shape:
            raise ValueError(
                f"ConvVAE: expected {'uint8' if byte else 'float'} images of shape (N, {shape}), "
                f"got {tuple(image.shape)}"
            )
        return image.permute(0, 3, 1, 2).float() / 255 if byte else image

    def options(self) -> dict:
        return {
            "latent": self.latent,
            "channels": self.channels,
            "decoder_relu": self.decoder_relu,
        }


def latent_sample(mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """z = mu + exp(logvar / 2) * noise."""
    return mu + (logvar * 0.5).exp() * noise


def vae_loss(
    image: Tensor,  # (N, C, 64, 64) in [0, 1]
    recon: Tensor,  # the same
    mu: Tensor,  # (N, Z)
    logvar: Tensor,  # (N, Z)
    free_nats: float = 0.5,
    kl_scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """mean over N of sum over pixels (x - x')^2 + kl_scale * max(KL, free_nats * Z).

    The free nats are a floor on the sum over the latent, per picture: below it the KL pulls no
    more. Returns the loss, and its parts "rec" and "kl" without floor and scale.
    """
    rec = (image - recon).square().flatten(1).sum(1)
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)
    loss = (rec + kl_scale * kl.clamp_min(free_nats * mu.shape[1])).mean()
    return loss, {"rec": rec.detach().mean(), "kl": kl.detach().mean()}


class Mixture(NamedTuple):
    """What M says about the next step.

    factored, a mixture per latent dimension:  mean, log_std, logits (..., Z, M)
    joint, one mixture over whole latents:     mean, log_std (..., M, Z), logits (..., M)
    reward: (...) or None. done: (...) logit or None.
    """

    mean: Tensor
    log_std: Tensor
    logits: Tensor
    reward: Tensor | None = None
    done: Tensor | None = None


class MDNRNN(nn.Module):
    """LSTM over (z, action) with a mixture density head; `scan` and `step` share every parameter.

    latent: Z. action: A, width of one action. hidden: R. mixtures: M. mixture: "factored" (the
    paper) or "joint". reward, done: predict them too. restart: one more input that is 1 at the
    first step of an episode.
    """

    def __init__(
        self,
        latent: int,
        action: int,
        hidden: int = 256,
        mixtures: int = 5,
        mixture: str = "factored",
        reward: bool = False,
        done: bool = False,
        restart: bool = False,
    ) -> None:
        super().__init__()
        if mixture not in LAYOUTS:
            raise ValueError(f"MDNRNN: expected mixture to be one of {LAYOUTS}, got {mixture!r}")
        self.latent, self.action, self.hidden, self.mixtures = latent, action, hidden, mixtures
        self.mixture, self.reward, self.done, self.restart = mixture, reward, done, restart
        self.lstm = nn.LSTM(latent + action + restart, hidden, batch_first=True)
        per = latent * mixtures
        self.sizes = (per, per, per if mixture == "factored" else mixtures)
        self.head = nn.Linear(hidden, sum(self.sizes) + reward + done)
        with torch.no_grad():  # gates i, f, g, o: remember at first
            self.lstm.bias_ih_l0[hidden : 2 * hidden] += 1.0

    def initial(self, count: int) -> State:
        zeros = self.head.weight.new_zeros(count, self.hidden)
        return zeros, zeros.clone()  # callers write into them

    def features(self, z: Tensor, action: Tensor, restart: Tensor | None = None) -> Tensor:
        """The LSTM's input (..., Z + A [+ 1]) of z (..., Z), action (..., A), restart (...)."""
        if action.shape[-1] != self.action or z.shape[-1] != self.latent:
            raise ValueError(
                f"MDNRNN: expected z (..., {self.latent}) and action (..., {self.action}), "
                f"got {tuple(z.shape)} and {tuple(action.shape)}"
            )
        parts = [z, action]
        if self.restart:
            flag = z.new_zeros(z.shape[:-1]) if restart is None else restart.to(z.dtype)
            parts.append(flag[..., None])
        return torch.cat(parts, -1)

    def scan(self, x: Tensor, state: State | None = None) -> tuple[Mixture, Tensor, State]:
        """Inputs (B, T, ...) -> mixtures of every step, h (B, T, R), the last state."""
        before = None if state is None else (state[0][None], state[1][None])
        hidden, (h, c) = self.lstm(x, before)
        return self.predict(hidden), hidden, (h[0], c[0])

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step (N, ...) -> h (N, R) and the state; `predict(h)` for the mixture."""
        lstm = self.lstm
        h, c = torch.lstm_cell(
            x, state, lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0, lstm.bias_hh_l0
        )
        return h, (h, c)

    def predict(self, hidden: Tensor) -> Mixture:  # (..., R)
        parts = self.head(hidden)
        mean, log_std, logits = parts[..., : sum(self.sizes)].split(self.sizes, -1)
        shape = (self.latent, self.mixtures)
        if self.mixture == "joint":
            shape = shape[::-1]
        else:
            logits = logits.unflatten(-1, shape)
        rest = list(parts[..., sum(self.sizes) :].unbind(-1))
        reward = rest.pop(0) if self.reward else None
        done = rest.pop(0) if self.done else None
        return Mixture(
            mean.unflatten(-1, shape), log_std.unflatten(-1, shape), logits, reward, done
        )

    def options(self) -> dict:
        names = "latent action hidden mixtures mixture reward done restart".split()
        return {name: getattr(self, name) for name in names}


def mdn_loss(
    mixture: Mixture,
    layout: str,
    target: Tensor,  # (B, T, Z) the next z
    weight: Tensor,  # (B, T) 0 for rows beyond an episode's end
    reward: Tensor | None = None,  # (B, T)
    done: Tensor | None = None,  # (B, T) float
    *,
    done_weight: float = 10.0,
    reduce: str = "mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the next latent, and the losses of the other heads.

    reduce "mean": nll / Z + done + reward, so that the scale does not depend on Z.
    reduce "sum":  (nll + done + reward) / (Z + 1 [+ 1 with reward]).
    done counts positive steps `done_weight` times. Returns the loss and its parts; "nll" is per
    latent dimension.
    """
    width = target.shape[-1]
    total = weight.sum().clamp_min(1)
    nll = ops.gmm_nll(target, mixture.mean, mixture.log_std, mixture.logits, layout)
    nll = ((nll.sum(-1) if layout == "factored" else nll) * weight).sum() / total
    parts, extra = {"nll": nll / width}, nll.new_zeros(())
    if mixture.done is not None:
        positive = torch.as_tensor(done_weight, device=nll.device)
        error = F.binary_cross_entropy_with_logits(
            mixture.done, done, pos_weight=positive, reduction="none"
        )
        parts["done"] = (error * weight).sum() / total
        extra = extra + parts["done"]
    if mixture.reward is not None:
        parts["reward"] = ((mixture.reward - reward).square() * weight).sum() / total
        extra = extra + parts["reward"]
    if reduce == "sum":
        loss = (nll + extra) / (width + 1 + (mixture.reward is not None))
    else:
        loss = nll / width + extra
    return loss, {name: part.detach() for name, part in parts.items()}


def sample_next(
    mixture: Mixture, layout: str, pick: Tensor, noise: Tensor, temperature: float
) -> Tensor:
    """The next z (..., Z), drawn at a temperature.

    Component by softmax(logits / temperature), then mean + exp(log_std) sqrt(temperature) noise.
    At temperature 0 it is the mean of the most likely component.

    pick: uniform in [0, 1), (..., Z) for factored and (...) for joint. noise: normal, (..., Z).
    """
    if temperature <= 0:
        index = mixture.logits.argmax(-1)
    else:
        share = torch.softmax(mixture.logits / temperature, -1).cumsum(-1)
        # Rounding may leave the last sum below pick.
        index = (share <= pick[..., None]).sum(-1).clamp_max(mixture.logits.shape[-1] - 1)
    if layout == "factored":
        mean = mixture.mean.gather(-1, index[..., None])[..., 0]
        log_std = mixture.log_std.gather(-1, index[..., None])[..., 0]
    else:
        whole = index[..., None, None].expand(*index.shape, 1, noise.shape[-1])
        mean = mixture.mean.gather(-2, whole)[..., 0, :]
        log_std = mixture.log_std.gather(-2, whole)[..., 0, :]
    return mean + log_std.exp() * max(temperature, 0.0) ** 0.5 * noise


def look(image: Tensor, rows: int = 0) -> Tensor:  # (N, H, W, C) uint8 -> (N, 64, 64, C) uint8
    """What V sees of a picture: its upper rows, bilinear with antialiasing. rows 0: all of it."""
    if image.dtype != torch.uint8 or image.ndim != 4 or rows > image.shape[1]:
        raise ValueError(
            f"ha: expected uint8 pictures (N, H, W, C) with H of at least {max(rows, 1)}, got "
            f"{image.dtype} {tuple(image.shape)}; set --env.size or --env.rows"
        )
    image = image[:, :rows] if rows else image
    if tuple(image.shape[1:3]) == (SIDE, SIDE):
        return image
    planes = image.permute(0, 3, 1, 2)
    small = F.interpolate(planes, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    return small.permute(0, 2, 3, 1).contiguous()
