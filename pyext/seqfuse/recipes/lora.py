"""LoRA (Hu et al. 2021, arXiv:2106.09685) through PEFT: a product of two narrow matrices is trained beside each of a
transformer's projections, which stay as they are. What a run leaves is a plain model, the products added to them."""

from __future__ import annotations

from torch import Tensor

from seqfuse.data import DataError
from seqfuse.models.base import Model
from seqfuse.models.blocks import Block
from seqfuse.models.heads import Head

PROJECTIONS = r".*\.(qkv|q|kv|out|up|down)"  # of every transformer in models/
SCALE = 2  # alpha / rank
BASE, A, B = ".base_layer.", ".lora_A.default.", ".lora_B.default."


def attach(model: Model, rank: int) -> Model:
    """Adapters of this rank beside each projection of a transformer, whose own weights are frozen; a head on it is
    trained as a whole. Raises DataError without PEFT, and for a model that is no transformer."""
    body = model.body if isinstance(model, Head) else model
    if not any(isinstance(module, Block) for module in body.modules()):
        raise DataError(f"lora: adapters are for transformers, and a {type(body).__name__} is none")
    try:
        import peft
    except ImportError as error:
        raise DataError(f"lora needs PEFT: pip install peft ({error})") from error
    adapters = peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=PROJECTIONS)
    peft.inject_adapter_in_model(adapters, body)
    return model


def load_plain(model: Model, tensors: dict[str, Tensor]) -> None:
    """Give a model, whether it has adapters or not, the weights of a plain one, by name; adapters stay as they are."""
    own = model.state_dict()
    adapters = {name: tensor for name, tensor in own.items() if A in name or B in name}
    names = {name.replace(BASE, "."): name for name in own}
    model.load_state_dict(adapters | {names.get(name, name): tensor for name, tensor in tensors.items()})


def merge(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors by name, with adapters or without -> those of the plain model."""
    merged = {}
    for name, tensor in tensors.items():
        if A in name or B in name:
            continue
        a, b = (tensors.get(name.replace(BASE, part)) for part in (A, B)) if BASE in name else (None, None)
        merged[name.replace(BASE, ".")] = tensor if a is None else tensor + SCALE * (b @ a).to(tensor.dtype)
    return merged
