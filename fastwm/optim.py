"""Optimizers with warm-up and schedules: LaProp with adaptive clipping, Adam; and loss scaling."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastwm import ops

SCHEDULES = ("const", "linear", "cosine")


class _Optimizer:
    """What the optimizers share: parameters by name, moments, the rate's schedule, storage.

    An update with a non-finite gradient changes nothing. With warm-up the first update has learning
    rate 0 (it counts from zero). `copies` are written in the same pass (see `ops.Copies`).
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        weight_decay: float,
        warmup: int,
        schedule: str,
        anneal: int,
        **options: float,
    ) -> None:
        who = type(self).__name__
        if schedule not in SCHEDULES:
            raise ValueError(f"{who}: expected schedule to be one of {SCHEDULES}, got {schedule!r}")
        if schedule != "const" and anneal <= warmup:
            raise ValueError(
                f"{who}: expected optim.anneal > warmup = {warmup} for schedule {schedule!r}, "
                f"got {anneal}"
            )
        self.names, self.params = zip(*named_params, strict=True)
        self.lr, self.warmup, self.schedule, self.anneal = lr, warmup, schedule, anneal
        self.options = dict(options, weight_decay=weight_decay)
        if weight_decay:
            self.options["decay_mask"] = [p.dim() > 1 for p in self.params]
        device = self.params[0].device
        self.mu = [torch.zeros_like(p) for p in self.params]
        self.nu = [torch.zeros_like(p) for p in self.params]
        self.step_count = torch.zeros((), dtype=torch.float32, device=device)

    def _apply(self, *args, **options) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def learning_rate(self) -> Tensor:
        """Rate of the next update, a 0-d tensor computed without a host sync."""
        step, floor = self.step_count, 0.1
        lr = torch.full_like(step, self.lr)
        if self.schedule != "const":
            done = ((step - self.warmup) / (self.anneal - self.warmup)).clamp(0.0, 1.0)
            if self.schedule == "cosine":
                done = 0.5 - 0.5 * torch.cos(math.pi * done)
            lr = lr * (1.0 - (1.0 - floor) * done)
        if self.warmup:
            lr = lr * (step / self.warmup).clamp(max=1.0)
        return lr

    @torch.no_grad()
    def step(
        self, loss: Tensor, scale: Tensor | float = 1.0, copies: ops.Copies | None = None
    ) -> tuple[Tensor, Tensor]:
        """Apply the gradients in `.grad`.

        loss: 0-d; a non-finite loss skips the update even where its gradients are finite.
        scale: what the loss was multiplied with before the backward pass (see LossScale).
        copies: what to write in the same pass, in the order of `params`.
        Returns (grad_norm 0-d float32, finite 0-d bool).
        """
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        scale = torch.where(torch.isfinite(loss), scale, float("nan"))
        return self._apply(
            list(self.params),
            grads,
            self.mu,
            self.nu,
            self.step_count,
            self.learning_rate(),
            grad_scale=scale,
            copies=copies or ops.Copies(),
            **self.options,
        )

    def zero_grad(self) -> None:
        for param in self.params:
            param.grad = None

    def state_dict(self) -> dict:
        return {
            "step": self.step_count.clone(),
            "mu": dict(zip(self.names, self.mu, strict=True)),
            "nu": dict(zip(self.names, self.nu, strict=True)),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.step_count.copy_(state["step"])
        for slot, own in (("mu", self.mu), ("nu", self.nu)):
            if set(state[slot]) != set(self.names):
                raise ValueError(
                    f"{type(self).__name__}: expected moments of {len(self.names)} parameters, got "
                    f"{len(state[slot])}; the checkpoint belongs to another model"
                )
            for name, tensor in zip(self.names, own, strict=True):
                tensor.copy_(state[slot][name])


class LaProp(_Optimizer):
    """RMS-scaled gradients, then momentum, then the learning rate; clipped per tensor by AGC.

    The optimizer of DreamerV3. Order of operations: docs/kernels.md, stem `optim`.
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        agc: float,
        pmin: float,
        eps: float,
        beta1: float,
        beta2: float,
        weight_decay: float,
        nesterov: bool,
        warmup: int,
        schedule: str,
        anneal: int,
    ) -> None:
        super().__init__(
            named_params, lr=lr, weight_decay=weight_decay, warmup=warmup, schedule=schedule,
            anneal=anneal, agc=agc, pmin=pmin, eps=eps, beta1=beta1, beta2=beta2,
            nesterov=nesterov,
        )  # fmt: skip

    def _apply(self, *args, **options) -> tuple[Tensor, Tensor]:
        return ops.laprop_agc_(*args, **options)


class Adam(_Optimizer):
    """Adam, or AdamW with `decoupled`; all gradients together clipped to norm `clip`, 0: never.

    Weight decay reaches tensors of two and more dimensions only.
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        clip: float = 0.0,
        clip_value: float = 0.0,
        eps: float = 1e-8,
        beta1: float = 0.9,
        beta2: float = 0.999,
        weight_decay: float = 0.0,
        decoupled: bool = True,
        warmup: int = 0,
        schedule: str = "const",
        anneal: int = 0,
    ) -> None:
        super().__init__(
            named_params, lr=lr, weight_decay=weight_decay, warmup=warmup, schedule=schedule,
            anneal=anneal, clip_norm=clip, clip_value=clip_value, eps=eps, beta1=beta1,
            beta2=beta2, decoupled=decoupled,
        )  # fmt: skip

    def _apply(self, *args, **options) -> tuple[Tensor, Tensor]:
        return ops.adam_(*args, **options)


class LossScale:
    """What a float16 loss is multiplied with, so that small gradients do not round to zero.

    Doubles after `patience` updates without overflow, halves after one, within LIMITS. Lives on the
    device: no host sync.
    """

    LIMITS = (1e-4, 1e5)

    def __init__(self, device: torch.device, initial: float = 1e4, patience: int = 1000) -> None:
        self.patience = patience
        self.value = torch.full((), initial, device=device)
        self.good = torch.zeros((), device=device)

    @torch.no_grad()
    def follow(self, finite: Tensor) -> None:  # () bool
        """Note whether the gradients of an update were finite."""
        good = torch.where(finite, self.good + 1.0, 0.0)
        grown = good >= self.patience
        factor = torch.where(finite, torch.where(grown, 2.0, 1.0), 0.5)
        self.value.mul_(factor).clamp_(*self.LIMITS)
        self.good.copy_(torch.where(grown, 0.0, good))

    def can_shrink(self) -> Tensor:  # () bool
        """Whether an overflow may be the fault of the scale."""
        return self.value > self.LIMITS[0]

    def state_dict(self) -> dict:
        return {"value": self.value.clone(), "good": self.good.clone()}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.value.copy_(state["value"])
        self.good.copy_(state["good"])
