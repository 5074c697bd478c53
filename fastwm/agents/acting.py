"""Decisions as one CUDA graph: observations in, actions and what is stored of them out.

Around the graph: what came from the host is laid into page-locked memory, the state is copied in,
and the graph's results are copied out. The way to the device and back is part of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastwm.cudagraph import Graphed

ALIGN = 16  # bytes; where a tensor begins in a parcel
Tensors = dict[str, Tensor]


class Parcel:
    """Memory on the host and on a device for tensors like these, which travel in one copy.

    The host's is page-locked where the device is a GPU. `here`, `there`: views of both, by name.
    """

    def __init__(self, tensors: Tensors, device: torch.device) -> None:
        sizes = [-(-value.nbytes // ALIGN) * ALIGN for value in tensors.values()]
        self._here = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._there = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        self.here, self.there = (
            {
                name: part[: value.nbytes].view(value.dtype).view(value.shape)
                for (name, value), part in zip(tensors.items(), memory.split(sizes), strict=True)
            }
            for memory in (self._here, self._there)
        )

    def fill(self, tensors: Tensors) -> None:
        for name, view in self.here.items():
            view.copy_(tensors[name])

    def send(self) -> Tensors:
        """What was filled in, on the device."""
        self._there.copy_(self._here, non_blocking=True)
        return self.there

    def fetch(self, tensors: Tensors) -> None:
        """To the host, for `take` once that is done."""
        for name, view in self.there.items():
            view.copy_(tensors[name])
        self._here.copy_(self._there, non_blocking=True)

    def take(self) -> Tensors:
        """What was fetched, as the caller's own."""
        return {name: view.clone() for name, view in self.here.items()}


class GraphedActing:
    """`decide` as a graph for every number of environments, mode and actor.

    Args: decide: (obs with is_first, state, mode, generator, actor) -> (action, state, latents), on
          the device alone. generator: its noise, known to the recorder; takes the state of whoever
          asks and hands it back, so that every generator gives what it would give without a graph.
          recorder: CudaRecorder. keep: whether latents stay on the device.
    The state that comes in is copied into the graph's memory, and what is handed out is copied from
    there: nobody's tensors change later, and any state may come next.
    """

    def __init__(
        self, decide: Callable[..., Any], generator: torch.Generator, recorder: Any, keep: bool
    ) -> None:
        self.decide, self.generator, self.recorder, self.keep = decide, generator, recorder, keep
        self.graphed = Graphed(self._decide, recorder, "acting")
        self.outward: dict[tuple, Parcel] = {}
        self.homeward: dict[Parcel, Parcel] = {}

    def __call__(
        self, obs: Tensors, state: Tensors, mode: str, source: torch.Generator, actor: Any
    ) -> tuple[Tensor, Tensors, Tensors]:
        """obs: on the host. Returns action (N, *shape) there, the next state, the latents."""
        layout = tuple((name, value.shape, value.dtype) for name, value in obs.items())
        if layout not in self.outward:
            self.outward[layout] = Parcel(obs, self.generator.device)
        parcel = self.outward[layout]
        parcel.fill(obs)
        self.generator.set_state(source.get_state())
        state, kept = self.graphed([state], parcel, mode, actor)
        source.set_state(self.generator.get_state())
        self.recorder.wait()
        found = self.homeward[parcel].take()
        return found.pop("action"), state, found | kept

    def _decide(
        self, states: list[Tensors], parcel: Parcel, mode: str, actor: Any
    ) -> tuple[Tensors, Tensors]:
        obs = parcel.send()
        action, state, latents = self.decide(obs, states[0], mode, self.generator, actor)
        found, kept = ({}, latents) if self.keep else (latents, {})
        found = {"action": action} | found
        if parcel not in self.homeward:
            self.homeward[parcel] = Parcel(found, action.device)
        self.homeward[parcel].fetch(found)
        return state, kept
