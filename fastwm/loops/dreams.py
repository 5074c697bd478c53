"""Dreams that a person can watch, or play: one world model, one step at a time, as pictures.

A dream has `reset() -> picture`, `step(action) -> (picture, reward, over)` and `pressed(keys)`,
the action that held keys mean; action None leaves the choice to the agent. Pictures are
(H, W, 3) uint8.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastwm import ops
from fastwm.agents.ha import HaPolicy
from fastwm.agents.video import to_rgb
from fastwm.checkpoint import write_with
from fastwm.episodes import EpisodeStore
from fastwm.log import gif
from fastwm.loops.ha_run import StageError
from fastwm.loops.terminal import Keys, Screen
from fastwm.nets import one_hot_encode
from fastwm.worldmodels.ha import look
from fastwm.worldmodels.ha_dream import DreamWorld

FIRST = 16  # real first pictures to start from where a run has stored none


class HaDream:
    """V, M and C of World Models. Args: as DreamWorld; seed: the first dream's, then counted up."""

    def __init__(
        self,
        policy: HaPolicy,
        starts: tuple[Tensor, Tensor],
        *,
        temperature: float,
        length: int,
        seed: int = 0,
    ) -> None:
        self.policy, self.starts, self.length, self.seed = policy, starts, length, seed
        self.temperature = temperature

    def reset(self) -> np.ndarray:
        p = self.policy
        self.world = DreamWorld(
            p.rnn,
            p.controller,
            p.code,
            self.starts,
            [self.seed],
            temperature=self.temperature,
            max_steps=self.length,
        )
        self.seed += 1
        self.features = self.world.reset()
        return self._picture()

    @torch.inference_mode()
    def step(self, action: np.ndarray | None = None) -> tuple[np.ndarray, float, bool]:
        p, world = self.policy, self.world
        world.temperature = self.temperature
        if action is None:
            chosen = p.code.code(p.controller.act(p.params[None], self.features[None])[0])
        else:
            chosen = torch.as_tensor(action, dtype=torch.float32, device=world.device)[None]
        self.features, reward, over = world.step(chosen, torch.zeros(1, dtype=torch.int64))
        return self._picture(), float(reward), bool(over)

    @torch.inference_mode()
    def _picture(self) -> np.ndarray:
        image = self.policy.vae.decode(self.world.z)[0].permute(1, 2, 0)
        return (image * 255).round().to(torch.uint8).cpu().numpy()

    def pressed(self, keys: set[str]) -> np.ndarray:
        across = float("right" in keys) - float("left" in keys)
        if self.policy.code.kind == "car":
            return np.array([across, "up" in keys, 0.8 * ("down" in keys)], np.float32)
        return _along(across, keys, self.policy.code.model)


def _along(across: float, keys: set[str], size: int) -> np.ndarray:
    """Arrows move the first two elements of an action in [-1, 1]."""
    action = np.zeros(size, np.float32)
    action[0] = across
    if size > 1:
        action[1] = float("up" in keys) - float("down" in keys)
    return action


def ha_starts(folder: Path, config: Any, policy: HaPolicy, make_envs: Callable) -> tuple:
    """mu and logvar (E, Z) of first pictures: the run's stored ones, or of some real episodes."""
    data = Path(config.data_dir) if config.data_dir else folder / "data"
    paths = [folder / "latents" / f"{name}.npy" for name in ("mu", "logvar")]
    if all(path.is_file() for path in paths) and (data / "index.json").is_file():
        first = EpisodeStore(data).starts[: config.dream.starts]
        arrays = [np.load(path, mmap_mode="r") for path in paths]
        if len(first) and first[-1] < len(arrays[0]):
            return tuple(torch.from_numpy(np.array(a[first], np.float32)) for a in arrays)
    env = make_envs(FIRST, config.seed)
    try:
        image = torch.from_numpy(env.reset()[policy.key])
    finally:
        env.close()
    with torch.inference_mode():
        return policy.vae.encode(look(image, policy.rows).to(policy.params.device))


