"""The acting half of an agent: observations in, actions out; loads with torch alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastwm import behavior, behavior_2023, nets, nets_2023, ops, rssm, rssm_2023
from fastwm.behavior import Actor
from fastwm.nets import Encoder, WeightWatch
from fastwm.ops.rssm import packed_posterior
from fastwm.rssm import RSSM, feat
from fastwm.spaces import Space

MODES = ("train", "sample", "greedy", "random")
FORMAT = "fastwm-policy-1"
NETWORKS = {  # what a policy file's options["networks"] names
    "2024": (nets.Encoder, rssm.RSSM, behavior.Actor),
    "2023": (nets_2023.Encoder, rssm_2023.RSSM, behavior_2023.Actor),
}


class PackedStep:
    """The acting step on weights that were packed once: a call each for what comes before the
    recurrent step, that step, and the actor. It sees no later change of the weights.

    Pictures still go through the encoder's own layers.
    """

    def __init__(self, encoder: Encoder, rssm: RSSM, actor: Actor) -> None:
        weights, self.rssm = rssm.weights(), rssm
        self.posterior = packed_posterior(weights, rssm.stoch)
        (weight, bias, _), layers = weights.post[0], []
        self.encode, squash = encoder, False
        if not encoder.image_keys:
            self.keys, self.encode = encoder.vector_keys, encoder.encode_vectors
            squash = encoder.symlog
            squash &= all(encoder.space[key].kind == "vector" for key in self.keys)
            layers = [tensor for layer in encoder.mlp for tensor in layer.tensors()]
            self.encode = self.join if squash else self.encode
        self.tokens = ops.packed_mlp([*layers, weight[:, rssm.deter :], bias], squash)
        heads = list(actor.heads.values())
        output = [torch.cat([head.weight for head in heads]), torch.cat([h.bias for h in heads])]
        layers = [tensor for layer in actor.mlp for tensor in layer.tensors()]
        self.actor = ops.packed_mlp([*layers, *output])
        self.sizes = [len(head.bias) for head in heads]

    def join(self, obs: dict[str, Tensor]) -> Tensor:  # (N, ...) -> (N, in)
        parts = [obs[key].float().flatten(1) for key in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def observe(
        self, obs: dict[str, Tensor], state: dict[str, Tensor], is_first: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As the encoder and the posterior step: deter (N, D), stoch (N, S, K)."""
        tokens = self.tokens(self.encode(obs))
        args = (state["action"], is_first, noise, self.rssm.unimix)
        return self.posterior.advance(state["deter"], state["stoch"], tokens, *args)

    def heads(self, features: Tensor) -> tuple[Tensor, ...]:  # (N, F) -> (N, A) each
        return self.actor(features).split(self.sizes, -1)


