"""What the Dreamers have in common: spaces, precision, acting, noise, reports, what is saved."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastwm.agents import defaults
from fastwm.agents.acting import GraphedActing
from fastwm.agents.policy import RecurrentPolicy, pack_policy
from fastwm.agents.video import open_loop_video
from fastwm.behavior import Actor
from fastwm.cudagraph import CudaRecorder
from fastwm.settings import ConfigError
from fastwm.spaces import Space
from fastwm.worldmodels.dreamer import Posterior


class Noise(NamedTuple):
    """Every random draw of one update; None stands for the mode.

    posterior (B, T, S) and prior (I, N, S) are uniform; action (I+1, N, ...) is what
    `Actor.noise` draws, with N = B*T. explore holds prior and action for the explorer's rollout.
    """

    posterior: Tensor | None
    prior: Tensor | None
    action: Tensor | None
    explore: tuple[Tensor, Tensor] | None = None


class DreamerBase:
    """A model with `world` and `actor`, its noise and its policy; subclasses say how it learns.

    obs_space, act_space: see fastwm.spaces. config: of the algorithm. model: its networks, a type
    that takes these three.
    The same seed, data and device give the same agent bit for bit on a CPU.
    """

    def __init__(
        self,
        obs_space: dict[str, Space],
        act_space: Space,
        config: Any,
        model: type[nn.Module],
        device: str | torch.device,
        seed: int,
    ) -> None:
        self.config, self.device = config, torch.device(device)
        self.obs_space, self.act_space = dict(obs_space), act_space
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = model(obs_space, act_space, config).to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.act_generator = torch.Generator(self.device).manual_seed(seed + (1 << 40))
        self.policy = RecurrentPolicy(
            self.model.world.encoder, self.model.world.rssm, self.model.actor
        )
        # Class indices travel in the smallest type that holds them.
        self.index_dtype = torch.uint8 if config.rssm.classes <= 256 else torch.int32
        self.updates = self.acted = 0  # acted: env_steps of training
        self.loss_terms: dict[str, Tensor] = {}
        # A replay in GPU memory takes latents where they are.
        self.latents_stay = self.device.type == "cuda" and config.replay.storage == "cuda"
        self.acting: GraphedActing | None = None
        if self.graphs():
            noise = torch.Generator(self.device)
            recorder = CudaRecorder([noise])
            self.acting = GraphedActing(self.decide, noise, recorder, self.latents_stay)

    def graphs(self) -> bool:
        """Whether CUDA graphs are wanted."""
        wanted = self.config.cudagraphs
        if wanted == "on" and self.device.type != "cuda":
            raise ConfigError(
                f"{type(self).__name__}: expected cudagraphs auto or off on device {self.device}, "
                "got on; graphs are of CUDA"
            )
        return defaults.chosen("cudagraphs", wanted, self.device) == "on"

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def parameter_counts(self) -> dict[str, int]:
        """Trainable parameters by part, and in total (the slow critic does not count)."""
        world = self.model.world
        parts = {
            "rssm": world.rssm,
            "encoder": world.encoder,
            "decoder": world.decoder,
            "reward": world.reward,
            "cont": world.cont,
            "actor": self.model.actor,
            "critic": self.model.critic.net,
        }
        parts |= {"explorer": self.model.explorer} if self.model.explorer else {}
        counts = {name: sum(p.numel() for p in m.parameters()) for name, m in parts.items()}
        return counts | {"total": sum(counts.values())}

    def replay_spec(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype name of every key of a replay row, latents included."""
        rssm = self.model.world.rssm
        index = str(self.index_dtype).removeprefix("torch.")
        spec = {key: ((), "bool") for key in ("is_first", "is_last", "is_terminal")}
        spec |= {
            "action": (self.act_space.shape, self.act_space.dtype),
            "reward": ((), "float32"),
            "deter": ((rssm.deter,), "bfloat16"),
            "stoch": ((rssm.stoch,), index),
        }
        taken = sorted(set(spec) & set(self.obs_space))
        if taken:
            raise ValueError(
                f"{type(self).__name__}: expected other observation names than {sorted(spec)}, "
                f"got {taken}; rename them in the environment"
            )
        return spec | {key: (space.shape, space.dtype) for key, space in self.obs_space.items()}

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16: what "auto" stands for on this device."""
        return defaults.chosen("precision", self.config.precision, self.device)

    def autocast(self):
        if self.precision == "fp32":
            return nullcontext()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return torch.autocast(self.device.type, dtype)

    # Acting

    def initial_state(self, num_envs: int) -> dict[str, Tensor]:
        return self.policy.initial_state(num_envs)

    def act(
        self,
        rows: dict[str, np.ndarray],
        state: dict[str, Tensor],
        mode: str = "train",
        generator: torch.Generator | None = None,
    ) -> tuple[np.ndarray, dict[str, Tensor], dict[str, Tensor]]:
        """Actions (N, *shape) for a row of every environment.

        rows: observations and is_first (see fastwm.envs). mode: "train" and "sample" draw actions,
        "greedy" takes the mode. generator: source of noise, the agent's own by default.
        Returns actions, the next state, and the latents to store: deter (N, D), stoch (N, S), on
        the host unless the replay lies on the GPU. On a GPU a decision is one launch, see `acting`.
        """
        obs = {key: torch.as_tensor(rows[key]) for key in (*self.obs_space, "is_first")}
        source = self.act_generator if generator is None else generator
        mode, actor = self.who_acts(mode, len(obs["is_first"]))
        if self.acting is not None and mode != "random":
            action, state, latents = self.acting(obs, state, mode, source, actor)
            return action.numpy(), state, latents
        obs = {key: value.to(self.device) for key, value in obs.items()}
        action, state, latents = self.decide(obs, state, mode, source, actor)
        if not self.latents_stay:
            latents = {key: value.cpu() for key, value in latents.items()}
        return action.cpu().numpy(), state, latents

    def decide(
        self,
        rows: dict[str, Tensor],
        state: dict[str, Tensor],
        mode: str,
        generator: torch.Generator,
        actor: Actor,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """All of `act` that a CUDA graph can hold: actions, the next state, latents.

        In float32 whatever the precision of updates: a few rows are over when the weights are read,
        and to round these first would be to read them twice.
        """
        obs = {key: rows[key] for key in self.obs_space}
        action, state = self.policy.step(obs, state, rows["is_first"], mode, generator, actor)
        return action, state, self.latents(state)

    def who_acts(self, mode: str, count: int) -> tuple[str, Actor]:
        """How actions are chosen, and by whom: in training by the explorer while it is wanted."""
        expl, acted = self.config.expl, self.acted
        self.acted += count if mode in ("train", "random") else 0
        if mode != "train" or expl.behavior == "greedy" or 0 < expl.until <= acted:
            return mode, self.model.actor
        if expl.behavior == "random":
            return "random", self.model.actor
        return mode, self.model.explorer.actor

    def latents(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a replay row keeps of an acting state."""
        return {
            "deter": state["deter"].to(torch.bfloat16),
            "stoch": state["stoch"].argmax(-1).to(self.index_dtype),
        }

    # Learning

    def draw_noise(self, batch: int, length: int) -> Noise:
        rssm, horizon = self.model.world.rssm, self.config.imag_horizon
        starts = batch * min(self.config.imag_last or length, length)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=self.generator, device=self.device)

        def rollout() -> tuple[Tensor, Tensor]:
            action = self.model.actor.noise((horizon + 1, starts), self.generator)
            return uniform(horizon, starts, rssm.stoch), action

        posterior, (prior, action) = uniform(batch, length, rssm.stoch), rollout()
        return Noise(posterior, prior, action, rollout() if self.model.explorer else None)

    def starts(self, post: Posterior, last: int) -> tuple[Tensor, Tensor]:
        """Where imagination begins, (N, D) and (N, S, K): the last rows of the posterior."""
        return tuple(x[:, -last:].detach().flatten(0, 1) for x in (post.deter, post.stoch))

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def first_nonfinite(self, batch: dict[str, Tensor]) -> str:
        """Name of the first bad tensor of the last update, in the order data flows."""
        groups = {
            "batch": {k: v for k, v in batch.items() if v.is_floating_point()},
            "param": dict(self.model.named_parameters()),
            "loss": self.loss_terms,
            "grad": {n: p.grad for n, p in self.trainable() if p.grad is not None},
        }
        for group, tensors in groups.items():
            for name, tensor in tensors.items():
                if not torch.isfinite(tensor.float()).all():
                    return f"{group}/{name}"
        return "none"

    @torch.no_grad()
    def report(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Open-loop videos by image key: (T, H, W, 3) uint8, truth over model over error."""
        world = self.model.world
        if not world.decoder.image_keys:
            return {}
        batch = {key: value[:6] for key, value in self.to_device(batch).items()}
        rows, length = batch["is_first"].shape
        context = max(1, min(length // 2, 16))
        source = torch.Generator(self.device).manual_seed(self.config.seed)
        shape = {"generator": source, "device": self.device}
        noise = torch.rand(rows, context, world.rssm.stoch, **shape)
        imag_noise = torch.rand(length - context, rows, world.rssm.stoch, **shape)
        recon = world.open_loop(batch, context, noise, imag_noise)
        return {
            f"openloop/{key}": open_loop_video(batch[key], recon[key], context) for key in recon
        }

    def save_policy(self, path: str | Path) -> None:
        """Write what acting needs, for `fastwm.load_policy`."""
        rssm = asdict(self.config.rssm)
        rssm.pop("free_nats")
        options = {"encoder": asdict(self.config.encoder), "rssm": rssm} | self.actor_options()
        torch.save(pack_policy(self.policy, self.obs_space, options), path)

    def actor_options(self) -> dict[str, Any]:
        """What else a policy file says: the actor's network, and whose networks they are."""
        return {"actor": asdict(self.config.actor)}

    # State

    def state_dict(self) -> dict:
        """Everything that the next update depends on, but for the optimizer."""
        return {
            "model": self.model.state_dict(),
            "generator": self.generator.get_state(),
            "act_generator": self.act_generator.get_state(),
            "updates": self.updates,
            "acted": self.acted,
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.generator.set_state(state["generator"].cpu())
        self.act_generator.set_state(state["act_generator"].cpu())
        self.updates, self.acted = int(state["updates"]), int(state.get("acted", 0))
