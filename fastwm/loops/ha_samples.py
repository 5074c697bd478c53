"""Pictures of what V and M have learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastwm.worldmodels.ha import MDNRNN, ConvVAE, latent_sample, sample_next

SAMPLES = 13  # branch of the run's seed
GAP = 2  # px between pictures


def to_bytes(image: Tensor) -> np.ndarray:  # (N, 3, H, W) in [0, 1] -> (N, H, W, 3) uint8
    image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return image.permute(0, 2, 3, 1).cpu().numpy()


def grid(rows: list[np.ndarray], scale: int = 2) -> np.ndarray:
    """Rows of pictures (N, H, W, 3) as one, white lines between them."""
    lines = []
    for row in rows:
        row = row.repeat(scale, 1).repeat(scale, 2)
        row = np.pad(row, ((0, 0), (GAP, 0), (GAP, 0), (0, 0)), constant_values=255)
        lines.append(np.concatenate(list(row), 1))
    return np.concatenate(lines, 0)


@torch.inference_mode()
def vae_samples(run: Any, vae: ConvVAE, frames: Any, epoch: int) -> None:
    """samples/vae-<epoch>.png: pictures, their reconstructions, and what V makes of noise."""
    index = np.linspace(0, len(frames) - 1, 8).astype(np.int64)
    image = torch.from_numpy(frames.batch(index)).to(run.device)
    recon = vae.decode(vae.encode(image)[0])
    noise = torch.randn(8, vae.latent, generator=run.generator(SAMPLES)).to(run.device)
    rows = [image.cpu().numpy(), to_bytes(recon), to_bytes(vae.decode(noise))]
    path = run.picture(f"vae-{epoch:04d}", grid(rows))
    run.logger.say(f"look     {path}: pictures, reconstructions, draws from the prior")


@torch.inference_mode()
def dream_samples(
    run: Any, vae: ConvVAE, rnn: MDNRNN, episodes: np.ndarray, epoch: int, warm: int = 20
) -> None:
    """samples/dream-<epoch>.gif and .png: an episode above M's dream of it, under its actions.
    In later rounds dream-<round>-<epoch>.

    M sees the first `warm` pictures, after that only the actions.
    """
    store = run.store()
    lengths = store.lengths[episodes]
    episode = store.episode(int(episodes[int(lengths.argmax())]))
    count = min(len(episode["image"]), 120)
    image = torch.from_numpy(np.array(episode["image"][:count])).to(run.device)
    action = torch.from_numpy(np.array(episode["action"][:count])).to(run.device)
    mu, logvar = vae.encode(image)
    draw, shown = run.generator(SAMPLES, 1), []
    state, z = rnn.initial(1), mu[:1]
    state = tuple(s.to(run.device) for s in state)
    for t in range(count):
        noise = torch.randn(1, rnn.latent, generator=draw).to(run.device)
        if t < warm:
            z = latent_sample(mu[t : t + 1], logvar[t : t + 1], noise)
        shown.append(z)
        fresh = torch.full((1,), float(t == 0), device=run.device)
        h, state = rnn.step(rnn.features(z, action[t : t + 1], fresh), state)
        shape = (1, rnn.latent) if rnn.mixture == "factored" else (1,)
        pick = torch.rand(shape, generator=draw).to(run.device)
        temperature = run.config.dream.temperature
        z = sample_next(rnn.predict(h), rnn.mixture, pick, noise, temperature)
    truth, dream = image.cpu().numpy(), to_bytes(vae.decode(torch.cat(shown)))
    frames = np.stack([grid([a[None], b[None]], 3) for a, b in zip(truth, dream, strict=True)])
    name = f"dream-{run.round + 1}-{epoch:04d}" if run.round else f"dream-{epoch:04d}"
    path = run.film(name, frames)
    picked = np.linspace(0, count - 1, 10).astype(np.int64)
    run.picture(name, grid([truth[picked], dream[picked]]))
    run.logger.say(f"look     {path}: an episode, and the dream of it after {warm} steps")
