"""World Models' agent: V looks, M remembers, C decides. Training is in fastwm.loops.ha."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastwm.agents.policy import FORMAT, MODES
from fastwm.spaces import Space
from fastwm.worldmodels.ha import MDNRNN, ConvVAE, latent_sample, look
from fastwm.worldmodels.ha_controller import ActionCode, Controller


def make_vae(config: Any) -> ConvVAE:
    """V as configured; channels last in memory, which its convolutions prefer."""
    vae = ConvVAE(config.vae.latent, decoder_relu=config.vae.decoder_relu)
    return vae.to(memory_format=torch.channels_last)


def make_rnn(config: Any, code: ActionCode) -> MDNRNN:
    options = config.rnn
    return MDNRNN(
        config.vae.latent,
        code.model,
        options.hidden,
        options.mixtures,
        options.mixture,
        options.reward,
        options.done,
        options.restart,
    )


def make_controller(config: Any, code: ActionCode) -> Controller:
    ctrl = config.ctrl
    return Controller(
        config.vae.latent, config.rnn.hidden, code.outputs, ctrl.inputs, ctrl.units, ctrl.bias
    )


def image_key(obs_space: dict[str, Space]) -> str:
    """The one picture with three channels among the observations."""
    keys = [k for k, s in obs_space.items() if s.kind == "image" and s.shape[2] == 3]
    if len(keys) != 1:
        raise ValueError(
            f"ha: expected one observation of kind image with 3 channels, got "
            f"{ {k: (s.kind, s.shape) for k, s in obs_space.items()} }; World Models learns from "
            "pictures, see --env.options.ignore"
        )
    return keys[0]


class HaPolicy(nn.Module):
    """V, M and C for acting. State: z, action (A), h, c, started (N,)."""

    def __init__(
        self,
        vae: ConvVAE,
        rnn: MDNRNN,
        controller: Controller,
        code: ActionCode,
        act_space: Space,
        key: str,
        rows: int,
    ) -> None:
        super().__init__()
        self.vae, self.rnn, self.controller, self.code = vae, rnn, controller, code
        self.act_space, self.key, self.rows = act_space, key, rows
        self.register_buffer("params", torch.zeros(controller.size))

    def initial_state(self, num_envs: int) -> dict[str, Tensor]:
        zeros = self.params.new_zeros
        h, c = self.rnn.initial(num_envs)
        return {
            "z": zeros(num_envs, self.vae.latent),
            "action": zeros(num_envs, self.code.model),
            "h": h,
            "c": c,
            "fresh": zeros(num_envs),
        }

    @torch.no_grad()
    def step(
        self,
        obs: dict[str, Tensor],
        state: dict[str, Tensor],
        is_first: Tensor,  # (N,) bool
        mode: str,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Actions (N, *shape) and the next state; `is_first` rows forget theirs.

        mode: "greedy" looks at the mean of z; "sample" and "train" draw it.
        """
        if mode not in MODES:
            raise ValueError(f"act: expected mode to be one of {MODES}, got {mode!r}")
        x = self.rnn.features(state["z"], state["action"], state["fresh"])
        _, (h, c) = self.rnn.step(x, (state["h"], state["c"]))
        keep = (~is_first).to(h.dtype)[:, None]
        h, c = h * keep, c * keep
        z, logvar = self.vae.encode(look(obs[self.key], self.rows))
        if mode != "greedy":
            noise = torch.randn(z.shape, generator=generator, device=z.device)
            z = latent_sample(z, logvar, noise)
        features = self.controller.features(z, (h, c))
        action = self.code.code(self.controller.act(self.params[None], features[None])[0])
        to_env = torch.from_numpy(self.code.to_env(action.cpu().numpy(), self.act_space))
        fresh = is_first.to(h.dtype)  # 1 when M will take the first step of an episode
        return to_env, {"z": z, "action": action, "h": h, "c": c, "fresh": fresh}

    def options(self) -> dict:
        controller = self.controller
        return {
            "kind": "ha",
            "vae": self.vae.options(),
            "rnn": self.rnn.options(),
            "inputs": controller.inputs,
            "units": controller.units,
            "bias": controller.bias,
            "action": self.code.kind,
            "order": list(self.code.order),
            "key": self.key,
            "rows": self.rows,
        }


class HaAgent:
    """The same interface as the other agents, for evaluation and play; it does not learn online.

    Args: obs_space, act_space: as the environments describe them. config: fastwm.config_ha.
          device: of the networks. seed: of the generator.
    """

    def __init__(
        self,
        obs_space: dict[str, Space],
        act_space: Space,
        config: Any,
        *,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.obs_space, self.act_space, self.device = obs_space, act_space, torch.device(device)
        code = ActionCode.of(config.ctrl.action, act_space)
        self.policy = HaPolicy(
            make_vae(config),
            make_rnn(config, code),
            make_controller(config, code),
            code,
            act_space,
            image_key(obs_space),
            config.env.rows,
        ).to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def replay_spec(self) -> None:
        return None

    def initial_state(self, num_envs: int) -> dict[str, Tensor]:
        return self.policy.initial_state(num_envs)

    def act(
        self,
        rows: dict[str, np.ndarray],
        state: dict[str, Tensor],
        mode: str = "greedy",
        generator: torch.Generator | None = None,
    ) -> tuple[np.ndarray, dict[str, Tensor], dict]:
        """Rows of N environments -> (action (N, *shape), the next state, no latents)."""
        key = self.policy.key
        obs = {key: torch.from_numpy(rows[key]).to(self.device)}
        first = torch.from_numpy(rows["is_first"]).to(self.device)
        action, state = self.policy.step(obs, state, first, mode, generator or self.generator)
        return action.numpy(), state, {}

    def state_dict(self) -> dict:
        return {k: v.detach().cpu().clone() for k, v in self.policy.state_dict().items()}

    def load_state_dict(self, state: dict) -> None:
        self.policy.load_state_dict(state)


def pack(policy: HaPolicy, obs_space: dict[str, Space]) -> dict:
    """Everything that `load_policy` needs, as plain data and tensors."""
    return {
        "format": FORMAT,
        "obs_space": {policy.key: obs_space[policy.key].to_dict()},
        "act_space": policy.act_space.to_dict(),
        "options": policy.options(),
        "weights": {k: v.detach().cpu().clone() for k, v in policy.state_dict().items()},
    }


def rebuild(act_space: Space, options: dict) -> HaPolicy:
    """The policy that `HaPolicy.options` describes, with fresh weights."""
    vae, rnn = ConvVAE(**options["vae"]), MDNRNN(**options["rnn"])
    code = ActionCode.of(options["action"], act_space)
    code = ActionCode(code.kind, code.outputs, tuple(options["order"]))
    sizes = (vae.latent, rnn.hidden, code.outputs)
    controller = Controller(*sizes, options["inputs"], options["units"], options["bias"])
    return HaPolicy(vae, rnn, controller, code, act_space, options["key"], options["rows"])
