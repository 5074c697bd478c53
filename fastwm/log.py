"""What a run tells: metrics.jsonl always, TensorBoard, GIF videos, and one line in the terminal.

Names are paths: train/ episode/ eval/ replay/ speed/, with a few short names beside them that
TensorBoard readers look for (SHORT). docs/metrics.md lists each with its unit.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

# Short name -> the metrics whose sum it is; names that end in / stand for all below.
SHORT = {
    "eval_return": ("eval/return",),
    "model_loss": (
        "train/loss/recon/",
        "train/loss/rew",
        "train/loss/con",
        "train/loss/dyn",
        "train/loss/rep",
        "train/world_model_loss",
    ),
    "actor_loss": ("train/loss/policy", "train/actor_loss"),
    "value_loss": ("train/loss/value", "train/critic_loss"),
    "kl_divergence": ("train/loss/dyn",),
    "actor_entropy": ("train/ent",),
    "train_return": ("episode/score",),
    "train_length": ("episode/length",),
    "train_episodes": ("episode/total",),
    "eval_length": ("eval/length",),
    "eval_episodes": ("eval/episodes",),
    "dataset_size": ("replay/rows",),
}
BOARD_S = 0.2  # TensorBoard draws a thousand points of a curve; a second may bring as many rows
SECTIONS = ("env", "policy", "replay", "copy", "learner", "log", "eval")


class Mean:
    """Means of 0-d tensors over calls, without waiting for the device until they are read."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.sums: list[torch.Tensor] = []
        self.count = 0

    def add(self, metrics: Mapping[str, torch.Tensor | float]) -> None:
        values = [torch.as_tensor(value).detach().float() for value in metrics.values()]
        if self.count and tuple(metrics) == self.names:
            if self.sums[0].device != values[0].device:  # restored sums come from the CPU
                self.sums = [total.to(values[0].device) for total in self.sums]
            torch._foreach_add_(self.sums, values)
            self.count += 1
        else:  # the first call, or an agent that changed what it reports: start over
            self.names, self.count = tuple(metrics), 1
            self.sums = [value.clone() for value in values]

    def read(self) -> dict[str, float]:
        """The means since the last read. One transfer for all of them."""
        if not self.count:
            return {}
        means = (torch.stack([total.reshape(()) for total in self.sums]) / self.count).tolist()
        self.count = 0
        return dict(zip(self.names, means, strict=True))

    def state_dict(self) -> dict:
        return {
            "names": list(self.names),
            "sums": [s.cpu().clone() for s in self.sums],
            "count": self.count,
        }

    def load_state_dict(self, state: dict) -> None:
        self.names, self.count = tuple(state["names"]), state["count"]
        self.sums = list(state["sums"])


class Stopwatch:
    """Seconds per section of the loop; `with stopwatch("env"): ...`. Sections do not nest.

    Sections that follow each other look at the clock once in between: `start()` before the first,
    `lap("env")` after each.
    """

    def __init__(self) -> None:
        self.spent = dict.fromkeys(SECTIONS, 0.0)
        self.since = time.perf_counter()
        self.section = ""

    def __call__(self, section: str) -> Stopwatch:
        self.section = section
        return self

    def __enter__(self) -> None:
        self.entered = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.spent[self.section] += time.perf_counter() - self.entered

    start = __enter__

    def lap(self, section: str) -> None:
        now = time.perf_counter()
        self.spent[section] += now - self.entered
        self.entered = now

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last read, and each section's share; with `other` they sum to 1."""
        now = time.perf_counter()
        total = max(now - self.since, 1e-9)
        shares = {section: spent / total for section, spent in self.spent.items()}
        shares["other"] = max(0.0, 1.0 - sum(shares.values()))
        self.spent, self.since = dict.fromkeys(SECTIONS, 0.0), now
        return total, shares


