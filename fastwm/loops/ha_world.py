"""A whole population plays: every candidate's every episode is one lane of a single batch.

A world has `lanes`, `reset() -> features (N, F)`, and `start(raw, lanes)`, which begins a step of
the lanes that still run and returns a function that ends it: (features, reward, done) of those.
`RealWorld` is one; a dream in M is another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastwm.worldmodels.ha import MDNRNN, ConvVAE, latent_sample, look
from fastwm.worldmodels.ha_controller import ActionCode, Controller

Result = tuple[Tensor, Tensor, Tensor]
CHUNK = 128  # pictures encoded at once: the activations of more do not stay in a processor's cache


class RealWorld:
    """Environments seen through V and M.

    lanes: fastwm.envs.lanes.Lanes. code: what controller outputs mean. key: of the pictures. rows:
    of a picture that V sees. samples: lanes i and i + samples are different candidates in the same
    episode.
    noise: None for the mean of z, or the seed of draws that such lanes share.
    """

    def __init__(
        self,
        lanes: Any,
        vae: ConvVAE,
        rnn: MDNRNN,
        controller: Controller,
        code: ActionCode,
        *,
        key: str = "image",
        rows: int = 0,
        samples: int = 1,
        noise: int | None = None,
    ) -> None:
        self.env, self.vae, self.rnn, self.controller = lanes, vae, rnn, controller
        self.code, self.key, self.rows = code, key, rows
        self.samples, self.lanes = samples, lanes.num_envs
        self.device = next(vae.parameters()).device
        self.generator = None
        if noise is not None:
            self.generator = torch.Generator(self.device).manual_seed(noise)
        self.needs_rnn = controller.inputs != "z"

    @torch.inference_mode()
    def reset(self) -> Tensor:  # (N, F)
        rows = self.env.reset()
        lanes = torch.arange(self.lanes, device=self.device)
        self.z, self.state = self._see(rows[self.key], lanes), self.rnn.initial(self.lanes)
        self.fresh = torch.ones(self.lanes, device=self.device)  # 1 before the first step
        return self.controller.features(self.z, self.state)

    @torch.inference_mode()
    def start(self, raw: Tensor, lanes: Tensor) -> Callable[[], Result]:
        """Send the actions off; M advances while the environments work."""
        action = self.code.code(raw)
        self.env.send(self.code.to_env(action.cpu().numpy(), self.env.act_space), lanes.numpy())
        on_device = lanes.to(self.device)
        state = self._remember(action, on_device) if self.needs_rnn else None
        return lambda: self._finish(on_device, state)

    def _remember(self, action: Tensor, lanes: Tensor) -> tuple[Tensor, Tensor]:
        x = self.rnn.features(self.z[lanes], action, self.fresh[lanes])
        h, state = self.rnn.step(x, (self.state[0][lanes], self.state[1][lanes]))
        return state

    @torch.inference_mode()
    def _finish(self, lanes: Tensor, state: tuple[Tensor, Tensor] | None) -> Result:
        rows = self.env.receive()
        z = self._see(rows[self.key], lanes)
        self.z[lanes], self.fresh[lanes] = z, 0.0
        if state is not None:
            self.state[0][lanes], self.state[1][lanes] = state
        features = self.controller.features(
            z, state or (self.state[0][lanes], self.state[1][lanes])
        )
        reward = torch.from_numpy(rows["reward"])
        return features, reward, torch.from_numpy(rows["is_last"])

    def _see(self, image: np.ndarray, lanes: Tensor) -> Tensor:
        parts = []
        for part in torch.from_numpy(image).split(CHUNK if self.device.type == "cpu" else 4096):
            parts.append(self.vae.encode(look(part, self.rows).to(self.device, non_blocking=True)))
        mu = torch.cat([mu for mu, _ in parts])
        if self.generator is None:
            return mu
        shape = (self.samples, mu.shape[1])
        noise = torch.randn(shape, generator=self.generator, device=self.device)
        logvar = torch.cat([logvar for _, logvar in parts])
        return latent_sample(mu, logvar, noise[lanes % self.samples])

    def close(self) -> None:
        self.env.close()


class _Players:
    """The lanes of one world, with what they have reached so far."""

    def __init__(self, world: Any, controller: Controller, params: Tensor, patience: int) -> None:
        self.world, self.controller, self.params = world, controller, params
        self.patience, count = patience, world.lanes
        self.features = world.reset().clone()
        self.live = torch.arange(count)
        self.score, self.length = torch.zeros(count), torch.zeros(count, dtype=torch.int64)
        self.idle = torch.zeros(count, dtype=torch.int64)

    def start(self) -> None:
        params, width = self.params, self.features.shape[1]
        raw = self.controller.act(params, self.features.reshape(len(params), -1, width))
        raw = raw.reshape(-1, raw.shape[-1])
        if len(self.live) < self.world.lanes:
            raw = raw[self.live.to(raw.device)]
        self.finish = self.world.start(raw, self.live)

    def end(self) -> None:
        features, reward, done = self.finish()
        live, reward, done = self.live, reward.cpu(), done.cpu()
        self.features[live.to(features.device)] = features
        self.score[live] += reward
        self.length[live] += 1
        if self.patience:
            idle = torch.where(reward > 0, 0, self.idle[live] + 1)
            self.idle[live] = idle
            done = done | (idle >= self.patience)
        self.live = live[~done]


@torch.inference_mode()
def play(
    worlds: Sequence[Any],
    controller: Controller,
    params: Tensor,  # (P, size)
    *,
    limit: int,
    patience: int = 0,
) -> tuple[Tensor, Tensor]:
    """Returns and lengths (P, S) of P candidates in S episodes each.

    worlds: one, or two that take turns, so that networks and environments work at the same time;
    together they have P * S lanes, and lane p * S + s is candidate p on episode s. A lane that has
    ended is not stepped any more. limit: most steps. patience: steps without a positive reward
    after which a lane is ended, 0 for never.
    """
    lanes = sum(world.lanes for world in worlds)
    samples = lanes // len(params)
    bounds = np.cumsum([0, *(world.lanes // samples for world in worlds)])
    if lanes != len(params) * samples or bounds[-1] != len(params):
        raise ValueError(
            f"play: expected worlds with a multiple of {len(params)} lanes, got "
            f"{[world.lanes for world in worlds]}"
        )
    groups = [
        _Players(world, controller, params[first:last], patience)
        for world, first, last in zip(worlds, bounds, bounds[1:], strict=False)
    ]
    for group in groups:
        group.start()
    running, steps = list(groups), dict.fromkeys(range(len(groups)), 0)
    numbers = {id(group): i for i, group in enumerate(groups)}
    while running:
        for group in list(running):
            group.end()
            steps[numbers[id(group)]] += 1
            if len(group.live) and steps[numbers[id(group)]] < limit:
                group.start()
            else:
                running.remove(group)
    score = torch.cat([group.score for group in groups]).reshape(len(params), samples)
    return score, torch.cat([group.length for group in groups]).reshape(len(params), samples)
