"""Settings that every algorithm shares, and how a setting is declared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


def key(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    fixed: bool = False,
) -> Any:
    """A field. `fixed`: a run folder that was started with another value cannot be continued."""
    limits = {"help": help, "low": low, "high": high, "fixed": fixed}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=limits)
    return field(default=default, metadata=limits)


def group(schema: type) -> Any:
    return field(default_factory=schema)


@dataclass(frozen=True)
class Env:
    action_repeat: int | None = key(
        None, "frames per decision; none: as usual for the task", 1, fixed=True
    )
    time_limit: int | None = key(
        None, "frames after which an episode is cut off; none: as the task has it", 1, fixed=True
    )
    size: tuple[int, int] = key((64, 64), "image height and width, pixels", 1, fixed=True)
    options: dict = key({}, "anything else for the adapter: --env.options.NAME VALUE", fixed=True)


@dataclass(frozen=True)
class Replay:
    capacity: int = key(5_000_000, "rows kept, all envs together", 1, fixed=True)
    online: bool = key(True, "feed every fresh row once before sampling uniformly")
    prefill: int = key(0, "env_steps of random actions before the first update", 0)
    pretrain: int = key(0, "updates at once when learning begins", 0)
    storage: Literal["ram", "mmap", "cuda"] = key(
        "ram", "where the rows lie: memory, files, or the memory of the GPU that learns"
    )
    save: bool = key(True, "put the replay into the checkpoints, so that a run resumes exactly")
    force: bool = key(False, "start even if the rows at capacity do not fit the free memory")


@dataclass(frozen=True)
class Expl:
    behavior: Literal["greedy", "random", "plan2explore"] = key(
        "greedy", "who acts in training: the task's policy, chance, or one that seeks the unknown",
        fixed=True,
    )  # fmt: skip
    until: int = key(0, "env_steps after which the task's policy acts; 0: never", 0)
    extr_scale: float = key(0.0, "weight of the task's reward for plan2explore", 0)
    intr_scale: float = key(1.0, "weight of the ensemble's disagreement", 0)
    disag_target: Literal["stoch", "deter", "feat"] = key(
        "stoch", "what the heads predict", fixed=True
    )
    disag_models: int = key(10, "heads of the ensemble", 2, fixed=True)
    disag_layers: int = key(4, "hidden layers of a head", 1, fixed=True)
    disag_units: int = key(400, "their width", 1, fixed=True)
    disag_offset: int = key(1, "rows between what a head sees and what it predicts", 1)
    disag_log: bool = key(True, "reward the logarithm of the disagreement")
    disag_action_cond: bool = key(True, "the heads see the action too", fixed=True)


@dataclass(frozen=True)
class Eval:
    every: int = key(10_000, "env_steps between evaluations; 0: none", 0)
    episodes: int = key(10, "episodes per evaluation", 1)
    envs: int = key(4, "environments that play them in parallel", 1)
    mode: Literal["greedy", "sample"] = key("greedy", "how actions are chosen")
    max_steps: int = key(
        50_000, "decisions after which an evaluation episode counts as it stands; 0: never", 0
    )
    stop_at: float | None = key(None, "mean evaluation return that ends the run; none: never")


@dataclass(frozen=True)
class Log:
    every: int = key(1000, "env_steps between rows of metrics.jsonl", 1)
    every_s: float = key(0.5, "seconds between refreshes of the progress bar; 0: no bar", 0)
    tensorboard: bool = key(True, "write TensorBoard events")
    video_every: int = key(10_000, "env_steps between open-loop videos, image tasks; 0: none", 0)
    profile: int = key(0, "updates to trace, for RUN/profile/trace.json; 0: none", 0)
    histogram_every: int = key(
        0, "env_steps between TensorBoard histograms of all weights and gradients; 0: none", 0
    )


@dataclass(frozen=True)
class Checkpoint:
    every: int = key(10_000, "env_steps between latest.pt; 0: only at the end", 0)
    best: bool = key(True, "keep best.pt, the highest mean evaluation return")


@dataclass(frozen=True)
class Training:
    """What every recipe has that learns while its environments step."""

    algorithm: str = key("", "what trains", fixed=True)
    task: str = key(
        "cartpole",
        "cartpole, atari_pong, dmc_walker_walk, envpool:ID, gymnasium:ID, package.module:factory",
        fixed=True,
    )
    logdir: str = key("", "run folder; empty: runs/<algorithm>-<task>-<time>")
    seed: int = key(0, "of networks, actions, sampling and environments", 0, fixed=True)
    device: Literal["auto", "cpu", "cuda"] = key("auto", "where networks run")
    deterministic: bool = key(False, "same seed, same machine: same bytes; no times in the log")
    threads: int = key(0, "CPU threads of PyTorch; 0: PyTorch's choice", 0)
    offline_traindir: str = key(
        "", "train on the episodes of this folder alone (task `offline`: without environment)"
    )
    from_checkpoint: str = key("", "run folder or checkpoint file whose weights a new run takes")
    from_checkpoint_regex: str = key("", "of these weights only those whose names it finds")
    steps: int = key(1_000_000, "env_steps of the whole run", 0)
    envs: int = key(16, "environments N stepped together", 1, fixed=True)
    overlap: bool = key(True, "environments step while the learner updates; the run is the same")
    batch_size: int = key(16, "sequences B per update", 1)
    batch_length: int = key(64, "rows T per sequence", 1, fixed=True)
    train_ratio: float = key(32.0, "replayed rows per env_step", 0)
    env: Env = group(Env)
    replay: Replay = group(Replay)
    eval: Eval = group(Eval)
    log: Log = group(Log)
    checkpoint: Checkpoint = group(Checkpoint)

    def check(self, refuse: Callable[[str, str], None]) -> None:
        """Refuse, by key, what the settings cannot be together."""
        if self.replay.capacity < self.envs * (self.batch_length + 1):
            refuse(
                "replay.capacity",
                f"at least envs * (batch_length + 1) = {self.envs * (self.batch_length + 1)}",
            )
