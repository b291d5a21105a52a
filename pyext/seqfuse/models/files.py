"""A model's folder on disk. What is wrong with one raises CheckpointError: a sentence that names file and tensor."""

import contextlib
import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from seqfuse.files import save_atomically

INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A file of a model that is missing, damaged, or does not fit the others."""


@contextlib.contextmanager
def named(path: Path):
    """Whatever ValueError is raised inside says which file it is about."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def make_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file, not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_json(path: Path) -> dict:
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, keys and values are wanted")
    return values


def write_json(path: Path, values: dict) -> None:
    text = json.dumps(values, indent=2) + "\n"
    save_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name; what is shared comes once, under its first name."""
    kept = model.state_dict(keep_vars=True)
    return {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers()) if name in kept}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    save_atomically(path, lambda part: save_file(tensors, str(part), metadata={"format": "pt"}))


def read_tensors(folder: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """All tensors of a folder by name, and the file to name in a complaint about them.

    model.safetensors, or the shards that its index lists, or else pytorch_model.bin, of which nothing but tensors is
    unpickled (weights_only).
    """
    if (folder / "model.safetensors").is_file():
        return read_safetensors(path := folder / "model.safetensors"), path
    if (folder / INDEX).is_file():
        return _read_shards(path := folder / INDEX), path
    if (folder / "pytorch_model.bin").is_file():
        return _read_pickle(path := folder / "pytorch_model.bin"), path
    raise CheckpointError(f"{folder / 'model.safetensors'}: there is no such file, no {INDEX}, no pytorch_model.bin")


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: is damaged or no safetensors file: {error}") from error


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
        raise CheckpointError(f"{index}: has no weight_map of tensors to files")
    tensors = {}
    for shard in sorted(set(where.values())):
        path = index.parent / shard
        if Path(shard).name != shard or not path.is_file():  # a shard lies beside its index, nowhere else
            raise CheckpointError(f"{index}: lists the shard {shard!r}, which is not in this folder")
        tensors |= read_safetensors(path)
    for name in where:
        if name not in tensors:
            raise CheckpointError(
                f"{index.parent / where[name]}: the tensor {name!r}, which the index lists, is missing"
            )
    return tensors


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: is damaged or holds more than tensors: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path}: holds something else than tensors by name")
    return tensors


def fill(
    model: torch.nn.Module, tensors: dict[str, torch.Tensor], path: Path, dtype: torch.dtype | None = None
) -> None:
    """Give an empty model (base.empty_model) its tensors: each one that it has, of its shape, and no others.

    dtype: of all weights; None: that of the file's first.
    """
    wanted = tensors_of(model)
    for name in wanted:
        if name not in tensors:
            raise CheckpointError(f"{path}: the tensor {name!r} is missing")
    for name, tensor in tensors.items():
        if name not in wanted:
            raise CheckpointError(
                f"{path}: the tensor {name!r} is no part of a {type(model).__name__} like its config's"
            )
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{path}: the tensor {name!r} has shape {list(tensor.shape)}, the config asks for "
                f"{list(wanted[name].shape)}"
            )
        if tensor.is_floating_point() != wanted[name].is_floating_point():
            raise CheckpointError(
                f"{path}: the tensor {name!r} is {tensor.dtype}, which does not fit {wanted[name].dtype}"
            )
    floating = [t for t in tensors.values() if t.is_floating_point()]
    dtype = dtype or (floating[0].dtype if floating else None)
    filled = {n: t.to(dtype).contiguous() if t.is_floating_point() else t for n, t in tensors.items()}
    _assign(model, {name: _aligned(tensor) for name, tensor in filled.items()})
    for module in model.modules():
        if hasattr(module, "make_tables"):  # what is computed, now that sizes are known to be those of the file
            module.make_tables()


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """In memory that torch allocated: a file's tensors lie at any address, where MKL (seen on Zen 3) sums in another
    order, so that a loaded model would differ from the saved one in the last bit."""
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


def _assign(model, tensors):
    """Replace the empty parameters and buffers; a module's parameter that stands in two places is replaced in both."""
    new = {}
    for name, old in (*model.named_parameters(), *model.named_buffers()):
        if name in tensors:
            is_parameter = isinstance(old, torch.nn.Parameter)
            new[id(old)] = torch.nn.Parameter(tensors[name], old.requires_grad) if is_parameter else tensors[name]
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, old in kind.items():
                if id(old) in new:
                    kind[name] = new[id(old)]
