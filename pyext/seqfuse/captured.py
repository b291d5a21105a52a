"""Steps of generation as a CUDA graph: hundreds of launches that the CPU makes once and the GPU then repeats.

A graph knows tensors by their addresses and runs no Python. So a step that is captured works on tensors that stay: the
tokens are copied into one of them, and what the step, or a reorder since, has made anew is copied into those that the
cache had. All else is the model's own step().

Not yet run on a GPU: tests record a step's ops on the CPU and repeat those.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def cuda_graph(run: Callable[[], None]) -> Callable[[], None]:
    """Records what `run` launches, without running it; returns what launches it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class CapturedSteps:
    """model.step(ids, cache) of one cache. The first call with so many rows runs as it is, which compiles kernels and
    allocates workspaces; the second is captured; all further ones repeat it. The logits are overwritten by the next."""

    def __init__(self, model, cache, capture: Callable = cuda_graph):
        self.model, self.cache, self.capture = model, cache, capture
        self.ids: Tensor | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: [B] int64 -> logits [B, V]."""
        if self.ids is None or ids.shape != self.ids.shape:
            self.ids, self.replay = ids.clone(), None
            return self.model.step(ids, self.cache)
        self.ids.copy_(ids)
        if self.replay is None:
            self.fixed = self.cache.tensors()
            self.replay = self.capture(self._step)
        else:
            self._settle()
            self.cache.replayed()
        self.replay()
        return self.logits

    def _step(self) -> None:
        self.logits = self.model.step(self.ids, self.cache)
        self._settle()

    def _settle(self) -> None:
        """Into the tensors that the graph knows goes whatever has taken their place in the cache."""
        for fixed, now in zip(self.fixed, self.cache.tensors(), strict=True):
            if now is not fixed:
                fixed.copy_(now)
        self.cache.put(self.fixed)
