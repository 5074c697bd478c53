"""What the stages of World Models share: the run folder, counters, log, and stored parts.

<run>/data/                     the episodes (or data_dir)
<run>/vae|mdrnn|ctrl/           checkpoint.tar, to go on from, and best.tar, what is used; mdrnn1
                                and so on are the further Ms of rnn.members
<run>/latents/                  mu.npy, logvar.npy: what V says about every row
<run>/samples/                  pictures
<run>/checkpoint/best.pt        all three together, for eval and play; policy.pt for load_policy
<run>/progress.pt               counters and where the log stands, of stages without a checkpoint
"""

from __future__ import annotations

import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastwm import checkpoint
from fastwm.episodes import EpisodeStore
from fastwm.log import Logger, gif
from fastwm.worldmodels.ha import MDNRNN, ConvVAE

FOLDERS = {"vae": "vae", "rnn": "mdrnn", "ctrl": "ctrl"}


class StageError(ValueError):
    """What a stage needs is not there, or does not fit."""


class HaRun:
    """A run of World Models.

    Args: config: fastwm.config_ha. folder: of the run. device: of the networks. logger: see
          fastwm.log. spaces: (obs_space, act_space) of the task. make_lanes: seeds -> Lanes.
          counters: env_steps and updates so far.
    `stopped` is filled by a signal; stages end at their next checkpoint. `round` counts from 0.
    """

    def __init__(
        self,
        config: Any,
        folder: Path,
        device: str,
        logger: Logger,
        spaces: tuple[dict, Any],
        make_lanes: Any,
        counters: dict[str, int],
    ) -> None:
        self.config, self.folder, self.logger = config, Path(folder), logger
        self.device, self.make_lanes = torch.device(device), make_lanes
        self.obs_space, self.act_space = spaces
        self.env_steps, self.updates = counters["env_steps"], counters["updates"]
        self.stopped: list[int] = []
        self.round = 0
        self.began = time.monotonic()

    @property
    def data_folder(self) -> Path:
        return Path(self.config.data_dir) if self.config.data_dir else self.folder / "data"

    def store(self) -> EpisodeStore:
        """The episodes. Raises EpisodeError where there are none."""
        store = EpisodeStore(self.data_folder)
        if not len(store):
            raise StageError(
                f"ha: expected episodes in {self.data_folder}, got none; collect some with "
                "--stage collect"
            )
        return store

    def path(self, stage: str, which: str = "checkpoint") -> Path:
        """stage: of FOLDERS; "rnn:1" is the second M's."""
        name, _, member = stage.partition(":")
        return self.folder / (FOLDERS[name] + member) / f"{which}.tar"

    def saved(self, stage: str, which: str = "checkpoint") -> dict[str, Any] | None:
        path = self.path(stage, which)
        return checkpoint.load(path) if path.is_file() else None

    def save(self, stage: str, parts: dict[str, Any], which: str = "checkpoint") -> None:
        """Atomic: a killed run finds the file of before or this one, whole."""
        checkpoint.save(self.path(stage, which), {**parts, "progress": self.progress()})

    def note_progress(self) -> None:
        checkpoint.save(self.folder / "progress.pt", {"progress": self.progress()})

    def progress(self) -> dict[str, Any]:
        counters = {"env_steps": self.env_steps, "updates": self.updates}
        return {"counters": counters, "logger": self.logger.state_dict()}

    def load_model(self, stage: str, model: ConvVAE | MDNRNN) -> int:
        """Fill a model from the stage's best.tar; returns the fingerprint of its weights."""
        stored = self.saved(stage, "best")
        if stored is None:
            raise StageError(
                f"ha: expected {self.path(stage, 'best')}, found none; run --stage "
                f"{stage.partition(':')[0]} first"
            )
        wanted, found = model.options(), stored.get("options", model.options())
        wrong = [f"{k} {found[k]!r}, not {v!r}" for k, v in wanted.items() if found.get(k) != v]
        if wrong:
            raise StageError(
                f"ha: expected {self.path(stage, 'best')} to fit the settings, got "
                f"{'; '.join(wrong)}; give the settings it was trained with, or another --logdir"
            )
        load_weights(model, stored["state_dict"], self.path(stage, "best"))
        model.to(self.device).eval()
        return fingerprint(model)

    def log(self, values: dict[str, float]) -> None:
        self.logger.set(values)
        self.logger.write(self.env_steps, self.updates)

    def picture(self, name: str, image: np.ndarray) -> Path:  # (H, W, 3) uint8
        from PIL import Image

        path = self.folder / "samples" / f"{name}.png"
        checkpoint.write_with(path, lambda partial: Image.fromarray(image).save(partial))
        return path

    def film(self, name: str, frames: np.ndarray, fps: int = 20) -> Path:  # (T, H, W, 3) uint8
        path = self.folder / "samples" / f"{name}.gif"
        checkpoint.write_with(path, lambda partial: partial.write_bytes(gif(frames, fps)))
        return path

    def generator(self, *branch: int) -> torch.Generator:
        """Random numbers that depend on the seed and the place only: resumed runs repeat them."""
        seed = int(np.random.SeedSequence([self.config.seed, *branch]).generate_state(1)[0])
        return torch.Generator().manual_seed(seed)


def load_weights(model: torch.nn.Module, state: dict[str, Any], where: Path) -> None:
    """Also of a compiled model, whose names carry a prefix."""
    state = {key.removeprefix("_orig_mod."): value for key, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise StageError(
            f"ha: expected weights of {type(model).__name__} in {where}, got others: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from None


def fingerprint(model: torch.nn.Module) -> int:
    """A number that tells one set of weights from another."""
    total = 0
    for value in model.state_dict().values():
        total = zlib.crc32(value.detach().cpu().contiguous().numpy().tobytes(), total)
    return total
