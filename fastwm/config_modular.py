"""Settings of the modular recipe. The defaults are those of its document; see guide_modular.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fastwm.config_common import Training, group, key


@dataclass(frozen=True)
class Component:
    name: str = key("auto", "component, or package.module:Class of your own", fixed=True)
    options: dict = key({}, "its settings: --<slot>.options.NAME VALUE", fixed=True)


@dataclass(frozen=True)
class ModularConfig(Training):
    """World model, actor and critic from exchangeable components, with an optimizer each."""

    algorithm: str = key("modular", "what trains", fixed=True)
    envs: int = key(8, "environments N stepped together", 1, fixed=True)
    batch_length: int = key(32, "rows T per sequence", 1, fixed=True)
    train_ratio: float = key(64.0, "replayed rows per env_step", 0)
    world_model_lr: float = key(1e-4, "learning rate of the world model, decoder included", 0)
    actor_lr: float = key(3e-5, "learning rate of the policy", 0)
    critic_lr: float = key(3e-5, "learning rate of the value", 0)
    adam_eps: float = key(1e-8, "added to the root of Adam's second moment", 0)
    max_grad_norm: float = key(1.0, "largest gradient norm of each of the three; 0: any", 0)
    world_model_warmup_steps: int = key(1000, "env_steps that train the world model alone", 0)
    world_model_updates_per_batch: int = key(1, "world-model steps per batch", 0)
    actor_updates_per_batch: int = key(1, "actor steps per batch", 0)
    critic_updates_per_batch: int = key(1, "critic steps per batch", 0)
    imagination_horizon: int = key(15, "imagined steps H", 1)
    imagination_gumbel_tau: float = key(1.0, "temperature of relaxed discrete actions", 1e-6)
    imagination_gumbel_hard: bool = key(True, "one-hot actions in the forward pass")
    imagination_discount_weights: bool = key(
        False, "imagined steps count as much as they are likely to be reached"
    )
    gamma: float = key(0.99, "discount per env_step", 0, 1)
    lambda_return: float = key(0.95, "lambda of the lambda-return", 0, 1)
    entropy_coef: float = key(0.01, "weight of the policy's entropy", 0)
    decoder_loss_weight: float = key(1.0, "weight of the reconstruction loss", 0)
    multi_step_loss_weight: float = key(0.0, "weight of the loss over several steps; 0: off", 0)
    representation_loss_weight: float = key(1.0, "weight of the representation's own loss", 0)
    decoder_mode: Literal["accumulate", "replace", "none"] = key(
        "accumulate", "what the metric representation_loss shows: own + decoder, decoder, own"
    )
    dynamics_detach_target: bool = key(False, "one-step loss trains only the prediction")
    multi_step_detach_target: bool = key(True, "multi-step loss trains only the prediction")
    reward_input: Literal["state", "next_state"] = key(
        "state", "the reward of a step is read from the state before or after it", fixed=True
    )
    continue_input: Literal["state", "next_state"] = key(
        "state", "whether a step ends the episode is read before or after it", fixed=True
    )
    observation_scale: Literal["none", "symlog", "normalize"] = key(
        "none",
        "vector observations: as they are, symlog, or running mean 0, deviation 1",
        fixed=True,
    )
    critic_target_clip: float | None = key(None, "largest magnitude of critic targets", 0)
    critic_target_standardize: bool = key(False, "critic targets to mean 0 and deviation 1")
    critic_real_return_mix: float = key(0.0, "share of one-step targets on replayed rows", 0, 1)
    actor_normalize_returns: bool = key(False, "divide the actor's returns by their deviation")
    openloop_every: int = key(20, "updates between measurements of the open-loop error; 0: none", 0)
    encoder: Component = group(Component)
    representation: Component = group(Component)
    dynamics: Component = group(Component)
    reward: Component = group(Component)
    cont: Component = group(Component)
    decoder: Component = group(Component)
    policy: Component = group(Component)
    value: Component = group(Component)

    def check(self, refuse: Callable[[str, str], None]) -> None:
        if self.batch_length < 2:
            refuse("batch_length", "at least 2 rows: a step needs the row that it leads to")
        if self.decoder.name == "none" and self.representation.name in ("auto", "identity", "gru"):
            refuse(
                "decoder.name",
                "a decoder, or a representation with a loss of its own: without either "
                "the states collapse to a constant",
            )
        super().check(refuse)
