"""Updates as one CUDA graph: recorded once per batch shape, then one launch for all of them.

What is recorded must live on the device alone: no host synchronisation, no Python number that
changes from update to update (counters and learning rates are tensors), random numbers from
generators that are named here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Batches = Sequence[dict[str, Tensor]]
WARMUP = 3  # updates that run as they are before one is recorded: libraries set themselves up


class CudaRecorder:
    """Records on CUDA. All graphs share one pool of memory: they never run at the same time."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = [g for g in generators if g.device.type == "cuda"]
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def eager(self, function: Callable[[], Any]) -> Any:
        """Runs on the stream that will record, as CUDA graphs ask of the calls before."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """The results' memory, and what runs the recorded work again; nothing has run yet."""
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = function()
        return result, graph.replay


class GraphedUpdate:
    """`update(batches) -> results` (nested tensors), from the fourth call of a shape on as a graph.

    A call holds one batch, or several for as many updates in one launch.
    Args: update: reads only the batches and tensors that stay in place. recorder: CudaRecorder.
    The results are the caller's own; what the update leaves elsewhere (gradients) stays in the
    graph's memory. Where recording fails, one warning says why, and updates run as they are.
    """

    def __init__(self, update: Callable[[Batches], Any], recorder: Any) -> None:
        self.update, self.recorder = update, recorder
        self.seen: dict[tuple, int] = {}
        self.recorded: dict[tuple, _Recorded] = {}
        self.failed = False

    def __call__(self, batches: Batches) -> Any:
        if self.failed:
            return self.update(batches)
        shapes = tuple(
            tuple((key, value.shape, value.dtype) for key, value in sorted(batch.items()))
            for batch in batches
        )
        if shapes not in self.recorded:
            self.seen[shapes] = self.seen.get(shapes, 0) + 1
            if self.seen[shapes] <= WARMUP:
                return self.recorder.eager(lambda: self.update(batches))
            try:
                self.recorded[shapes] = _Recorded(self.update, batches, self.recorder)
            except RuntimeError as error:
                self.failed = True
                cause = str(error).strip().splitlines()[0]
                warnings.warn(
                    f"fastwm: an update could not be recorded as a CUDA graph ({cause}); updates "
                    "run as they are, slower. --cudagraphs off silences this",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return self.update(batches)
        return self.recorded[shapes](batches)


class _Recorded:
    """One graph, the memory it reads its batches from, and the memory it leaves its results in.

    Results that are single numbers are stacked by type, so that handing them out is a few copies.
    """

    def __init__(self, update: Callable[[Batches], Any], batches: Batches, recorder: Any) -> None:
        self.batches = [{key: value.clone() for key, value in b.items()} for b in batches]

        def record() -> list[Tensor]:
            leaves, self.spec = tree_flatten(update(self.batches))
            self.groups: dict[torch.dtype, list[int]] = {}
            for i, leaf in enumerate(leaves):
                if leaf.dim() == 0:
                    self.groups.setdefault(leaf.dtype, []).append(i)
            self.count = len(leaves)
            self.whole = [i for i, leaf in enumerate(leaves) if leaf.dim()]
            stacked = [torch.stack([leaves[i] for i in g]) for g in self.groups.values()]
            return stacked + [leaves[i] for i in self.whole]

        self.results, self.replay = recorder.record(record)

    def __call__(self, batches: Batches) -> Any:
        for mine, batch in zip(self.batches, batches, strict=True):
            for key, value in mine.items():
                value.copy_(batch[key], non_blocking=True)
        self.replay()
        copies = [result.clone() for result in self.results]
        leaves: list[Any] = [None] * self.count
        for places, stacked in zip(self.groups.values(), copies, strict=False):
            for i, number in zip(places, stacked.unbind(), strict=True):
                leaves[i] = number
        for i, result in zip(self.whole, copies[len(self.groups) :], strict=True):
            leaves[i] = result
        return tree_unflatten(leaves, self.spec)
