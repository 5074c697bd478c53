"""One optimizer of several: Adam over its own parameters, with its clip and its loss scale."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastwm.optim import Adam, LossScale


class ScaledAdam:
    """Scale, backward, unscale, clip, step, update, in this order and without a host sync.

    options: of fastwm.optim.Adam; `clip` bounds the norm of the whole gradient after unscaling.
    scaled: whether the loss is multiplied with a LossScale, as float16 needs. A loss or gradient
    that is not finite changes no parameter and no moment; with `scaled` it halves the scale.
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, nn.Parameter]],
        *,
        scaled: bool = False,
        **options: float,
    ) -> None:
        self.adam = Adam(named_params, **options)
        self.scale = LossScale(self.adam.step_count.device) if scaled else None

    def descend(
        self, loss: Tensor, healthy: Tensor | bool = True
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """One update on a 0-d loss, skipped unless `healthy`.

        Returns metrics (grad_norm, with a scale also grad_scale), whether the update was applied,
        and whether all is well: an overflow that a smaller scale can cure is well.
        """
        self.adam.zero_grad()
        value = loss.detach()
        sound = torch.isfinite(value) & healthy
        value = torch.where(sound, value, float("nan"))  # for Adam, which skips such a loss
        if self.scale is None:
            loss.backward()
            norm, applied = self.adam.step(value)
            return {"grad_norm": norm}, applied, applied
        (loss * self.scale.value).backward()
        norm, applied = self.adam.step(value, self.scale.value)
        well = applied | (sound & self.scale.can_shrink())
        self.scale.follow(applied)
        return {"grad_norm": norm, "grad_scale": self.scale.value.clone()}, applied, well

    def state_dict(self) -> dict:
        scale = self.scale and self.scale.state_dict()
        return {"adam": self.adam.state_dict(), "scale": scale}

    def load_state_dict(self, state: dict) -> None:
        self.adam.load_state_dict(state["adam"])
        if self.scale is not None and state["scale"]:  # precision may change
            self.scale.load_state_dict(state["scale"])
