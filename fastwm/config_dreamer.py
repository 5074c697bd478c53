"""Settings of DreamerV3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fastwm.config_common import Expl, Training, group, key


@dataclass(frozen=True)
class Encoder:
    depth: int = key(64, "channels of the first convolution, before mults", 1, fixed=True)
    mults: tuple[int, ...] = key((2, 3, 4, 4), "channels per stage, times depth", 1, fixed=True)
    layers: int = key(3, "dense layers for vector observations", 1, fixed=True)
    units: int = key(1024, "width of the dense layers", 1, fixed=True)
    kernel: int = key(5, "convolution kernel, pixels", 1, fixed=True)
    symlog: bool = key(True, "symlog vector observations first", fixed=True)
    cnn_keys: str = key(".*", "images to read, a regular expression", fixed=True)
    mlp_keys: str = key(".*", "other observations to read, a regular expression", fixed=True)


@dataclass(frozen=True)
class Decoder:
    depth: int = key(64, "channels of the last convolution, before mults", 1, fixed=True)
    mults: tuple[int, ...] = key((2, 3, 4, 4), "channels per stage, times depth", 1, fixed=True)
    layers: int = key(3, "dense layers for vector observations", 1, fixed=True)
    units: int = key(1024, "width of the dense layers", 1, fixed=True)
    kernel: int = key(5, "convolution kernel, pixels", 1, fixed=True)
    bspace: int = key(8, "blocks of the linear map from deter to the first image", 1, fixed=True)
    outscale: float = key(1.0, "scale of the last layer's initial weights", 0)
    cnn_keys: str = key(".*", "images to predict, a regular expression", fixed=True)
    mlp_keys: str = key(".*", "other observations to predict, a regular expression", fixed=True)


@dataclass(frozen=True)
class RSSM:
    deter: int = key(8192, "size D of the deterministic state", 1, fixed=True)
    hidden: int = key(1024, "width U of the layers around it", 1, fixed=True)
    stoch: int = key(32, "categorical groups S of the stochastic state", 1, fixed=True)
    classes: int = key(64, "classes K per group", 2, fixed=True)
    blocks: int = key(8, "blocks G of the block-diagonal GRU; they divide deter", 1, fixed=True)
    dynlayers: int = key(1, "hidden layers before the GRU", 1, fixed=True)
    obslayers: int = key(1, "layers of the posterior", 1, fixed=True)
    imglayers: int = key(2, "layers of the prior", 1, fixed=True)
    unimix: float = key(0.01, "share of the uniform distribution in every categorical", 0, 1)
    free_nats: float = key(1.0, "KL below which its loss is constant, nats", 0)


@dataclass(frozen=True)
class Reward:
    layers: int = key(1, "dense layers", 1, fixed=True)
    units: int = key(1024, "width", 1, fixed=True)
    bins: int = key(255, "bins of the two-hot distribution", 2, fixed=True)
    outscale: float = key(0.0, "scale of the last layer's initial weights", 0)


@dataclass(frozen=True)
class Cont:
    layers: int = key(1, "dense layers", 1, fixed=True)
    units: int = key(1024, "width", 1, fixed=True)
    outscale: float = key(1.0, "scale of the last layer's initial weights", 0)


@dataclass(frozen=True)
class Actor:
    layers: int = key(3, "dense layers", 1, fixed=True)
    units: int = key(1024, "width", 1, fixed=True)
    outscale: float = key(0.01, "scale of the last layer's initial weights", 0)
    unimix: float = key(0.01, "share of the uniform distribution, discrete actions", 0, 1)
    min_std: float = key(0.1, "smallest standard deviation, continuous actions", 0)
    max_std: float = key(1.0, "largest standard deviation, continuous actions", 0)


@dataclass(frozen=True)
class Critic:
    layers: int = key(3, "dense layers", 1, fixed=True)
    units: int = key(1024, "width", 1, fixed=True)
    bins: int = key(255, "bins of the two-hot distribution", 2, fixed=True)
    outscale: float = key(0.0, "scale of the last layer's initial weights", 0)
    slow_rate: float = key(0.02, "share of the critic that its slow copy takes per step", 0, 1)
    slow_every: int = key(1, "updates between steps of the slow copy", 1)
    slow_reg: float = key(1.0, "weight of the loss towards the slow copy", 0)


@dataclass(frozen=True)
class Loss:
    rec: float = key(1.0, "weight of every reconstruction loss", 0)
    rew: float = key(1.0, "weight of the reward loss", 0)
    con: float = key(1.0, "weight of the continuation loss", 0)
    dyn: float = key(1.0, "weight of the KL that trains the prior", 0)
    rep: float = key(0.1, "weight of the KL that trains the posterior", 0)
    policy: float = key(1.0, "weight of the policy loss", 0)
    value: float = key(1.0, "weight of the value loss in imagination", 0)
    repval: float = key(0.3, "weight of the value loss on replayed rows", 0)


@dataclass(frozen=True)
class Retnorm:
    rate: float = key(0.01, "share of the newest percentiles in the running ones", 0, 1)
    limit: float = key(1.0, "smallest divisor of the advantage, reward units", 0)
    low: float = key(5.0, "lower percentile", 0, 100)
    high: float = key(95.0, "upper percentile", 0, 100)


@dataclass(frozen=True)
class Optim:
    lr: float = key(4e-5, "learning rate", 0)
    agc: float = key(0.3, "largest gradient, relative to its parameter's norm; 0: no clipping", 0)
    pmin: float = key(1e-3, "smallest parameter norm that the clipping assumes", 0)
    eps: float = key(1e-20, "added to the gradient's second moment", 0)
    beta1: float = key(0.9, "decay of the momentum", 0, 1)
    beta2: float = key(0.999, "decay of the second moment", 0, 1)
    weight_decay: float = key(0.0, "decay of weight matrices per unit of learning rate", 0)
    nesterov: bool = key(False, "look-ahead momentum")
    warmup: int = key(1000, "updates over which the learning rate rises from 0", 0)
    schedule: Literal["const", "linear", "cosine"] = key("const", "after the warm-up")
    anneal: int = key(0, "updates until the schedule reaches a tenth of lr; const: 0", 0)


@dataclass(frozen=True)
class Imagining(Training):
    """What both generations of DreamerV3 have."""

    imag_horizon: int = key(15, "imagined steps I", 1)
    imag_last: int = key(0, "imagine from only the last so many rows; 0: from all", 0)
    discount_horizon: float = key(333.0, "steps; the discount is 1 - 1 / horizon", 1)
    lam: float = key(0.95, "lambda of the lambda-return", 0, 1)
    actent: float = key(3e-4, "weight of the policy's entropy", 0)
    actor: Actor = group(Actor)
    retnorm: Retnorm = group(Retnorm)
    expl: Expl = group(Expl)

    def check(self, refuse: Callable[[str, str], None]) -> None:
        if self.retnorm.low >= self.retnorm.high:
            refuse("retnorm.low", f"less than retnorm.high = {self.retnorm.high}")
        if self.actor.min_std > self.actor.max_std:
            refuse("actor.min_std", f"at most actor.max_std = {self.actor.max_std}")
        if self.discount_horizon == 1.0:
            refuse("discount_horizon", "more than 1 step: the discount would be 0")
        if self.expl.disag_offset >= self.batch_length:
            refuse("expl.disag_offset", f"less than batch_length = {self.batch_length}")
        super().check(refuse)


@dataclass(frozen=True)
class DreamerConfig(Imagining):
    """DreamerV3. The defaults are those of the reference's newest version."""

    algorithm: str = key("dreamerv3", "what trains", fixed=True)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = key("auto", "of matrix products")
    compile: Literal["auto", "off", "ops", "full"] = key(
        "auto", "torch.compile: off, of heads and losses (ops), of all before the gradient (full)"
    )
    cudagraphs: Literal["auto", "on", "off"] = key(
        "auto", "an update, and a decision, as one CUDA graph each; auto: on a GPU"
    )
    updates_per_launch: int = key(
        1, "updates in one CUDA graph, when so many are due at once; no effect without a graph", 1
    )
    steps: int = key(10_000_000_000, "env_steps of the whole run", 0)
    contdisc: bool = key(True, "the continuation head learns the discount too")
    encoder: Encoder = group(Encoder)
    decoder: Decoder = group(Decoder)
    rssm: RSSM = group(RSSM)
    reward: Reward = group(Reward)
    cont: Cont = group(Cont)
    critic: Critic = group(Critic)
    loss: Loss = group(Loss)
    optim: Optim = group(Optim)

    def check(self, refuse: Callable[[str, str], None]) -> None:
        if self.rssm.deter % self.rssm.blocks:
            refuse("rssm.deter", f"a multiple of rssm.blocks = {self.rssm.blocks}")
        if self.optim.schedule != "const" and self.optim.anneal <= self.optim.warmup:
            refuse("optim.anneal", f"more than optim.warmup = {self.optim.warmup} updates")
        for name, beta in (("optim.beta1", self.optim.beta1), ("optim.beta2", self.optim.beta2)):
            if beta == 1.0:
                refuse(name, "less than 1: the moments are divided by 1 - beta^updates")
        if self.batch_length < 2:
            refuse("batch_length", "at least 2 rows: the value loss needs a row after the first")
        if self.imag_last == 1:
            refuse("imag_last", "0 or at least 2 rows: the value loss needs a row after the first")
        if self.encoder.kernel % 2 == 0:
            refuse("encoder.kernel", "an odd number")
        if self.decoder.depth * self.decoder.mults[-1] % self.decoder.bspace:
            channels = self.decoder.depth * self.decoder.mults[-1]
            refuse("decoder.bspace", f"a divisor of decoder.depth * decoder.mults[-1] = {channels}")
        super().check(refuse)
