"""Settings of World Models (Ha and Schmidhuber, 2018)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fastwm.config_common import group, key

STAGES = ("collect", "vae", "latents", "rnn", "ctrl")
RandomKind = Literal["brownian", "held", "mixed", "white"]
WHICH = "episodes it learns from, FIRST,AFTER_LAST; AFTER_LAST 0: to the end"


@dataclass(frozen=True)
class Env:
    action_repeat: int | None = key(
        None, "frames per decision; none: as usual for the task", 1, fixed=True
    )
    time_limit: int | None = key(
        None, "frames after which an episode is cut off; none: as the task has it", 1, fixed=True
    )
    size: tuple[int, int] = key((96, 96), "pictures of the task, height and width, px", 1)
    rows: int = key(0, "upper rows of a picture that V sees; 0: all", 0, fixed=True)
    options: dict = key({}, "anything else for the adapter: --env.options.NAME VALUE", fixed=True)


@dataclass(frozen=True)
class Collect:
    episodes: tuple[int, ...] = key((160,), "random episodes, part by part of the data", 1)
    again: int = key(64, "episodes of the controller before every later round", 1)
    envs: int = key(64, "environments stepped together", 1)
    length: int = key(250, "most decisions of one episode", 1)
    min_length: int = key(0, "shorter episodes are dropped", 0)
    policy: tuple[RandomKind, ...] = key(
        ("brownian",),
        "random actions, part by part: drifting, held for 1 to 10 or 1 to 100 steps, always new",
    )


@dataclass(frozen=True)
class Vae:
    latent: int = key(32, "size Z of the latent", 1, fixed=True)
    episodes: tuple[int, int] = key((0, 0), WHICH, 0)
    epochs: int = key(2, "passes over all frames", 1)
    batch_size: int = key(64, "frames per update", 1)
    lr: float = key(1e-3, "learning rate of Adam", 0)
    free_nats: float = key(0.5, "KL per latent dimension below which it does not count, nats", 0)
    kl_scale: float = key(1.0, "weight of the KL; below 1 small things in the picture survive", 0)
    flip: bool = key(False, "mirror half of the pictures, a new choice at every pass")
    decoder_relu: bool = key(False, "an activation after the decoder's dense layer", fixed=True)
    scheduler_patience: int = key(5, "epochs without progress until the rate drops", 0)
    scheduler_factor: float = key(0.5, "what the rate is multiplied with then", 0, 1)
    early_stopping_patience: int = key(30, "epochs without progress that end the stage", 0)
    sample_interval: int = key(1, "epochs between sample pictures; 0: none", 0)


@dataclass(frozen=True)
class Rnn:
    hidden: int = key(256, "size R of the LSTM", 1, fixed=True)
    members: int = key(1, "Ms that dream, each of another start; C remembers by the first", 1)
    mixtures: int = key(5, "components M of the mixture", 1, fixed=True)
    mixture: Literal["factored", "joint"] = key(
        "factored", "a mixture per latent dimension, or one over whole latents", fixed=True
    )
    reward: bool = key(False, "predict the reward too", fixed=True)
    done: bool = key(False, "predict the end of the episode too", fixed=True)
    done_weight: float = key(10.0, "how often an end counts in its loss", 0)
    restart: bool = key(False, "tell the LSTM where an episode begins", fixed=True)
    reduce: Literal["mean", "sum"] = key(
        "mean", "likelihood per latent dimension, or summed and divided by the number of losses"
    )
    episodes: tuple[int, int] = key((0, 0), WHICH, 0)
    epochs: int = key(10, "times `updates`, with an evaluation after each", 1)
    again: int = key(10, "epochs of every later round", 1)
    updates: int = key(60, "updates per epoch; 0: one pass over the rows it learns from", 0)
    batch_size: int = key(32, "sequences B per update", 1)
    batch_length: int = key(64, "rows T per sequence", 1)
    optimizer: Literal["adam", "rmsprop"] = key("adam", "which")
    lr: float = key(1e-3, "learning rate", 0)
    lr_decay: float = key(1.0, "what it is multiplied with after every update", 0, 1)
    lr_min: float = key(1e-5, "and where that ends", 0)
    clip: float = key(1.0, "largest element of a gradient; 0: no clipping", 0)
    scheduler_patience: int = key(5, "epochs without progress until the rate drops", 0)
    scheduler_factor: float = key(0.5, "what the rate is multiplied with then", 0, 1)
    early_stopping_patience: int = key(30, "epochs without progress that end the stage", 0)
    sample_interval: int = key(10, "epochs between pictures of a dream; 0: none", 0)


@dataclass(frozen=True)
class Ctrl:
    world: Literal["real", "dream"] = key("real", "where candidates are tried")
    inputs: Literal["z", "zh", "zc", "zch"] = key(
        "zh", "what the controller sees: z of V, h and c of M", fixed=True
    )
    units: int = key(0, "width of a hidden tanh layer; 0: linear", 0, fixed=True)
    bias: bool = key(True, "of the controller's output", fixed=True)
    action: Literal["auto", "car", "tanh", "thirds"] = key(
        "auto", "what its outputs mean; auto: continuous by tanh, a choice of three by thirds"
    )
    sample: bool = key(False, "draw z as in the paper; else its mean, which has less noise")
    pop: int = key(32, "candidates per generation", 2, fixed=True)
    center: bool = key(
        False, "search over features minus their mean in the stored episodes", fixed=True
    )
    sigma: float = key(0.1, "standard deviation of the first generation", 0, fixed=True)
    cma: Literal["full", "diagonal"] = key("full", "covariance of the search", fixed=True)
    decay: float = key(0.0, "weight of the mean squared parameter, subtracted from the return", 0)
    generations: tuple[int, ...] = key((25,), "in every phase of the search", 0)
    samples: tuple[int, ...] = key((2,), "episodes per candidate, phase by phase", 1)
    time_limit: tuple[int, ...] = key((600,), "most decisions of one, phase by phase", 1)
    patience: int = key(100, "decisions without a positive reward that end one; 0: never", 0)
    target: float | None = key(None, "held-out return that ends the stage; none: never")
    holdout_every: int = key(5, "generations between evaluations of the mean candidate", 1)
    holdout_episodes: int = key(16, "episodes of one, always the same", 1)
    envs: int = key(256, "most environments stepped together", 1)
    env_threads: int = key(0, "threads of the environments; 0: one per processor", 0)


@dataclass(frozen=True)
class Dream:
    temperature: float = key(1.0, "of M's predictions; above 1 the dream is less certain", 0)
    length: int = key(1000, "most steps", 1)
    starts: int = key(1000, "first frames of stored episodes that dreams begin from", 1)


@dataclass(frozen=True)
class Test:
    episodes: int = key(32, "real episodes at the end, on seeds that nothing else uses", 0)
    time_limit: int = key(1000, "most decisions of one", 1)
    envs: int = key(32, "environments that play them in parallel", 1)


@dataclass(frozen=True)
class Log:
    tensorboard: bool = key(True, "write TensorBoard events")


@dataclass(frozen=True)
class HaConfig:
    """World Models: V sees, M predicts, C acts. The defaults are for two CPU cores."""

    algorithm: str = key("ha", "what trains", fixed=True)
    task: str = key("carracing", "a task with pictures and continuous actions", fixed=True)
    logdir: str = key("", "run folder; empty: runs/<algorithm>-<task>-<time>")
    data_dir: str = key("", "folder of the episodes; empty: data/ in the run folder")
    num_test_files: int = key(8, "episodes at the end of the data that V and M do not learn", 0)
    stage: str = key("all", f"all, or some of {','.join(STAGES)}")
    rounds: int = key(
        1, "times through the stages but vae; from the second on the controller collects", 1
    )
    generate_only: bool = key(False, "only collect episodes")
    test: bool = key(False, "only play the test episodes with the best controller")
    seed: int = key(0, "of networks, sampling, search and environments", 0, fixed=True)
    device: Literal["auto", "cpu", "cuda"] = key("auto", "where networks run")
    deterministic: bool = key(False, "same seed, same machine: same bytes; no times in the log")
    threads: int = key(0, "CPU threads of PyTorch; 0: PyTorch's choice", 0)
    env: Env = group(Env)
    collect: Collect = group(Collect)
    vae: Vae = group(Vae)
    rnn: Rnn = group(Rnn)
    ctrl: Ctrl = group(Ctrl)
    dream: Dream = group(Dream)
    final: Test = group(Test)
    log: Log = group(Log)

    def stages(self) -> tuple[str, ...]:
        """The stages of this call, in their order."""
        if self.test:
            return ()
        if self.generate_only:
            return ("collect",)
        named = self.stage.replace(" ", "").split(",")
        return STAGES if "all" in named else tuple(s for s in STAGES if s in named)

    def check(self, refuse: Callable[[str, str], None]) -> None:
        """What one setting alone cannot say. refuse(key, what was expected) raises."""
        named = self.stage.replace(" ", "").split(",")
        if not set(named) <= {"all", *STAGES}:
            refuse("stage", f"all, or some of {', '.join(STAGES)} with commas")
        parts, count = len(self.collect.episodes), len(self.ctrl.generations)
        for name, numbers in (("collect.episodes", parts), ("ctrl.generations", count)):
            if not numbers:
                refuse(name, "at least one number")
        if len(self.collect.policy) not in (1, parts):
            refuse("collect.policy", f"one name, or one for each of collect.episodes ({parts})")
        for name in ("vae", "rnn"):
            first, end = getattr(self, name).episodes
            if first >= end > 0:
                refuse(f"{name}.episodes", "two numbers, the second larger, or 0 for the end")
        if self.rounds > 1 and 0 < self.rnn.episodes[1] <= sum(self.collect.episodes):
            refuse("rnn.episodes", "0 as the second, so that later rounds learn from what C does")
        for name in ("samples", "time_limit"):
            if len(getattr(self.ctrl, name)) not in (1, count):
                refuse(f"ctrl.{name}", f"one number, or one for each of ctrl.generations ({count})")
        if self.ctrl.world == "dream" and not self.rnn.done:
            refuse("rnn.done", "true, because a dream ends where M says so")
        if self.ctrl.pop * max(self.ctrl.samples) > 1_000_000:
            refuse("ctrl.pop", "at most a million episodes per generation, pop times samples")
