"""Stages vae, latents and rnn: learning V and M from stored episodes, epoch by epoch."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastwm import checkpoint
from fastwm.episodes import EpisodeStore, Frames, Latents
from fastwm.log import Mean
from fastwm.loops.ha_run import HaRun, StageError, fingerprint, load_weights
from fastwm.loops.ha_samples import dream_samples, vae_samples
from fastwm.worldmodels.ha import (
    MDNRNN,
    ConvVAE,
    latent_sample,
    mdn_loss,
    vae_loss,
)

VAE, RNN = 11, 12  # branches of the run's seed
NAMES = ("mu", "logvar")  # of the arrays in latents/
ENCODE = 128  # pictures encoded at once
TEST_WINDOWS = 512  # most sequences that an evaluation of M looks at


class EarlyStopping:
    """Counts evaluations without a new lowest loss; `over` after more than `patience` of them."""

    def __init__(self, patience: int) -> None:
        self.patience, self.best, self.bad = patience, float("inf"), 0

    def __call__(self, loss: float) -> bool:
        """Whether this is the lowest loss so far."""
        better = loss < self.best
        self.best, self.bad = min(self.best, loss), 0 if better else self.bad + 1
        return better

    @property
    def over(self) -> bool:
        return self.bad > self.patience

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.best, self.bad = state["best"], state["bad"]


class Fit:
    """Epochs of one model: resume, plateau scheduler, early stopping, best.tar, checkpoint.tar.

    stage: see HaRun.path. options: config.vae or config.rnn. extra: what else stands in both files.
    """

    def __init__(
        self,
        run: HaRun,
        stage: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        options: Any,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.run, self.stage, self.model, self.options = run, stage, model, options
        self.group = stage.partition(":")[0]  # of settings and metrics
        self.optimizer, self.extra = optimizer, extra or {}
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=options.scheduler_factor, patience=options.scheduler_patience
        )
        self.stopping = EarlyStopping(options.early_stopping_patience)
        self.round = 0 if stage == "vae" else run.round  # V learns in the first round alone
        self.epoch, self.total = 0, options.again if self.round else options.epochs
        stored = run.saved(stage)
        if stored is not None:
            self._resume(stored)

    def _resume(self, stored: dict[str, Any]) -> None:
        for key, value in self.extra.items():
            if stored.get(key) != value:
                raise StageError(
                    f"{self.stage}: expected {self.run.path(self.stage)} to be of {key} {value}, "
                    f"got {stored.get(key)}; it learned from other data: move "
                    f"{self.run.path(self.stage).parent} away, or give another --logdir"
                )
        load_weights(self.model, stored["state_dict"], self.run.path(self.stage))
        before = stored.get("round", 0)
        if before < self.round:  # other data: only the weights go on
            return
        if before > self.round:  # its time is over
            self.total = 0
        self.optimizer.load_state_dict(stored["optimizer"])
        self.scheduler.load_state_dict(stored["scheduler"])
        self.stopping.load_state_dict(stored["earlystopping"])
        self.epoch = stored["epoch"]

    def epochs(
        self,
        learn: Callable[[int], dict[str, float]],
        test: Callable[[], dict[str, float]],
        show: Callable[[int], None],
    ) -> None:
        """Until `total`, early stopping or a signal. learn, test: return losses."""
        say, name = self.run.logger.say, f"{self.stage:8}"
        if self.epoch >= self.total or self.stopping.over:
            key = f"{self.group}.again" if self.round else f"{self.group}.epochs"
            more = f"; raise --{key} to go on" if self.total else "; a later round has begun"
            say(f"{name} done at epoch {self.epoch}{more}")
        while self.epoch < self.total and not self.stopping.over:
            began = time.monotonic()
            losses = learn(self.epoch)
            if self.run.stopped:  # the epoch is repeated from its beginning
                return
            losses |= {f"test_{key}": value for key, value in test().items()}
            self.epoch += 1
            key = "test_loss" if "test_loss" in losses else "loss"
            if not np.isfinite(losses[key]):
                raise StageError(
                    f"{self.stage}: expected a finite loss in epoch {self.epoch}, got "
                    f"{losses[key]}; lower --{self.group}.lr. The checkpoint of the epoch before "
                    "stays as it is"
                )
            self.scheduler.step(losses[key])
            better = self.stopping(losses[key])
            seconds = time.monotonic() - began
            self.run.log({f"{self.group}/{k}": v for k, v in losses.items()})
            self._save(losses[key], better)
            left = (self.total - self.epoch) * seconds
            text = ", ".join(f"{k} {v:.4g}" for k, v in losses.items())
            say(f"{name} epoch {self.epoch} of {self.total}: {text} ({left:.0f} s left)")
            every = self.options.sample_interval
            if every and (self.epoch % every == 0 or self.epoch == self.total):
                show(self.epoch)

    def _save(self, loss: float, better: bool) -> None:
        parts = {
            "epoch": self.epoch,
            "round": self.round,
            "state_dict": self.model.state_dict(),
            "precision": loss,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "earlystopping": self.stopping.state_dict(),
            "options": self.model.options(),
            **self.extra,
        }
        self.run.save(self.stage, parts)
        if better:
            self.run.save(self.stage, parts, "best")


def fit_vae(run: HaRun, vae: ConvVAE) -> None:
    """Stage vae."""
    store, options = check_pictures(run.store()), run.config.vae
    learned, tested = store.split(run.config.num_test_files, options.episodes)
    frames, test_frames = Frames(store, learned), Frames(store, tested)
    vae.to(run.device).train()
    fit = Fit(run, "vae", vae, torch.optim.Adam(vae.parameters(), options.lr), options)
    run.logger.say(
        f"vae      {len(frames)} frames of {len(learned)} episodes, "
        f"{len(test_frames)} of {len(tested)} to test on"
    )

    def learn(epoch: int) -> dict[str, float]:
        draw, means = run.generator(VAE, epoch), Mean()
        for part in torch.randperm(len(frames), generator=draw).split(options.batch_size):
            if run.stopped:
                break
            image = vae.pixels(torch.from_numpy(frames.batch(part.numpy())).to(run.device))
            if options.flip:
                mirror = torch.rand(len(image), generator=draw) < 0.5
                image[mirror] = image[mirror].flip(-1)
            loss, parts = _vae_pass(vae, image, draw, options)
            fit.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            fit.optimizer.step()
            run.updates += 1
            means.add({"loss": loss.detach(), **parts})
        return means.read()

    @torch.no_grad()
    def test() -> dict[str, float]:
        draw, means = run.generator(VAE, 10**6), Mean()
        for part in _parts(torch.arange(len(test_frames)), options.batch_size):
            image = vae.pixels(torch.from_numpy(test_frames.batch(part.numpy())).to(run.device))
            loss, parts = _vae_pass(vae, image, draw, options)
            means.add({"loss": loss, **parts})
        return means.read()

    shown = test_frames if len(test_frames) else frames
    fit.epochs(learn, test, lambda epoch: vae_samples(run, vae, shown, epoch))


def _parts(index: Tensor, size: int) -> tuple[Tensor, ...]:
    """Of nothing none, where `split` gives one empty part, whose mean loss is no number."""
    return index.split(size) if len(index) else ()


def _vae_pass(
    vae: ConvVAE, image: Tensor, draw: torch.Generator, options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    noise = torch.randn(len(image), vae.latent, generator=draw).to(image.device)
    half = image.device.type == "cuda"
    with torch.autocast(image.device.type, torch.bfloat16, enabled=half):
        recon, mu, logvar = vae(image, noise)
    parts = recon.float(), mu.float(), logvar.float()
    return vae_loss(image, *parts, options.free_nats, options.kl_scale)


def check_pictures(store: EpisodeStore) -> EpisodeStore:
    if store.shape != (64, 64, 3):
        raise StageError(
            f"vae: expected pictures of shape (64, 64, 3) in {store.folder}, got {store.shape}; "
            "collect or convert them at 64 x 64"
        )
    return store


@torch.inference_mode()
def encode(run: HaRun, vae: ConvVAE) -> None:
    """Stage latents: mean and log-variance of every row, float16. Only what is not there yet."""
    mark, store = run.load_model("vae", vae), run.store()
    folder = run.folder / "latents"
    index = {"vae": mark, "rows": store.rows, "latent": vae.latent}
    index["actions"] = _actions(store, store.rows)
    found = np.empty((2, store.rows, vae.latent), np.float16)
    there = _known(folder, index, store, found)
    if there == store.rows:
        run.logger.say(f"latents  of {store.rows} rows are there")
        return
    check_pictures(store)
    began = time.monotonic()
    size = ENCODE if run.device.type == "cpu" else 4096
    for start in range(there, store.rows, size):
        if run.stopped:
            return
        part = torch.from_numpy(np.array(store.image[start : start + size]))
        both = torch.stack(vae.encode(part.to(run.device)))
        found[:, start : start + size] = both.clamp(-6e4, 6e4).cpu().half().numpy()
    (folder / "index.json").unlink(missing_ok=True)
    for name, array in zip(NAMES, found, strict=True):
        with checkpoint.atomic_file(folder / f"{name}.npy") as file:
            np.save(file, array)
    checkpoint.write_text(folder / "index.json", json.dumps(index))
    run.logger.say(f"latents  {store.rows - there} rows in {time.monotonic() - began:.0f} s")


def _actions(store: EpisodeStore, rows: int) -> int:
    """What tells these rows from those of other episodes."""
    return zlib.crc32(np.ascontiguousarray(store.action[:rows]).tobytes())


def _known(folder: Path, wanted: dict[str, int], store: EpisodeStore, found: np.ndarray) -> int:
    """Fill `found` with the latents that this V made of the first rows; how many those are."""
    index = _read_index(folder) or {"rows": 0}
    rows = index["rows"]
    same = all(index.get(key) == wanted[key] for key in ("vae", "latent"))
    if not same or rows > store.rows or index.get("actions") != _actions(store, rows):
        return 0
    for name, array in zip(NAMES, found, strict=True):
        array[:rows] = np.load(folder / f"{name}.npy", mmap_mode="r")
    return rows


def _read_index(folder: Path) -> dict[str, int] | None:
    path = folder / "index.json"
    return json.loads(path.read_text()) if path.is_file() else None


def latents(
    run: HaRun, episodes: np.ndarray, length: int, latent: int
) -> tuple[Latents, dict[str, Any]]:
    """Windows of the stored latents, and what identifies them."""
    store, folder = run.store(), run.folder / "latents"
    index = _read_index(folder)
    if index is None or index["rows"] != store.rows or index["latent"] != latent:
        got = "none" if index is None else f"{index['rows']} of size {index['latent']}"
        raise StageError(
            f"rnn: expected latents of {store.rows} rows of size {latent} in {folder}, got {got}; "
            "run --stage latents first"
        )
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in NAMES]
    return Latents(store, episodes, length, *arrays), index


def fit_rnn(run: HaRun, rnn: MDNRNN, vae: ConvVAE, member: int = 0) -> None:
    """Stage rnn: V only draws the pictures of the samples. member: of rnn.members, which Ms."""
    options, store = run.config.rnn, run.store()
    learned, tested = store.split(run.config.num_test_files, options.episodes)
    windows, index = latents(run, learned, options.batch_length, rnn.latent)
    test_windows, _ = latents(run, tested, options.batch_length, rnn.latent)
    _check_actions(store, rnn)
    rnn.to(run.device).train()
    make = {"adam": torch.optim.Adam, "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr, 0.9)}
    optimizer = make[options.optimizer](rnn.parameters(), options.lr)
    stage = f"rnn:{member}" if member else "rnn"
    fit = Fit(run, stage, rnn, optimizer, options, {"vae": index["vae"]})
    rows = int(store.lengths[learned].sum())
    updates = options.updates or -(-rows // (options.batch_size * options.batch_length))
    run.logger.say(
        f"{stage:8} {len(windows)} windows of {len(learned)} episodes, {updates} updates per epoch"
    )

    def learn(epoch: int) -> dict[str, float]:
        draw, means = run.generator(RNN, epoch, *([member] if member else [])), Mean()
        for _ in range(updates):
            if run.stopped:
                break
            picked = torch.randint(len(windows), (options.batch_size,), generator=draw)
            loss, parts = _rnn_pass(rnn, options, windows.batch(picked.numpy()), draw, run.device)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if options.clip:
                nn.utils.clip_grad_value_(rnn.parameters(), options.clip)
            optimizer.step()
            for group in optimizer.param_groups:
                if options.lr_decay < 1:
                    group["lr"] = max(group["lr"] * options.lr_decay, options.lr_min)
            run.updates += 1
            means.add({"loss": loss.detach(), **parts})
        return means.read()

    @torch.no_grad()
    def test() -> dict[str, float]:
        draw, means = run.generator(RNN, 10**6), Mean()
        count = min(len(test_windows), TEST_WINDOWS)
        picked = torch.linspace(0, max(len(test_windows) - 1, 0), count).long()
        for part in _parts(picked, options.batch_size):
            loss, parts = _rnn_pass(
                rnn, options, test_windows.batch(part.numpy()), draw, run.device
            )
            means.add({"loss": loss, **parts})
        return means.read()

    def show(epoch: int) -> None:
        if run.path("vae", "best").is_file() and not member:
            run.load_model("vae", vae)
            dream_samples(run, vae, rnn, tested if len(tested) else learned, epoch)

    fit.epochs(learn, test, show)


def _rnn_pass(
    rnn: MDNRNN,
    options: Any,
    batch: dict[str, np.ndarray],
    draw: torch.Generator,
    device: torch.device,
) -> tuple[Tensor, dict[str, Tensor]]:
    """z is drawn anew from its stored mean and variance at every pass, inputs and targets."""
    data = {key: torch.from_numpy(np.asarray(value)).to(device) for key, value in batch.items()}
    mu, logvar = data["mu"].float(), data["logvar"].float()
    z = latent_sample(mu, logvar, torch.randn(mu.shape, generator=draw).to(device))
    mixture, _, _ = rnn.scan(rnn.features(z[:, :-1], data["action"], data["first"]))
    return mdn_loss(
        mixture,
        rnn.mixture,
        z[:, 1:],
        data["weight"],
        data["reward"],
        data["done"],
        done_weight=options.done_weight,
        reduce=options.reduce,
    )


def _check_actions(store: EpisodeStore, rnn: MDNRNN) -> None:
    if store.action_size != rnn.action:
        raise StageError(
            f"rnn: expected actions of width {rnn.action} in {store.folder}, got "
            f"{store.action_size}; the episodes are of another task, or of another --ctrl.action"
        )


__all__ = ["EarlyStopping", "Fit", "encode", "fingerprint", "fit_rnn", "fit_vae", "latents"]
