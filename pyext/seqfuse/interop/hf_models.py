"""Hugging Face checkpoints: which family a folder is of, reading it, and writing one. transformers is not needed."""

from pathlib import Path

import torch

from seqfuse.interop import bert, gpt2, llama, marian
from seqfuse.interop.hf_table import to_ours, to_theirs
from seqfuse.models import files
from seqfuse.models.base import Model, empty_model
from seqfuse.models.files import CheckpointError

FAMILIES = {
    "bert": bert.FAMILY,
    "gpt2": gpt2.FAMILY,
    "llama": llama.FAMILY,
    "marian": marian.MARIAN,
    "bart": marian.BART,
}


def load(folder: Path, values: dict, dtype: torch.dtype | None = None) -> Model:
    """The model of a folder whose config.json holds `values`."""
    path = folder / "config.json"
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f'{path}: neither "model" of seqfuse nor a "model_type" that it knows '
            f"({', '.join(FAMILIES)}), got model_type {kind!r}"
        )
    generation = folder / "generation_config.json"
    if generation.is_file() and (ends := files.read_json(generation).get("eos_token_id")) is not None:
        values = values | {"eos_token_id": ends}  # what transformers' generate stops at
    family, (tensors, file) = FAMILIES[kind], files.read_tensors(folder)
    with files.named(path):
        try:
            config = family.read_config(values, set(tensors))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"is no config of a {kind} model: {error}") from error
    model = empty_model(config, path)
    files.fill(model, to_ours(family, config, tensors, files.tensors_of(model), file), file, dtype)
    return model


def export_hf(model: Model, folder: str | Path) -> None:
    """Write a folder that transformers loads (AutoModel and its kin): config.json, model.safetensors, tokenizer.json.

    Raises ValueError where no family has a counterpart of the model's settings, with the reason of each.
    """
    kind, family, values = _counterpart(model)
    tensors = files.tensors_of(model)
    values |= {"model_type": kind, "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch.")}
    folder = files.make_folder(folder)
    files.write_json(folder / "config.json", values)
    files.write_tensors(folder / "model.safetensors", to_theirs(family, model.config, tensors))
    if model.tokenizer is not None:
        model.tokenizer.save(folder / "tokenizer.json")
        files.write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def _counterpart(model):
    """(model_type, family, their config) of the first family that has such a model."""
    refusals = []
    for kind, family in FAMILIES.items():
        if not isinstance(model.config, family.configs):
            continue
        try:
            return kind, family, family.write_config(model.config)
        except ValueError as error:
            refusals.append(str(error))
    reasons = "; ".join(refusals) or "it is of a kind that they do not have"
    raise ValueError(f"export_hf: no Hugging Face family has such a {type(model).__name__}: {reasons}")