class DreamerDream:
    """Imagination of a Dreamer agent: `context` real steps, then only what it predicts.

    agent: DreamerAgent. make_envs: (num_envs, seed) -> VecEnv. length: most steps.
    """

    temperature = None  # its prior is sampled as it is

    def __init__(
        self, agent: Any, make_envs: Callable, *, length: int, context: int = 20, seed: int = 0
    ) -> None:
        self.agent, self.make_envs, self.length = agent, make_envs, length
        self.context, self.seed = context, seed
        self.world, self.policy = agent.model.world, agent.policy
        keys = self.world.decoder.image_keys
        if not keys:
            raise StageError(
                "expected a run with image observations, got "
                f"{sorted(agent.obs_space)}; there is nothing to see"
            )
        self.key, self.space = keys[0], agent.act_space

    @torch.inference_mode()
    def reset(self) -> np.ndarray:
        """Plays `context` real steps and goes on from what the model then believes."""
        agent, env = self.agent, self.make_envs(1, self.seed)
        self.generator = torch.Generator(agent.device).manual_seed(self.seed)
        self.seed, self.steps = self.seed + 1, 0
        try:
            rows, state = env.reset(), agent.initial_state(1)
            for t in range(self.context + 1):
                action, state, _ = agent.act(rows, state, "sample", self.generator)
                if t == self.context or rows["is_last"][0]:
                    break
                rows = env.step(action)
        finally:
            env.close()
        self.deter, self.stoch, self.chosen = state["deter"], state["stoch"], state["action"]
        return self._picture()

    @torch.inference_mode()
    def step(self, action: np.ndarray | None = None) -> tuple[np.ndarray, float, bool]:
        if action is not None:
            self.chosen = self._encode(action)
        rssm, device = self.world.rssm, self.agent.device
        noise = torch.rand(1, 1, rssm.stoch, generator=self.generator, device=device)
        features, _ = rssm.imagine(self.deter, self.stoch, lambda f: self.chosen, 1, noise)
        self.deter, self.stoch = (part[:, 1] for part in rssm.split(features))
        now = features[:, 1]
        reward = ops.twohot_mean(self.world.reward(now), self.world.reward_bins)
        over = bool(self.world.cont(now) < 0)  # less than one half
        actor = self.policy.actor
        self.chosen = actor(now).sample(actor.noise((1,), self.generator))
        self.steps += 1
        return self._picture(), float(reward), over or self.steps >= self.length

    def _encode(self, action: np.ndarray) -> Tensor:
        action = torch.as_tensor(action, device=self.agent.device)[None]
        if self.space.kind == "discrete":
            return one_hot_encode(action, self.space.classes, 1)
        return action.float()

    def _picture(self) -> np.ndarray:
        recon = self.world.decoder(self.deter[:, None], self.stoch.flatten(-2)[:, None])
        image = to_rgb(recon[self.key][0, 0]).clamp(0, 1)
        return (image * 255).round().to(torch.uint8).cpu().numpy()

    def pressed(self, keys: set[str]) -> np.ndarray:
        across = float("right" in keys) - float("left" in keys)
        if self.space.kind == "continuous":
            return _along(across, keys, self.space.shape[0])
        digits = [int(key) for key in keys if key.isdigit()]
        choice = digits[0] if digits else {-1: 1, 1: 2}.get(int(across), 0)
        counts = np.reshape(self.space.classes, self.space.shape)
        return np.minimum(np.full(self.space.shape, choice), counts - 1).astype(np.int64)


def film(dream: Any, folder: Path, episodes: int, fps: int, scale: int) -> None:
    """Every episode as a GIF."""
    for episode in range(episodes):
        frames, total, over = [dream.reset()], 0.0, False
        while not over:
            image, reward, over = dream.step()
            frames.append(image)
            total += reward
        large = [f.repeat(scale, 0).repeat(scale, 1) for f in frames]
        path = folder / f"dream-{episode:03d}.gif"
        data = gif(large, fps)
        write_with(path, lambda partial, data=data: partial.write_bytes(data))
        print(f"dream {episode}: return {total:.6g}, {len(frames) - 1} steps   {path}")


def play(dream: Any, fps: int, keys_help: str) -> None:
    """Until q: the agent acts until a key takes over."""
    with Keys() as keys, Screen() as screen:
        mine, running = False, True
        while running:
            image, total, steps, over = dream.reset(), 0.0, 0, False
            while running and not over:
                began = time.monotonic()
                pressed = set(keys.read())
                running, again = "q" not in pressed, "r" in pressed
                mine = "c" not in pressed and (mine or bool(pressed - set("cqr+-=")))
                if dream.temperature is not None:
                    step = 0.05 * (bool(pressed & {"+", "="}) - ("-" in pressed))
                    dream.temperature = max(0.0, dream.temperature + step)
                image, reward, over = dream.step(dream.pressed(keys.held()) if mine else None)
                total, steps = total + reward, steps + 1
                heat = "" if dream.temperature is None else f" temperature {dream.temperature:.2f}"
                who = "you" if mine else "agent"
                screen.show(image, f"{who}: {total:.4g} after {steps} steps{heat}   {keys_help}")
                over = over or again
                time.sleep(max(0.0, 1 / fps - (time.monotonic() - began)))
            if running and not again:
                screen.show(image, f"it ended after {steps} steps; any key begins another, q ends")
                running = "q" not in keys.read(wait=3600)
