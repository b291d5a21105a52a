"""Argument checks: one clear sentence that names the argument, what was given and what is accepted."""

import math
import numbers

import torch


def describe(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def tensor(op: str, name: str, value, dims: tuple[int, ...] | None = None) -> None:
    """A floating-point tensor, with one of these numbers of dimensions."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {describe(value)}")
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {describe(value)}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {value.layout}")
    if dims is not None and value.dim() not in dims:
        wanted = " or ".join(f"{d}-D" for d in dims)
        raise ValueError(f"{op}: {name} must be {wanted}, got {describe(value)}")


def number(op: str, name: str, value, least: float = -math.inf, most: float = math.inf) -> None:
    """A finite number, least <= number <= most. What torch.compile traces as a symbol is one."""
    real = isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)) and not isinstance(value, bool)
    if not real and not (isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_complex()):
        raise TypeError(f"{op}: {name} must be a number, got {describe(value)}")
    if not (least <= value <= most and -math.inf < value < math.inf):
        accepted = "finite" if least == -math.inf else f"at least {least:g}"
        accepted = accepted if most == math.inf else f"between {least:g} and {most:g}"
        raise ValueError(f"{op}: {name} must be {accepted}, got {value!r}")


def rows(value: torch.Tensor) -> torch.Tensor:
    """[..., N] -> [rows, N]; reshape(-1, N) cannot tell how many where N is 0."""
    return value.reshape(math.prod(value.shape[:-1]), value.shape[-1])


def shape(op: str, name: str, value: torch.Tensor, wanted: tuple) -> None:
    if tuple(value.shape) != tuple(wanted):
        raise ValueError(f"{op}: {name} must have shape {list(wanted)}, got {describe(value)}")


def same_device(op: str, name: str, value: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{op}: {name} is on {value.device}, but {like_name} is on {like.device}: move one of them")


def same_dtype(op: str, name: str, value: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    if value.dtype != like.dtype:
        raise ValueError(
            f"{op}: {name} is {str(value.dtype).removeprefix('torch.')}, but {like_name} is "
            f"{str(like.dtype).removeprefix('torch.')}: convert one of them"
        )
