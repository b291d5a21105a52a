"""The numerics policy in code: one error rule for every op, every backend and every dtype.

A result passes if its relative L2 error against the float64 truth is at most twice the error that PyTorch makes at the
same dtype, plus a floor of a few units in the last place of that dtype. The rule holds for the whole tensor and for its
worst slice along each dimension asked for (a row, a time step, a head), so that one bad row cannot hide in a large
tensor. There is no tolerance per test.
"""

from collections.abc import Sequence

import torch

# relative L2 floors: what correctly rounded storage and a different order of additions may cost
FLOOR = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def relative_error(got: torch.Tensor, truth: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Relative L2 error of `got` against `truth` (float64), over everything or for each index of `dim`.

    A slice whose truth is (nearly) zero is measured against the root mean square of the whole truth instead: a relative
    error against zero says nothing. Where `got` is not finite but the truth is, the error is infinite.
    """
    truth = truth.detach().double().cpu()
    got = got.detach().double().cpu()
    if got.shape != truth.shape:
        raise AssertionError(f"shape {tuple(got.shape)} differs from the truth's {tuple(truth.shape)}")
    both_nan = got.isnan() & truth.isnan()
    same = both_nan | (got == truth)
    diff = torch.where(same, 0.0, got - truth).nan_to_num(nan=float("inf"))
    truth = torch.where(both_nan | truth.isinf(), 0.0, truth)
    if truth.numel() == 0:
        return torch.zeros(())
    rms = truth.square().mean().sqrt()
    if dim is None:
        error, size, count = diff.norm(), truth.norm(), truth.numel()
    else:
        moved = diff.movedim(dim, 0).flatten(1), truth.movedim(dim, 0).flatten(1)
        error, size, count = moved[0].norm(dim=1), moved[1].norm(dim=1), moved[1].shape[1]
    size = size.clamp_min(float(rms) * count**0.5 * (1.0 if dim is None else 0.1))
    return torch.where(error == 0, 0.0, error / size)


def assert_accurate(
    got: torch.Tensor,
    truth: torch.Tensor,
    pytorch: torch.Tensor | None = None,
    *,
    dims: Sequence[int] = (),
    what: str = "result",
    dtype: torch.dtype | None = None,
) -> None:
    """Raise AssertionError unless `got` keeps the error rule.

    got: what a kernel computed. truth: the reference in float64. pytorch: what PyTorch computes at the kernel's dtype
    (None: only the floor counts). dims: dimensions whose worst slice must keep the rule too. dtype: the dtype that
    chooses the floor, where it is not got's (an fp32 statistic of a bf16 input).
    """
    floor = FLOOR[dtype or got.dtype]
    for dim in (None, *dims):
        if got.dim() == 0 and dim is not None:
            continue
        error = relative_error(got, truth, dim).max().item()
        theirs = 0.0 if pytorch is None else relative_error(pytorch, truth, dim).max().item()
        limit = 2 * theirs + floor
        if not error <= limit:
            where = "over the whole tensor" if dim is None else f"in its worst slice along dimension {dim}"
            raise AssertionError(
                f"{what}: error {error:.3g} {where} is above {limit:.3g} "
                f"(twice PyTorch's {theirs:.3g} plus {floor:.0e})"
            )
