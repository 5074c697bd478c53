"""Data and models of other World Models code, into our run folders and out of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastwm import checkpoint
from fastwm.episodes import EpisodeStore
from fastwm.episodes_npz import find_rollouts, read_rollouts, write_latents, write_rollout
from fastwm.loops.ha_run import FOLDERS, StageError
from fastwm.worldmodels.ha import MDNRNN, SIDE, ConvVAE, look
from fastwm.worldmodels.ha_convert import bare, is_foreign, rnn_from, rnn_to, vae_from, vae_to

Say = Callable[[str], None]


def import_rollouts(source: Path, target: Path, order: str, rows: int, say: Say) -> EpisodeStore:
    """Every rollout file of a folder as an episode of the store `target`.

    order: of a line, see fastwm.episodes_npz. rows: upper rows of a picture that V sees, 0: all.
    """
    store = None
    for path, episode in read_rollouts(source, order):
        episode["image"] = look(torch.from_numpy(episode["image"]), rows).numpy()
        if store is None:
            store = EpisodeStore.create(target, (SIDE, SIDE, 3), episode["action"].shape[1])
            if len(store):
                raise StageError(
                    f"convert: expected an empty folder or none at {target}, got {len(store)} "
                    "episodes; name another one"
                )
        store.append(**episode)
        say(f"{path} -> episode {len(store) - 1}, {len(episode['image'])} rows")
    return store


def export_rollouts(source: Path, target: Path, order: str, say: Say) -> None:
    """Every episode of a data folder as rollout_<number>.npz; with it the latents of its run."""
    store = EpisodeStore(source)
    target.mkdir(parents=True, exist_ok=True)
    for i in range(len(store)):
        write_rollout(target / f"rollout_{i:05d}.npz", store.episode(i), order)
    say(f"{len(store)} episodes -> {target}")
    latents = source.parent / "latents" / "mu.npy"
    if latents.is_file():
        mu = np.load(latents, mmap_mode="r")
        if len(mu) == store.rows:
            (target / "latents").mkdir(exist_ok=True)
            path = target / "latents" / f"latents_{mu.shape[1]}.npz"
            write_latents(path, mu, store)
            say(f"latents -> {path}")


def import_models(source: Path, target: Path, say: Say) -> list[str]:
    """vae, mdrnn and ctrl/best.tar of other code into a run folder; the flags that fit them."""
    flags: list[str] = []
    for name in FOLDERS.values():
        path = _model_file(source, name)
        if path is None:
            continue
        stored = _load(path)
        weights = stored["state_dict"]
        parts = {"epoch": int(stored.get("epoch", 0)), "state_dict": bare(weights)}
        if name == "ctrl":
            parts["reward"] = float(stored.get("reward", 0.0))
        elif not is_foreign(weights):
            raise StageError(f"convert: expected {path} to be of other code, got one of fastwm")
        else:
            model, options = (vae_from if name == "vae" else rnn_from)(weights)
            parts |= {"state_dict": model.state_dict(), "options": options}
            parts["precision"] = float(stored.get("precision") or 0.0)
            flags += _flags(name, options)
        checkpoint.save(target / name / "best.tar", parts)
        say(f"{path} -> {target / name / 'best.tar'}")
    if not (target / "vae").is_dir() and not (target / "mdrnn").is_dir():
        raise StageError(f"convert: expected vae, mdrnn or ctrl/best.tar in {source}, found none")
    return flags


def _flags(name: str, options: dict[str, Any]) -> list[str]:
    if name == "vae":
        return ["--vae.latent", str(options["latent"]), "--vae.decoder_relu", "true"]
    kind = ["--rnn.mixture", "joint", "--rnn.reward", "true", "--rnn.done", "true"]
    sizes = ["--rnn.hidden", str(options["hidden"]), "--rnn.mixtures", str(options["mixtures"])]
    return sizes + kind


def export_models(source: Path, target: Path, say: Say) -> None:
    """The models of a run as best.tar files that other code loads."""
    makers = {"vae": (ConvVAE, vae_to), "mdrnn": (MDNRNN, rnn_to)}
    found = 0
    for name in FOLDERS.values():
        path = _model_file(source, name)
        if path is None:
            continue
        stored = checkpoint.load(path)
        parts = {key: stored.get(key) for key in ("epoch", "precision", "scheduler", "reward")}
        parts = {key: value for key, value in parts.items() if value is not None}
        if name in makers:
            make, translate = makers[name]
            model = make(**stored["options"])
            model.load_state_dict(bare(stored["state_dict"]))
            parts["state_dict"] = translate(model)
            # Moments of other parameters would be wrong there: a new optimizer's state.
            parts["optimizer"] = torch.optim.Adam(model.parameters()).state_dict()
            parts["earlystopping"] = stored.get("earlystopping")
        else:
            parts["state_dict"] = stored["state_dict"]
        checkpoint.save(target / name / "best.tar", parts)
        say(f"{path} -> {target / name / 'best.tar'}")
        found += 1
    if not found:
        raise StageError(f"convert: expected vae, mdrnn or ctrl/best.tar in {source}, found none")


def has_models(folder: Path) -> bool:
    return any(_model_file(folder, name) for name in FOLDERS.values())


def has_rollouts(folder: Path) -> bool:
    return bool(find_rollouts(folder))


def _model_file(folder: Path, name: str) -> Path | None:
    paths = [folder / name / f"{which}.tar" for which in ("best", "checkpoint")]
    return next((path for path in paths if path.is_file()), None)


def _load(path: Path) -> dict[str, Any]:
    """A .tar of other code; runs nothing that it contains."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        stored["state_dict"].items()
    except Exception as error:  # torch reports damage as any of a dozen types
        raise StageError(
            f"convert: expected a dict with state_dict in {path}, got "
            f"{str(error).strip().splitlines()[0][:120]}"
        ) from None
    return stored
