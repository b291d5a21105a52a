"""What differs when several processes train one model. In one process: nothing."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """auto: a GPU if there is one. Raises ValueError for what there is not."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no CUDA GPU; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


class Group:
    """The processes that train together; this one is number `rank` of `size`."""

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        return self.rank == 0
