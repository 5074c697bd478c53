"""Updates and decisions as one CUDA graph: recorded once per batch shape, then one launch for all.

What is recorded must live on the device alone: no host synchronisation, no Python number that
changes from call to call (counters and learning rates are tensors), random numbers from
generators that are named here. Copies to and from page-locked memory that stays are allowed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Batches = Sequence[dict[str, Tensor]]
WARMUP = 3  # calls that run as they are before one is recorded: libraries set themselves up


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
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                result = function()
        except RuntimeError:
            for generator in self.generators:  # which may still wait for the end of the recording
                generator.graphsafe_set_state(generator.clone_state())
            raise
        return result, graph.replay

    def wait(self) -> None:
        """Until all that was launched is done."""
        torch.cuda.current_stream().synchronize()


class Graphed:
    """`function(inputs, *choices) -> results` (nested tensors), as a graph from the fourth call on.

    Shapes and types of the inputs, and the choices, have a graph each.
    Args: function: reads only the inputs and tensors that stay in place. recorder: CudaRecorder.
    name: for the warning.
    The results are the caller's own; what the function leaves elsewhere (gradients) stays in the
    graph's memory. Where recording fails, one warning says why, and calls run as they are.
    """

    def __init__(self, function: Callable[..., Any], recorder: Any, name: str) -> None:
        self.function, self.recorder, self.name = function, recorder, name
        self.seen: dict[Hashable, int] = {}
        self.recorded: dict[Hashable, _Recorded] = {}
        self.failed = False

    def __call__(self, inputs: Batches, *choices: Hashable) -> Any:
        if self.failed:
            return self.function(inputs, *choices)
        shapes = tuple(
            tuple((key, value.shape, value.dtype) for key, value in sorted(batch.items()))
            for batch in inputs
        )
        kind = (shapes, choices)
        if kind not in self.recorded:
            self.seen[kind] = self.seen.get(kind, 0) + 1
            if self.seen[kind] <= WARMUP:
                return self.recorder.eager(lambda: self.function(inputs, *choices))
            try:
                self.recorded[kind] = _Recorded(self.function, inputs, choices, self.recorder)
            except RuntimeError as error:
                self.failed = True
                cause = str(error).strip().splitlines()[0]
                warnings.warn(
                    f"fastwm: {self.name} could not be recorded as a CUDA graph ({cause}); it "
                    "runs as it is, slower. --cudagraphs off silences this",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return self.function(inputs, *choices)
        return self.recorded[kind](inputs)


class _Recorded:
    """One graph, the memory it reads its inputs from, and the memory it leaves its results in.

    Results that are single numbers are stacked by type, so that handing them out is a few copies.
    """

    def __init__(
        self, function: Callable[..., Any], inputs: Batches, choices: tuple, recorder: Any
    ) -> None:
        self.inputs = [{key: value.clone() for key, value in b.items()} for b in inputs]

        def record() -> list[Tensor]:
            leaves, self.spec = tree_flatten(function(self.inputs, *choices))
            self.groups: dict[torch.dtype, list[int]] = {}
            for i, leaf in enumerate(leaves):
                if leaf.dim() == 0:
                    self.groups.setdefault(leaf.dtype, []).append(i)
            self.count = len(leaves)
            self.whole = [i for i, leaf in enumerate(leaves) if leaf.dim()]
            stacked = [torch.stack([leaves[i] for i in g]) for g in self.groups.values()]
            return stacked + [leaves[i] for i in self.whole]

        self.results, self.replay = recorder.record(record)

    def __call__(self, inputs: Batches) -> Any:
        pairs = zip(self.inputs, inputs, strict=True)
        copy_all([(value, given[key]) for mine, given in pairs for key, value in mine.items()])
        self.replay()
        copies = [torch.empty_like(result) for result in self.results]
        copy_all(list(zip(copies, self.results, strict=True)))
        leaves: list[Any] = [None] * self.count
        for places, stacked in zip(self.groups.values(), copies, strict=False):
            for i, number in zip(places, stacked.unbind(), strict=True):
                leaves[i] = number
        for i, result in zip(self.whole, copies[len(self.groups) :], strict=True):
            leaves[i] = result
        return tree_unflatten(leaves, self.spec)


@torch.no_grad()
def copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Every second tensor into the first; on CUDA one launch for all of a type."""
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for to, source in pairs:
        targets, sources = groups.setdefault(to.dtype, ([], []))
        targets.append(to)
        sources.append(source)
    for targets, sources in groups.values():
        torch._foreach_copy_(targets, sources, non_blocking=True)
