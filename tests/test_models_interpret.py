"""Whole models on the Triton kernels, interpreted: what the reference gives, forward and the gradients of the loss."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import seqfuse
from seqfuse import models
from seqfuse.testing import assert_accurate

pytestmark = pytest.mark.interpret

SIZES = dict(vocab=19, bos_id=1, width=16, layers=1, heads=2, mlp_width=24, max_positions=16)
IDS, TARGET = torch.randint(0, 19, (2, 7)), torch.randint(0, 19, (2, 5))
LLAMA = dict(kv_heads=1, activation="swiglu", norm="rms", positions="rope", attention_bias=False, mlp_bias=False)
MODELS = {
    "gpt2": (models.Decoder, dict(**SIZES, activation="gelu_tanh"), (IDS,)),
    "llama": (models.Decoder, dict(**SIZES, **LLAMA, tied=False), (IDS,)),
    "transformer": (models.Transformer, SIZES, (IDS, TARGET)),
    "lstm": (models.RNNLanguageModel, dict(vocab=19, embed=12, hidden=16, layers=1, cell="lstm"), (IDS,)),
    "gru-seq2seq": (
        models.RNNSeq2Seq,
        dict(vocab=19, source_vocab=19, bos_id=1, embed=12, hidden=16, cell="gru", attention="general"),
        (IDS, TARGET),
    ),
}


LENGTHS = torch.tensor([3, 7])


def outcome(model, inputs, backend, dtype):
    """Logits, loss and gradients."""
    model = model.to(dtype)
    model.zero_grad()
    with seqfuse.backend(backend):
        logits = model(*inputs)
        loss = model.loss(*inputs, inputs[-1])
        loss.backward()
    return [logits.detach(), loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_on_triton_is_the_reference(name):
    kind, config, inputs = MODELS[name]
    torch.manual_seed(0)
    model = kind.from_config(config).eval()
    got = outcome(model, inputs, "triton", torch.float32)
    theirs, truth = (
        outcome(model, inputs, "reference", torch.float32),
        outcome(model, inputs, "reference", torch.float64),
    )
    for a, b, c in zip(got, truth, theirs, strict=True):
        assert_accurate(a, b, c)


@pytest.mark.parametrize("name", ["gpt2", "llama", "transformer"])  # Triton has no cells, a recurrent decoder's steps
def test_generation_on_triton_is_the_reference(name):
    kind, config, inputs = MODELS[name]
    torch.manual_seed(0)
    model = kind.from_config(config).eval()
    found = []
    for backend in ("triton", "reference"):
        with seqfuse.backend(backend):
            found.append(seqfuse.generate(model, inputs[0], max_new_tokens=4, stop=()))
    assert torch.equal(*found)


def test_an_encoder_of_padded_rows():
    model = models.Encoder.from_config(SIZES).eval()
    found = []
    for backend in ("triton", "reference"):
        with torch.no_grad(), seqfuse.backend(backend):
            y = model(IDS, LENGTHS)
            found.append(torch.cat([y[0, :3], y[1]]))
    assert_accurate(found[0], found[1].double())
