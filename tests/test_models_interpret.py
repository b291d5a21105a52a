"""Whole models on the Triton kernels, interpreted."""

import pytest
import torch
from hf_checks import close

import seqfuse
from seqfuse.models import Decoder, Encoder, Transformer

pytestmark = pytest.mark.interpret

IDS = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([3, 5])
CONFIG = {"vocab": 20, "width": 16, "layers": 1, "heads": 2, "max_positions": 8}
LLAMA = {"kv_heads": 1, "norm": "rms", "activation": "swiglu", "positions": "rope", "tied": False}


def decoded(model):
    logits, cache = model.begin(IDS, LENGTHS, 8)
    return [logits, model.step(IDS[:, 0], cache)]


CALLS = {
    "gpt2": (lambda: Decoder.from_config(CONFIG), lambda m: [m(IDS), *decoded(m)]),
    "llama": (lambda: Decoder.from_config(CONFIG | LLAMA), lambda m: [m(IDS), *decoded(m)]),
    "bert": (lambda: Encoder.from_config(CONFIG), lambda m: [m(IDS, LENGTHS)[0, :3], m(IDS, LENGTHS)[1]]),
    "transformer": (
        lambda: Transformer.from_config(CONFIG | {"bos_id": 1}),
        lambda m: [m(IDS, IDS, LENGTHS), *decoded(m)],
    ),
}


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_triton_equals_the_reference(name):
    make, call = CALLS[name]
    model = make().eval()
    results = []
    for backend in ("reference", "triton"):
        with seqfuse.backend(backend):
            results.append(call(model))
    for got, wanted in zip(*results, strict=True):
        close(got, wanted)
