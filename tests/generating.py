"""A model that generates and is nothing but a table: what generate and beam search are tested on."""

import itertools
from types import SimpleNamespace

import torch

STATES = 997


class HashState:
    """What the table model remembers: one number for everything that a row has said."""

    def __init__(self, state):
        self.state = state

    def reorder(self, index, grouped=False):
        self.state = self.state[index]


class TableModel(torch.nn.Module):
    """Logits that depend on the whole history of a row, through a hash of it."""

    def __init__(self, vocab=7, eos_id=2, encoder_decoder=False, seed=0, spread=2.0):
        super().__init__()
        rows = torch.randn(STATES, vocab, generator=torch.Generator().manual_seed(seed)) * spread
        self.table = torch.nn.Parameter(rows)
        tokens = dict(vocab=vocab, bos_id=1, eos_id=eos_id, eos_ids=(eos_id,), pad_id=0)
        self.config = SimpleNamespace(**tokens, encoder_decoder=encoder_decoder)
        self.tokenizer, self.steps = None, 0

    def begin(self, ids, lengths, capacity):
        assert not self.training and not torch.is_grad_enabled()
        lengths = torch.full((len(ids),), ids.shape[1]) if lengths is None else lengths
        state = torch.zeros(len(ids), dtype=torch.int64)
        for t in range(ids.shape[1]):
            state = torch.where(t < lengths, self.after(state, ids[:, t]), state)
        if self.config.encoder_decoder:
            state = self.after(state, self.config.bos_id)
        self.room = capacity - (1 if self.config.encoder_decoder else ids.shape[1])
        return self.table[state].detach(), HashState(state)

    def step(self, ids, cache):
        assert not self.training and not torch.is_grad_enabled()
        self.steps += 1
        self.room -= 1
        assert self.room > 0, "more steps than the cache was asked to have room for"
        cache.state = self.after(cache.state, ids)
        return self.table[cache.state].detach()

    @staticmethod
    def after(state, token):
        return (state * 31 + token + 7) % STATES

    def weight_bytes(self):
        return self.table.nbytes


def every_sequence(vocab, eos_id, most):
    """All that a search could return: sequences that end in eos_id, or have `most` tokens without it."""
    for n in range(1, most + 1):
        for tokens in itertools.product(range(vocab), repeat=n):
            if eos_id not in tokens[:-1] and (tokens[-1] == eos_id or n == most):
                yield tokens


@torch.no_grad()
def log_probability(model, prompt, tokens):
    """Of tokens behind one prompt, token by token through begin and step."""
    logits, cache = model.eval().begin(torch.tensor([prompt]), None, len(prompt) + 1 + len(tokens))
    total = 0.0
    for i, token in enumerate(tokens):
        total += float(logits.log_softmax(-1)[0, token])
        if i + 1 < len(tokens):
            logits = model.step(torch.tensor([token]), cache)
    return total
