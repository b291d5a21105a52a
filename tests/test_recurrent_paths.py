"""explain() says which path a recurrent call takes, and why not the others."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.profiler import ProfilerActivity, profile

import seqfuse


def row(module, *inputs, **more):
    return seqfuse.explain(module, *inputs, **more)[0]


def refusals(module, *inputs, **more):
    return dict(row(module, *inputs, **more).refused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTM with proj_size", "packed LSTM"])
def test_name_of_torchs_library_is_what_the_profiler_sees(kind, dtype):
    more = dict(proj_size=3) if "proj" in kind else {}
    module = getattr(nn, kind.split()[0] if " " not in kind or "proj" in kind else "LSTM")(4, 6, **more).to(dtype)
    x = torch.randn(30, 8, 4, dtype=dtype)
    x = pack_padded_sequence(x, [30, 20, 20, 20, 9, 9, 3, 1]) if kind.startswith("packed") else x
    with profile(activities=[ProfilerActivity.CPU]) as seen, torch.no_grad():
        module(x)
    onednn = any("mkldnn_rnn" in e.key for e in seen.key_averages())
    with seqfuse.backend("torch"):
        reason = row(seqfuse.fuse(module), x).reason
    assert reason.startswith("oneDNN: " if onednn else "ATen: "), reason


def test_each_path_has_its_name():
    module, x = seqfuse.nn.GRU(4, 6), torch.randn(30, 8, 4)
    for backend, text in (("cpu", "fused CPU scan: asked for by name"), ("reference", "a Python loop over the steps")):
        with seqfuse.backend(backend):
            assert row(module, x).reason.startswith(text)
    assert row(module, x, lengths=[30] * 8).reason.startswith("fused CPU scan over the rows that exist")
    assert row(module, x[:4]).reason.startswith("ATen: inference over fewer than 8 steps")


def test_each_refusal_is_one_sentence():
    x = torch.randn(30, 8, 4)
    why = refusals(seqfuse.nn.LSTM(4, 6, layer_norm=True), x)
    assert why["cpu"] == (
        "layer normalisation inside the step needs a sum over all hidden units, which the fused scan does not exchange "
        "between its workers"
    )
    assert why["torch"] == "PyTorch's own op has no layer_norm"
    why = refusals(seqfuse.nn.LSTM(4, 6, proj_size=3, zoneout=0.1), x)
    assert why["cpu"].startswith("the fused scan runs over the state before its projection")
    for module in (seqfuse.nn.LSTM(4, 6, layer_norm=True), seqfuse.nn.LSTM(4, 6, proj_size=3, zoneout=0.1)):
        with seqfuse.backend("cpu"), pytest.raises(RuntimeError, match="backend 'cpu' can't run lstm here: "):
            module(x)
    with seqfuse.backend("torch"), pytest.raises(RuntimeError, match="PyTorch's own op has no lengths"):
        seqfuse.nn.GRU(4, 6)(x, lengths=[30] * 8)


def test_options_that_are_off_take_the_plain_path():
    """Dropouts do nothing in evaluation, so PyTorch's op may run then."""
    module = seqfuse.nn.LSTM(4, 6, weight_drop=0.5, variational_dropout=0.5).eval()
    assert row(module, torch.randn(30, 8, 4)).backend == "torch"
    module.train()
    assert row(module, torch.randn(30, 8, 4)).backend == "cpu"


def test_a_module_that_was_not_called_says_what_would_be_chosen():
    module = seqfuse.nn.LSTM(4, 6, peephole=True)
    assert "fused CPU scan" in seqfuse.explain(module)[0].reason
    assert "not called yet" in str(seqfuse.explain(module))
