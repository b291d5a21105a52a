"""What a step does to the weights: the optimizer's groups, and the moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqfuse.parallel import local
from seqfuse.recipes.base import Task


def make_optimizer(task: Task, model: nn.Module | None = None) -> torch.optim.AdamW:
    """Parameters by the task's groups, and matrices apart from the others, which have no weight decay. model: another
    one than the task's with the same names."""
    optim = task.config.optim
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, p in (model or task.model).named_parameters():
        if p.requires_grad:
            groups.setdefault((task.group(name), p.dim() < 2), []).append(p)
    settings = [
        {"params": params, "weight_decay": 0.0 if small else optim.weight_decay, "group": group}
        for (group, small), params in sorted(groups.items(), key=lambda item: item[0])
    ]
    return torch.optim.AdamW(settings, lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=True)


class Average:
    """Exponential moving average of weights, average = decay * average + (1 - decay) * weights. decay 0: none is kept,
    and every method does nothing. tensors: the averages, in the weights' order."""

    def __init__(self, weights: list[nn.Parameter], decay: float):
        self.weights, self.decay = weights, decay
        self.tensors: list[Tensor] = [p.detach().clone() for p in weights] if decay else []

    @torch.no_grad()
    def follow(self) -> None:
        """After a step of the optimizer."""
        if self.tensors:
            torch._foreach_lerp_(self._local(self.tensors), self._local(self.weights), 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Averages for weights and weights for averages; a second call undoes it."""
        if self.tensors:
            averages, weights = self._local(self.tensors), self._local(self.weights)
            kept = [w.clone() for w in weights]
            torch._foreach_copy_(weights, averages)
            torch._foreach_copy_(averages, kept)

    @staticmethod
    def _local(tensors: list[Tensor]) -> list[Tensor]:
        return [local(t.detach()) for t in tensors]
