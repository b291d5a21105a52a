"""The correctness gate: a speed is printed only beside a result that keeps the error rule of seqfuse.testing."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from seqfuse.testing import assert_accurate, relative_error


class Verdict(NamedTuple):
    """error: the largest relative L2 error among the results, which is `where`. wrong: None, or what is wrong."""

    error: float
    where: str
    wrong: str | None


def judge(
    got: Sequence[torch.Tensor],
    truth: Sequence[torch.Tensor],
    pytorch: Sequence[torch.Tensor] | None,
    names: Sequence[str],
    worst: dict[str, tuple[int, ...]],
) -> Verdict:
    """Compare results with the float64 truth, tensor by tensor, and with what PyTorch gets at the same dtype.

    worst: {name: dimensions whose worst slice counts}. pytorch: None judges the baseline itself, by its size only: it
    is the yardstick, but NaN or a different function is still refused.
    """
    error, where, wrong = 0.0, "", None
    if len(got) != len(names):
        return Verdict(float("inf"), "", f"{len(got)} results instead of {len(names)} ({', '.join(names)})")
    for i, name in enumerate(names):
        try:
            here = relative_error(got[i], truth[i]).item()
            if pytorch is not None:
                assert_accurate(got[i], truth[i], pytorch[i], dims=worst.get(name, ()), what=name)
            elif not here < 0.3:
                raise AssertionError(f"{name}: error {here:.3g} is no rounding error")
        except AssertionError as failure:
            wrong = wrong or str(failure)
            here = float("inf") if got[i].shape != truth[i].shape else here
        if here >= error:
            error, where = here, name
    return Verdict(error, where, wrong)
