"""Dynamics of your own for the modular recipe: a gated step in place of plain dense layers.

python -m fastwm.train modular --dynamics.name examples.custom_component:GatedDynamics

Any class will do that offers what fastwm/worldmodels/modular_components.py asks of its slot. It
gets the sizes, then `--dynamics.options.NAME VALUE` as keyword arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Normal


class GatedDynamics(nn.Module):
    """s' = s + g * u: how far to move, and whether to move at all, per element of the state."""

    loss = "mse"  # what trains it: "mse" on the mean, or "nll" on the whole distribution

    def __init__(self, state_size: int, action_size: int, *, hidden: int = 64) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(state_size + action_size, hidden), nn.SiLU())
        self.gate = nn.Linear(hidden, state_size)
        self.move = nn.Linear(hidden, state_size)

    def forward(self, state: Tensor, action: Tensor) -> Normal:  # (..., S), (..., A)
        x = self.hidden(torch.cat([state, action], -1))
        mean = state + torch.sigmoid(self.gate(x)) * self.move(x)
        return Normal(mean, torch.full_like(mean, 0.01), validate_args=False)
