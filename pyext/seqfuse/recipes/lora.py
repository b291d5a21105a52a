"""LoRA (Hu et al. 2021, arXiv:2106.09685) through PEFT: a product of two narrow matrices is trained beside each of a
body's projections, which stay as they are. What is kept is a plain model, the products added to the projections."""

from __future__ import annotations

from torch import Tensor

from seqfuse.data import DataError
from seqfuse.models.heads import Head

PROJECTIONS = r".*\.(qkv|q|kv|out|up|down)"  # of every transformer in models/
SCALE = 2  # alpha / rank
BASE, A, B = ".base_layer.", ".lora_A.default.", ".lora_B.default."


def attach(model: Head, rank: int) -> Head:
    """Adapters of this rank beside each projection of the body, whose weights are frozen; the head is trained as a
    whole. Raises DataError without PEFT."""
    try:
        import peft
    except ImportError as error:
        raise DataError(f"lora needs PEFT: pip install peft ({error})") from error
    adapters = peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=PROJECTIONS)
    peft.inject_adapter_in_model(adapters, model.body)
    return model


def merge(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors by name, with adapters -> those of the plain model."""
    merged = {}
    for name, tensor in tensors.items():
        if A in name or B in name:
            continue
        a, b = (tensors.get(name.replace(BASE, part)) for part in (A, B)) if BASE in name else (None, None)
        merged[name.replace(BASE, ".")] = tensor if a is None else tensor + SCALE * (b @ a).to(tensor.dtype)
    return merged
