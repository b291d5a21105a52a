"""Learning rates over the steps of a run: a linear warm-up, then one of several ways down.

cosine      half a cosine to zero at the last step (Loshchilov and Hutter 2017, arXiv:1608.03983)
wsd         warm-up, stable, decay: constant, then linear to zero over the last fifth (Hu et al. 2024,
            arXiv:2404.06395)
linear      a straight line to zero at the last step
slanted     both lines straight, between 1/32 and 1 of the rate (Howard and Ruder 2018, arXiv:1801.06146)
constant    no way down
"""

import math
from typing import Literal

Schedule = Literal["cosine", "wsd", "linear", "slanted", "constant"]
LOWEST = 1 / 32  # where a slanted schedule begins and ends
WSD_DECAY = 0.2  # share of the steps after warm-up


def factor(schedule: Schedule, step: int, warmup: int, steps: int) -> float:
    """What the learning rate is multiplied by in step `step`, counted from 0, of `steps` with `warmup` among them."""
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    if schedule == "slanted":
        return LOWEST + (1 - LOWEST) * (step / warmup if step < warmup else 1 - done)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "wsd":
        return min(1.0, (1 - done) / WSD_DECAY)
    return 1 - done if schedule == "linear" else 1.0
