"""What every family's test does: tiny random models of transformers, made offline, against ours."""

import torch

import seqfuse
from seqfuse import models

CLOSE = 1e-5  # of fp32 logits


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=CLOSE)


def randomised(model):
    """A fresh model's biases are zeros and its norms ones: tables would not be tested by them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def loaded(theirs, folder, **options):
    theirs.save_pretrained(folder, **options)
    return models.load(folder)


def returned(ours, auto, folder):
    """Ours, exported and loaded by transformers' class `auto`; nothing may be missing or left over."""
    seqfuse.interop.export_hf(ours, folder)
    theirs, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return theirs.eval()


def greedy(model, ids, new, lengths=None):
    """The protocol of generation by hand: ids of the `new` likeliest tokens, [B, new]."""
    logits, cache = model.begin(ids, lengths, capacity=ids.shape[1] + new)
    chosen = [logits.argmax(-1)]
    for _ in range(new - 1):
        chosen.append(model.step(chosen[-1], cache).argmax(-1))
    return torch.stack(chosen, dim=1)