class Logger:
    """Collects numbers and writes them every log interval.

    Args: run: the run folder. steps: env_steps of the whole run. action_repeat: frames per
          env_step. batch_rows: replayed rows per update, 0 where there are none. every_s: seconds
          between refreshes of the terminal line, 0 for none. tensorboard: write event files.
          deterministic: leave times out of metrics.jsonl, so that equal runs give equal bytes.
          resume: state_dict() of the run that goes on, or None.
    """

    def __init__(
        self,
        run: Path,
        *,
        steps: int,
        action_repeat: int = 1,
        batch_rows: int = 0,
        every_s: float = 0.5,
        tensorboard: bool = True,
        deterministic: bool = False,
        resume: Mapping[str, Any] | None = None,
    ) -> None:
        self.run, self.steps, self.action_repeat = Path(run), steps, action_repeat
        self.batch_rows = batch_rows
        self.deterministic = deterministic
        self.time = Stopwatch()
        self.train = Mean()
        self.now: dict[str, float] = {}  # values that wait for the next row
        self.episodes: list[tuple[float, int]] = []  # score, length since the last row
        self.last = {"env_steps": 0, "updates": 0}
        self.shown: dict[str, float] = {}
        self.run.mkdir(parents=True, exist_ok=True)
        self.file = open(self.run / "metrics.jsonl", "ab")
        self._load(
            resume
            or {
                "bytes": 0,
                "train": self.train.state_dict(),
                "now": {},
                "episodes": [],
                "last": dict(self.last),
            }
        )
        self.board = _open_board(self.run, self.last["env_steps"]) if tensorboard else None
        self.due: tuple[int, dict[str, float]] = (0, {})  # env_steps, scalars that the board lacks
        self.showed = -math.inf  # when it got the last ones
        done = self.last["env_steps"]
        self.bar = open_bar(steps, "env_steps", done, every_s) if every_s else None

    def ended(self, scores: list[float], lengths: list[int]) -> None:
        """Finished training episodes: sum of rewards, number of actions of each."""
        self.episodes.extend(zip(scores, lengths, strict=True))

    def set(self, values: Mapping[str, float]) -> None:
        """Numbers for the next row, under their full names."""
        self.now.update({name: float(value) for name, value in values.items()})

    def write(self, env_steps: int, updates: int) -> dict[str, Any]:
        """Put what was collected into a row of metrics.jsonl and TensorBoard; returns it."""
        values = {f"train/{name}": value for name, value in self.train.read().items()}
        if self.episodes:
            scores, lengths = zip(*self.episodes, strict=True)
            values |= {
                "episode/score": fmean(scores),
                "episode/score_max": max(scores),
                "episode/length": fmean(lengths),
                "episode/count": len(scores),
            }
        values |= self.now
        values |= _short_names(values)
        speed = self._speed(env_steps, updates)
        self.episodes, self.now = [], {}
        everything = values | speed
        self.shown |= {name: everything[name] for name in _shown(tuple(everything))}
        counters = {
            "env_steps": env_steps,
            "updates": updates,
            "frames": env_steps * self.action_repeat,
        }
        row = counters | values | ({} if self.deterministic else speed)
        row = _numbers(row)
        self.file.write((json.dumps(row) + "\n").encode())
        self.file.flush()
        self._scalars(everything, env_steps)
        self.last = {"env_steps": env_steps, "updates": updates}
        return row

    def _scalars(self, values: Mapping[str, float], env_steps: int) -> None:
        """At most a point per BOARD_S of every curve: of rows that follow closer, the newest.

        What an evaluation found is shown at its own step.
        """
        if not self.board:
            return
        if "eval/return" in values:
            self._show()
        self.due = env_steps, self.due[1] | values
        if "eval/return" in values or time.perf_counter() - self.showed >= BOARD_S:
            self._show()

    def _show(self) -> None:
        """All that are due as one event, which takes a seventh of the time of one each."""
        env_steps, values = self.due
        if not self.board or not values:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.board.file_writer.add_summary(Summary(value=scalars), env_steps)
        self.due, self.showed = (env_steps, {}), time.perf_counter()

    def tick(self, env_steps: int, updates: int) -> None:
        """Refresh the terminal line if it is time."""
        if not self.bar:
            return
        if time.time() - self.bar.last_print_t >= self.bar.mininterval:  # it is drawn now
            self.bar.set_description_str(self._line(env_steps, updates), refresh=False)
        # The last decisions of all environments may go beyond the end; tqdm would forget it then.
        self.bar.update(min(env_steps, self.bar.total) - self.bar.n)

    def _line(self, env_steps: int, updates: int) -> str:
        """What the terminal line says beside the progress."""
        ratio = f"{updates / max(env_steps, 1):.3g}"
        shares = " ".join(
            f"{name.rpartition('_')[2]} {value:.0%}"
            for name, value in self.shown.items()
            if name.startswith("speed/share_") and value >= 0.005
        )
        texts = [f"updates {updates} ({ratio} per env_step)"]
        for word, name in (("return", "episode/score"), ("eval", "eval/return")):
            texts += [f"{word} {self.shown[name]:.4g}"] if name in self.shown else []
        return " | ".join([*texts, shares] if shares else texts)

    def say(self, text: str) -> None:
        """A line for the person at the terminal."""
        if self.bar:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text)
        sys.stdout.flush()

    def video(self, name: str, frames: np.ndarray, env_steps: int, fps: int = 15) -> Path:
        """A video as <run>/videos/<name>-<env_steps>.gif and in TensorBoard.

        Args: frames: (T, H, W, 3) uint8. Returns: the file's path.
        """
        data = gif(frames, fps)
        self._image(name, data, frames.shape[1:3], env_steps)
        return self._file(name, "gif", data, env_steps)

    def picture(self, name: str, pixels: np.ndarray, env_steps: int) -> Path:
        """A picture (H, W, 3) uint8 as <run>/videos/<name>-<env_steps>.png and in TensorBoard."""
        data = png(pixels)
        self._image(f"{name}/strip", data, pixels.shape[:2], env_steps)
        return self._file(name, "png", data, env_steps)

    def histograms(self, tensors: Iterable[tuple[str, torch.Tensor]], env_steps: int) -> None:
        """Distributions of parameters and of their gradients, in TensorBoard."""
        if not self.board:
            return
        for name, tensor in tensors:
            path = name.replace(".", "/")
            self.board.add_histogram(f"weight/{path}", tensor.detach().float().cpu(), env_steps)
            if tensor.grad is not None and torch.isfinite(tensor.grad).all():
                grad = tensor.grad.detach().float().cpu()
                self.board.add_histogram(f"gradient/{path}", grad, env_steps)

    def _file(self, name: str, ending: str, data: bytes, env_steps: int) -> Path:
        path = self.run / "videos" / f"{name.replace('/', '_')}-{env_steps:09d}.{ending}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path

    def _image(self, name: str, data: bytes, size: tuple[int, ...], env_steps: int) -> None:
        """TensorBoard shows an image summary that holds a GIF as a video."""
        if not self.board:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        tag = name.replace("/image", "")  # readers look for train_openl
        image = Summary.Image(
            height=size[0], width=size[1], colorspace=3, encoded_image_string=data
        )
        self.board.file_writer.add_summary(
            Summary(value=[Summary.Value(tag=tag, image=image)]), env_steps
        )

    def state_dict(self) -> dict:
        """Where the log stands: what lies beyond it is cut off when a run resumes from here."""
        self._show()
        self.file.flush()
        os.fsync(self.file.fileno())
        return {
            "bytes": self.file.tell(),
            "train": self.train.state_dict(),
            "now": dict(self.now),
            "episodes": list(self.episodes),
            "last": dict(self.last),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self.file.truncate(min(state["bytes"], self.file.seek(0, os.SEEK_END)))
        self.file.seek(0, os.SEEK_END)
        self.train.load_state_dict(state["train"])
        self.now, self.last = dict(state["now"]), dict(state["last"])
        self.episodes = [tuple(item) for item in state["episodes"]]

    def close(self) -> None:
        self.file.close()
        self._show()
        if self.board:
            self.board.close()
        if self.bar:
            self.bar.close()

    def _speed(self, env_steps: int, updates: int) -> dict[str, float]:
        seconds, shares = self.time.read()
        stepped, updated = env_steps - self.last["env_steps"], updates - self.last["updates"]
        speed = {
            "speed/env_steps_per_s": stepped / seconds,
            "fps": stepped * self.action_repeat / seconds,
            "speed/updates_per_s": updated / seconds,
            "speed/updates_per_env_step": updated / max(stepped, 1),
            "speed/eta_s": (self.steps - env_steps) * seconds / max(stepped, 1),
            **{f"speed/share_{section}": share for section, share in shares.items()},
        }
        if self.batch_rows:
            speed["speed/rows_per_s"] = updated * self.batch_rows / seconds
        return speed


def gif(frames: Iterable[np.ndarray], fps: int = 15) -> bytes:
    """Frames (H, W, 3) uint8 as an animated GIF that loops for ever."""
    from PIL import Image

    images = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    if not images:
        raise ValueError("gif: expected at least one frame of shape (H, W, 3), got none")
    data = io.BytesIO()
    images[0].save(
        data,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        loop=0,
        duration=max(20, round(1000 / fps)),
    )  # viewers slow anything below 20 ms down
    return data.getvalue()


def png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a PNG file."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(data, format="PNG")
    return data.getvalue()


def _open_board(run: Path, env_steps: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warnings.warn(
            "log: TensorBoard is not installed, metrics.jsonl has everything; "
            "pip install tensorboard, or --log.tensorboard false",
            stacklevel=3,
        )
        return None
    return SummaryWriter(str(run), purge_step=env_steps + 1 if env_steps else None)


class _Lines:
    """What tqdm writes to where no terminal is: a line each time, instead of the same one again."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self.stream.write(text.strip() + "\n")

    def flush(self) -> None:
        self.stream.flush()


def open_bar(
    total: int, unit: str, done: int = 0, every_s: float = 0.5, *, leave: bool = True
) -> Any:
    """A tqdm bar on stderr; where no terminal is, a line now and then. leave: behind it."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=min(done, total),
        file=sys.stderr if terminal else _Lines(sys.stderr),
        delay=0 if terminal else 1e-9,  # no line before there is something to tell
        unit=f" {unit}",
        leave=leave,
        miniters=0,  # look at the clock each time
        unit_scale=total >= 1000,
        dynamic_ncols=True,
        smoothing=0.1,
        mininterval=every_s if terminal else max(every_s, 20.0),
        bar_format="{percentage:3.0f}% {n_fmt}/{total_fmt}{unit} {rate_fmt} "
        "ETA {remaining}   {desc}",
    )


def _short_names(values: Mapping[str, float]) -> dict[str, float]:
    return {
        name: sum([values[key] for key in keys]) for name, keys in _summands(tuple(values)).items()
    }


@functools.lru_cache(maxsize=64)  # rows of a run have few different sets of names
def _summands(names: tuple[str, ...]) -> dict[str, list[str]]:
    """Short name -> which of the names it is the sum of."""
    short = {}
    for name, parts in SHORT.items():
        found = [
            key
            for key in names
            for part in parts
            if key == part or part.endswith("/") and key.startswith(part)
        ]
        if found:
            short[name] = found
    return short


@functools.lru_cache(maxsize=64)
def _shown(names: tuple[str, ...]) -> list[str]:
    """Those that the terminal line tells."""
    told = ("episode/score", "eval/return")
    return [name for name in names if name in told or name.startswith("speed/share_")]


def _numbers(row: dict[str, float]) -> dict[str, float | int | None]:
    """Six significant digits, and null for what JSON cannot say. Whole numbers stay as they are."""
    names = [name for name, value in row.items() if not isinstance(value, int)]
    texts = ("%.6g " * len(names)) % tuple([row[name] for name in names])  # one call for all
    values = map(float, texts.split())
    return row | {n: v if math.isfinite(v) else None for n, v in zip(names, values, strict=True)}
