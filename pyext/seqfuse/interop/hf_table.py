"""Tables between our tensors and those of a Hugging Face checkpoint, read in both directions."""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch

from seqfuse.models.config import Config
from seqfuse.models.files import CheckpointError

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
THEIR_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}


class Row(NamedTuple):
    """One tensor of ours, and those of theirs that lie one below another in it. {i} is the number of a layer.

    sizes: rows of each of theirs, where there is more than one. transposed: stored (in, out), as Conv1D does.
    """

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    transposed: bool = False


class Family(NamedTuple):
    """What there is to know about the checkpoints of one model_type.

    configs: which of our configs may be of this family. read_config(values, names) -> our config, of theirs and the
    names of their tensors; write_config(config) -> theirs. Both raise ValueError, one sentence, for what the other
    side does not have. rows(config): the table. prefix: what a model with a head puts before its body's tensors.
    ignored: tensors that hold nothing learned. adapt(tensors, config), restore(tensors, config): what a table can't
    say, before reading and after writing.
    """

    configs: tuple[type[Config], ...]
    read_config: Callable[[dict, set[str]], Config]
    write_config: Callable[[Config], dict]
    rows: Callable[[Config], list[Row]]
    prefix: str
    ignored: str = "$^"
    adapt: Callable[[dict, Config], dict] = lambda tensors, config: tensors
    restore: Callable[[dict, Config], dict] = lambda tensors, config: tensors


def layers(count: int, *rows: Row) -> list[Row]:
    """The rows of every layer."""
    return [r._replace(ours=r.ours.format(i=i), theirs=tuple(t.format(i=i) for t in r.theirs))
            for i in range(count) for r in rows]  # fmt: skip


def pair(ours: str, theirs: str, **options) -> list[Row]:
    """A weight and its bias."""
    return [Row(f"{ours}.{kind}", (f"{theirs}.{kind}",), **options) for kind in ("weight", "bias")]


def joined(ours: str, theirs: tuple[str, ...], sizes: tuple[int, ...], bias: bool = True) -> list[Row]:
    """Several linear layers of theirs that are one of ours."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [Row(f"{ours}.{kind}", tuple(f"{t}.{kind}" for t in theirs), sizes) for kind in kinds]


def without_tied_head(tensors: dict, config: Config) -> dict:
    """adapt() of language models: some files hold the output projection although it is the embedding."""
    return {name: t for name, t in tensors.items() if not (config.tied and name == "lm_head.weight")}


def to_ours(family: Family, config: Config, theirs: dict, wanted: dict, path) -> dict[str, torch.Tensor]:
    """wanted: our empty tensors by name, which say the shapes. Raises CheckpointError where anything does not fit."""
    full = {name.removeprefix(family.prefix): name for name in theirs}  # as the file has it
    theirs = {short: theirs[name] for short, name in full.items() if not re.fullmatch(family.ignored, short)}
    theirs = family.adapt(theirs, config)
    ours = {}
    for row in family.rows(config):
        shape, parts = wanted[row.ours].shape, []
        for name, rows in zip(row.theirs, row.sizes or (shape[0],), strict=True):
            if name not in theirs:
                raise CheckpointError(f"{path}: the tensor {name!r} is missing")
            part, expected = theirs.pop(name), [rows, *shape[1:]]
            expected = expected[::-1] if row.transposed and len(expected) == 2 else expected
            if list(part.shape) != expected:
                shape_says = f"has shape {list(part.shape)}, the config asks for {expected}"
                raise CheckpointError(f"{path}: the tensor {full.get(name, name)!r} {shape_says}")
            parts.append(part.t() if row.transposed else part)
        ours[row.ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
    for name in theirs:
        raise CheckpointError(
            f"{path}: the tensor {full.get(name, name)!r} is no part of a {config.model} like its config's"
        )
    return ours


def to_theirs(family: Family, config: Config, ours: dict) -> dict[str, torch.Tensor]:
    theirs = {}
    for row in family.rows(config):
        tensor = ours[row.ours]
        for name, part in zip(row.theirs, tensor.split(row.sizes or (tensor.shape[0],)), strict=True):
            theirs[name] = part.t().contiguous() if row.transposed else part.contiguous()
    return family.restore(theirs, config)


def end_tokens(theirs) -> dict:
    """Our settings for their eos_token_id: a token, several of them, or None."""
    several = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
    return {"eos_id": several[0] if several else None, "more_eos_ids": tuple(several[1:])}


def their_end_tokens(config: Config) -> int | list[int] | None:
    return list(config.eos_ids) if config.more_eos_ids else config.eos_id


def activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"the activation {name!r} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def refuse(values: dict, **accepted) -> None:
    """Values that would change what is computed, and that our models do not have."""
    for key, value in accepted.items():
        if values.get(key, value) != value:
            raise ValueError(f"{key} {values[key]!r} is not supported, only {value!r}")


def require(config: Config, family: str, **wanted) -> None:
    """Settings that the family fixes."""
    for key, value in wanted.items():
        if getattr(config, key) != value:
            raise ValueError(f"{family} has no counterpart of {key}={getattr(config, key)!r}, only {value!r}")
