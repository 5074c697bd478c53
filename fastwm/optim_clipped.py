"""Adam with one clip over all gradients of its group, that can skip an update on the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class ClippedAdam:
    """torch.optim.Adam over named parameters, gradients scaled to a norm of at most max_grad_norm.

    max_grad_norm 0 clips nothing. An update whose `finite` is False changes nothing.
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        max_grad_norm: float,
        eps: float = 1e-8,
    ) -> None:
        self.names, self.params = zip(*named_params, strict=True)
        self.max_grad_norm = max_grad_norm
        self.adam = torch.optim.Adam(self.params, lr=lr, eps=eps, fused=True)

    def grad_norm(self) -> Tensor:  # ()
        """Norm over all gradients, before clipping."""
        grads = [p.grad for p in self.params if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())

    def step(self, norm: Tensor, finite: Tensor) -> None:  # (), () bool
        """Clip by the norm that `grad_norm` returned and apply, unless not finite."""
        if self.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self.params, self.max_grad_norm, norm)
        self.adam.found_inf = 1.0 - finite.float()  # as GradScaler tells a fused optimizer
        self.adam.step()

    def zero_grad(self) -> None:
        self.adam.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        return {"names": list(self.names), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        if list(state["names"]) != list(self.names):
            raise ValueError(
                f"ClippedAdam: expected moments of {len(self.names)} parameters, got "
                f"{len(state['names'])} of other names; the checkpoint belongs to another model"
            )
        options = {key: self.adam.param_groups[0][key] for key in ("lr", "eps")}
        self.adam.load_state_dict(state["adam"])
        self.adam.param_groups[0].update(options)  # a changed setting applies
