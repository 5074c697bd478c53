"""Settings of DreamerV3 as first published, in 2023."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fastwm import config_common as common
from fastwm import config_dreamer as newer
from fastwm.config_common import group, key

HEADS = ("decoder", "reward", "cont")


@dataclass(frozen=True)
class Replay(common.Replay):
    capacity: int = key(1_000_000, "rows kept, all envs together", 1, fixed=True)
    online: bool = key(False, "feed every fresh row once before sampling uniformly")
    prefill: int = key(2500, "env_steps of random actions before the first update", 0)
    pretrain: int = key(100, "updates at once when learning begins", 0)


@dataclass(frozen=True)
class Encoder:
    depth: int = key(
        32, "channels of the first convolution; each next one has twice", 1, fixed=True
    )
    minres: int = key(4, "pixels of the shorter side behind the last convolution", 1, fixed=True)
    layers: int = key(5, "dense layers for vector observations", 1, fixed=True)
    units: int = key(1024, "width of the dense layers", 1, fixed=True)
    symlog: bool = key(True, "symlog vector observations first", fixed=True)
    cnn_keys: str = key(".*", "images to read, a regular expression", fixed=True)
    mlp_keys: str = key(".*", "other observations to read, a regular expression", fixed=True)


@dataclass(frozen=True)
class Decoder:
    depth: int = key(32, "channels before the last convolution; each one above has twice", 1,
                     fixed=True)  # fmt: skip
    minres: int = key(4, "pixels of the shorter side before the first convolution", 1, fixed=True)
    layers: int = key(5, "dense layers for vector observations", 1, fixed=True)
    units: int = key(1024, "width of the dense layers", 1, fixed=True)
    sigmoid: bool = key(False, "squash images; otherwise the network's output plus a half")
    cnn_keys: str = key(".*", "images to predict, a regular expression", fixed=True)
    mlp_keys: str = key(".*", "other observations to predict, a regular expression", fixed=True)


@dataclass(frozen=True)
class RSSM:
    deter: int = key(512, "size D of the deterministic state", 1, fixed=True)
    hidden: int = key(512, "width U of the layers around it", 1, fixed=True)
    stoch: int = key(32, "variables S of the stochastic state", 1, fixed=True)
    classes: int = key(32, "classes K per variable, for latent = onehot", 2, fixed=True)
    latent: Literal["onehot", "normal"] = key("onehot", "what the variables are", fixed=True)
    mean: Literal["none", "tanh5"] = key("none", "what bounds the mean, for latent = normal")
    std: Literal["sigmoid2", "softplus", "sigmoid", "abs"] = key(
        "sigmoid2", "what makes the standard deviation positive, for latent = normal"
    )
    min_std: float = key(0.1, "smallest standard deviation, for latent = normal", 0)
    obslayers: int = key(1, "layers of the posterior", 1, fixed=True)
    imglayers: int = key(1, "layers of the prior", 1, fixed=True)
    unimix: float = key(0.01, "share of the uniform distribution, for latent = onehot", 0, 1)
    free_nats: float = key(1.0, "KL below which its loss is constant, nats", 0)
    initial: Literal["learned", "zeros"] = key("learned", "state before an episode", fixed=True)


@dataclass(frozen=True)
class Reward(newer.Reward):
    layers: int = key(2, "dense layers", 1, fixed=True)
    units: int = key(512, "width", 1, fixed=True)


@dataclass(frozen=True)
class Cont(newer.Cont):
    layers: int = key(2, "dense layers", 1, fixed=True)
    units: int = key(512, "width", 1, fixed=True)


@dataclass(frozen=True)
class Actor(newer.Actor):
    layers: int = key(2, "dense layers", 1, fixed=True)
    units: int = key(512, "width", 1, fixed=True)
    outscale: float = key(1.0, "variance of the last layer's initial weights", 0)
    grad: Literal["auto", "reinforce", "dynamics", "both"] = key(
        "auto", "gradient estimator; auto: reinforce for discrete actions, dynamics for others"
    )
    mix: float = key(0.0, "share of the dynamics gradient, for grad = both", 0, 1)
    normalize_reinforce: bool = key(True, "reinforce with normalized advantages too")


@dataclass(frozen=True)
class Critic(newer.Critic):
    layers: int = key(2, "dense layers", 1, fixed=True)
    units: int = key(512, "width", 1, fixed=True)


@dataclass(frozen=True)
class Loss:
    rec: float = key(1.0, "weight of every reconstruction loss", 0)
    rew: float = key(1.0, "weight of the reward loss", 0)
    con: float = key(1.0, "weight of the continuation loss", 0)
    dyn: float = key(0.5, "weight of the KL that trains the prior", 0)
    rep: float = key(0.1, "weight of the KL that trains the posterior", 0)


@dataclass(frozen=True)
class Adam:
    lr: float = key(3e-5, "learning rate", 0)
    eps: float = key(1e-5, "added to the root of the second moment", 0)
    clip: float = key(100.0, "largest norm of the gradient; 0: no clipping", 0)
    weight_decay: float = key(0.0, "decay of weight matrices per unit of learning rate", 0)


@dataclass(frozen=True)
class ModelAdam(Adam):
    lr: float = key(1e-4, "learning rate", 0)
    eps: float = key(1e-8, "added to the root of the second moment", 0)
    clip: float = key(1000.0, "largest norm of the gradient; 0: no clipping", 0)


@dataclass(frozen=True)
class Optim:
    model: ModelAdam = group(ModelAdam)
    actor: Adam = group(Adam)
    critic: Adam = group(Adam)


@dataclass(frozen=True)
class DreamerConfig2023(newer.Imagining):
    """DreamerV3 of 2023. The defaults are those of its small model."""

    algorithm: str = key("dreamerv3_2023", "what trains", fixed=True)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = key("fp32", "of matrix products")
    cudagraphs: Literal["auto", "on", "off"] = key(
        "auto", "a decision as one CUDA graph; auto: on a GPU"
    )
    envs: int = key(4, "environments N stepped together", 1, fixed=True)
    train_ratio: float = key(512.0, "replayed rows per env_step", 0)
    grad_heads: tuple[str, ...] = key(
        HEADS, "heads whose losses reach the state; the others learn on their own"
    )
    replay: Replay = group(Replay)
    encoder: Encoder = group(Encoder)
    decoder: Decoder = group(Decoder)
    rssm: RSSM = group(RSSM)
    reward: Reward = group(Reward)
    cont: Cont = group(Cont)
    actor: Actor = group(Actor)
    critic: Critic = group(Critic)
    loss: Loss = group(Loss)
    optim: Optim = group(Optim)

    def check(self, refuse: Callable[[str, str], None]) -> None:
        if set(self.grad_heads) - set(HEADS):
            refuse("grad_heads", f"some of {', '.join(HEADS)}")
        super().check(refuse)
