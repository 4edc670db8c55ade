"""Steps of static shapes: on a GPU those that recur are captured as CUDA graphs, and then launched whole and not kernel by kernel.

The graphs of an engine share one memory pool, so together they take what the largest needs, and what a step returns must be
read before the next one runs. At most `KEPT` are held; the least recently used is dropped.
"""

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

KEPT = 32
"""Captured steps, each with its logits, its mask and some megabytes of the driver's."""
WORTH = 4
"""Use of a shape at which it is captured: that costs several runs, and many shapes come once."""

Step = tuple[Callable[[], torch.Tensor], Sequence[torch.Tensor]]
"""What computes float[N, V], and the tensors int64[N] that it reads, as they are where there is nothing to do."""


class Graphs:
    """The steps of one engine by their shapes; not captured unless the device is a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self._kept: dict[Hashable, _Static] = {}  # the least recently used first
        self._stream: Any = None  # of all captures, or they would not share memory

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Drop all: what they read or write is about to move."""
        self._kept.clear()

    def run(self, shape: Hashable, make: Callable[[], Step], values: Sequence[torch.Tensor]) -> torch.Tensor:
        """float[N, V] of the step of this shape, which is made where there is none, on `values` int64[M] (M <= N, one for each
        tensor that it reads). Valid until the next call."""
        static = self._kept.pop(shape, None)
        if static is None:
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            static = _Static(*make())
        static.uses += 1
        if self.device.type == "cuda" and static.uses == WORTH:
            self._capture(static)
        self._kept[shape] = static
        return static.run(values)

    def _capture(self, static: "_Static") -> None:
        current = torch.cuda.current_stream(self.device)
        self._stream = self._stream or torch.cuda.Stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # what is set up at a first run must not be captured
                static.step()
        current.wait_stream(self._stream)
        living = next((one.graph for one in self._kept.values() if one.graph), None)  # a pool ends with its last graph
        pool = None if living is None else living.pool()
        graph = torch.cuda.CUDAGraph()
        # other threads (tools, judges) may use the GPU meanwhile
        with (
            _no_collection(),
            torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            static.logits = static.step()
        static.graph = graph


@contextmanager
def _no_collection() -> Iterator[None]:
    """Within, no garbage is collected: a graph of an engine that is gone, freed while another is captured, would spoil that one."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class _Static:
    """A step and the tensors that it reads, which stay in their place."""

    graph: Any = None
    uses = 0
    logits: torch.Tensor

    def __init__(self, step: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor]):
        self.step, self.inputs = step, inputs
        self.padding = [static.clone() for static in inputs]

    def run(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        for static, padding, value in zip(self.inputs, self.padding, values, strict=True):
            static.copy_(padding)
            static[: len(value)] = value
        if self.graph is None:
            return self.step()
        self.graph.replay()
        return self.logits