class RecurrentPolicy(nn.Module):
    """Steps the posterior and the actor. State: deter (N, D), stoch (N, S, K), action (N, A)."""

    def __init__(self, encoder: Encoder, rssm: RSSM, actor: Actor) -> None:
        super().__init__()
        self.encoder, self.rssm, self.actor = encoder, rssm, actor
        self._packed: dict[str, PackedStep | WeightWatch | Actor | None] = {}

    def packed(self, actor: Actor) -> PackedStep | None:
        """The step on packed weights, made again when they have changed; None where there is none:
        other networks than those of 2024, too deep ones, no kernels, a GPU, or low precision."""
        parts = (self.encoder, self.rssm, actor)
        first = self.rssm.gru.bias if type(self.rssm) is RSSM else None
        if first is None or first.is_cuda or not ops.available(first, "mlp"):
            return None
        if first.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return None
        kept = self._packed
        if kept.get("actor") is not actor:
            kept.update(actor=actor, watch=WeightWatch(*parts))
        if kept["watch"].changed():
            step = PackedStep(*parts)
            # What is larger than the kernels take runs layer by layer.
            whole = all((step.posterior, step.tokens, step.actor))
            kept["step"] = step if whole else None
        return kept["step"]

    def initial_state(self, num_envs: int) -> dict[str, Tensor]:
        deter, stoch = self.rssm.initial(num_envs)
        action = deter.new_zeros(num_envs, self.actor.space.encoded_size)
        return {"deter": deter, "stoch": stoch, "action": action}

    @torch.no_grad()
    def step(
        self,
        obs: dict[str, Tensor],  # (N, ...)
        state: dict[str, Tensor],
        is_first: Tensor,  # (N,) bool
        mode: str,
        generator: torch.Generator,
        actor: Actor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Actions (N, *shape) and the next state; `is_first` rows forget theirs.

        actor: in place of the policy's own.

        mode: "train" and "sample" draw actions, "greedy" takes the most likely ones, "random" draws
        them without looking.
        """
        if mode not in MODES:
            raise ValueError(f"act: expected mode to be one of {MODES}, got {mode!r}")
        actor, count = actor or self.actor, is_first.shape[0]
        packed = self.packed(actor)
        noise = torch.rand(count, self.rssm.stoch, generator=generator, device=generator.device)
        if packed is not None:
            deter, stoch = packed.observe(obs, state, is_first, noise)
        else:
            tokens = self.encoder({key: value.unsqueeze(1) for key, value in obs.items()})
            args = (tokens.squeeze(1), state["action"], is_first, noise)
            deter, stoch = self.rssm.step(state["deter"], state["stoch"], *args)
        if mode == "random":
            action = self.actor.random(count, generator)
        else:
            draw = None if mode == "greedy" else self.actor.noise((count,), generator)
            features = feat(deter, stoch)
            plain = packed is None
            dist = actor(features) if plain else actor.distribution(packed.heads(features))
            action = dist.sample(draw)
        return self.actor.to_env(action), {"deter": deter, "stoch": stoch, "action": action}


class LoadedPolicy:
    """A trained policy: `action, state = policy(obs, state, is_first)`.

    obs_space, act_space: what it takes and gives (fastwm.spaces.Space).
    """

    def __init__(
        self, policy: nn.Module, obs_space: dict[str, Space], act_space: Space, seed: int
    ) -> None:
        self.policy = policy.eval()
        self.obs_space, self.act_space = obs_space, act_space
        self.device = next(policy.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def __call__(
        self,
        obs: dict[str, np.ndarray | Tensor],
        state: dict[str, Tensor] | None = None,
        is_first: np.ndarray | Tensor | None = None,
        mode: str = "greedy",
    ) -> tuple[np.ndarray, dict[str, Tensor]]:
        """One step of a batch of N environments.

        obs: arrays (N, *shape) by key. state: what the last call returned, None at the start.
        is_first: (N,) bool, True where a new episode begins; None for "only without a state".
        Returns actions (N, *shape) as the environment takes them, and the next state.
        """
        missing = sorted(set(self.obs_space) - set(obs))
        if missing:
            raise ValueError(
                f"policy: expected observations {sorted(self.obs_space)}, got {sorted(obs)}; "
                f"add {missing}"
            )
        tensors = {}
        for key, space in self.obs_space.items():
            tensors[key] = torch.as_tensor(obs[key]).to(self.device)
            if tuple(tensors[key].shape[1:]) != space.shape:
                raise ValueError(
                    f"policy: expected obs[{key!r}] of shape (N, *{space.shape}), "
                    f"got {tuple(tensors[key].shape)}"
                )
            if space.kind == "image" and tensors[key].dtype != torch.uint8:
                raise TypeError(
                    f"policy: expected obs[{key!r}] as uint8 from 0 to 255, "
                    f"got {tensors[key].dtype}"
                )
        count = len(next(iter(tensors.values())))
        if is_first is None:
            is_first = torch.full((count,), state is None)
        state = self.policy.initial_state(count) if state is None else state
        first = torch.as_tensor(is_first).to(self.device)
        action, state = self.policy.step(tensors, state, first, mode, self.generator)
        return action.cpu().numpy(), state


def pack_policy(policy: RecurrentPolicy, obs_space: dict[str, Space], options: dict) -> dict:
    """Everything that `load_policy` needs, as plain data and tensors."""
    return {
        "format": FORMAT,
        "obs_space": {key: space.to_dict() for key, space in obs_space.items()},
        "act_space": policy.actor.space.to_dict(),
        "options": options,
        "weights": {k: v.detach().cpu().clone() for k, v in policy.state_dict().items()},
    }


def load_policy(
    path: str | Path, *, device: str | torch.device = "cpu", seed: int = 0
) -> LoadedPolicy:
    """Load a policy for acting; needs torch and nothing else.

    path: a policy file, or a run folder (then its `checkpoint/policy.pt`).
    Raises FileNotFoundError, or ValueError if the file is damaged or holds something else.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint" / "policy.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"load_policy: expected a policy file or a run folder with checkpoint/policy.pt, got "
            f"{path}; a run writes it with its first checkpoint"
        )
    try:
        data = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch reports damage as any of a dozen types
        raise ValueError(
            f"load_policy: expected a policy file ({FORMAT}), got {path} cut off or damaged "
            f"({path.stat().st_size} bytes: {type(error).__name__}); write it again"
        ) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(
            f"load_policy: expected a policy file ({FORMAT}), got something else in {path}; "
            "train with this version or pass the run folder"
        )
    obs_space = {key: Space.from_dict(space) for key, space in data["obs_space"].items()}
    act_space, options = Space.from_dict(data["act_space"]), data["options"]
    policy = _rebuild(obs_space, act_space, options)
    policy.load_state_dict(data["weights"])
    return LoadedPolicy(policy.to(device), obs_space, act_space, seed)


def _rebuild(obs_space: dict[str, Space], act_space: Space, options: dict) -> nn.Module:
    """The policy that the options describe, with fresh weights."""
    if options.get("kind") == "modular":
        from fastwm.agents.modular_policy import rebuild

        return rebuild(obs_space, act_space, options)
    if options.get("kind") == "ha":
        from fastwm.agents.ha import rebuild

        return rebuild(act_space, options)
    encoder_type, rssm_type, actor_type = NETWORKS[options.get("networks", "2024")]
    encoder = encoder_type(obs_space, **options["encoder"])
    core = rssm_type(encoder.out_features, act_space.encoded_size, **options["rssm"])
    return RecurrentPolicy(encoder, core, actor_type(core.feat_size, act_space, **options["actor"]))
