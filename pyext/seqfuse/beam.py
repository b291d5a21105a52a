"""Beam search: keep the `num_beams` likeliest beginnings of each row, and the best sequence that has ended.

    score = log-probability of the new tokens / (their number) ** length_penalty

(Wu et al. 2016, arXiv:1609.08144, section 7, in its usual simple form.) The search ends when no beginning that is kept
can still beat the best that has ended, however it goes on. So a wide enough beam finds what trying every sequence would
find, which a test does.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from seqfuse.generate import Report, capacity, evaluating, padding
from seqfuse.sampling import Options, Rules


def beam_search(
    model, ids: Tensor, lengths: Tensor | None, options: Options, stops: Tensor, report: Report | None = None
) -> tuple[Tensor, Tensor]:
    """The best sequence of new tokens of each row.

    model: anything with begin, step and reorder (see generate.py). ids: [B, T] int64, lengths: [B] int64 or None.
    stops: [S] int64, tokens that end a sequence.
    Returns (tokens [B, N] int64, padded behind the token that ended each; scores [B] float32).
    """
    report = report or Report()
    with evaluating(model):
        start = time.perf_counter()
        logits, cache = model.begin(ids, lengths, capacity(model, ids, options))  # (B, V)
        clock = time.perf_counter()
        report.prompt_seconds = clock - start
        rules = Rules(options, None if model.config.encoder_decoder else ids, lengths, len(ids), ids.device)
        beams = Beams(logits, options, stops, padding(model))
        scores = rules.apply(logits.log_softmax(-1))  # (B, V)
        while True:
            parents = beams.advance(scores)
            if beams.over():
                break
            if rules.active:
                rules.reorder(parents)
            cache.reorder(parents)
            tokens = beams.newest()
            rules.push(tokens)
            scores = rules.apply(model.step(tokens, cache).log_softmax(-1))  # (B * K, V)
            report.steps += 1
        report.step_seconds = time.perf_counter() - clock
        report.tokens = int(beams.lengths().sum())
        return beams.best()


class Beams:
    """K beginnings of each of B rows, and the best sequence of each row that has ended. No state of a model in here."""

    def __init__(self, logits: Tensor, options: Options, stops: Tensor, pad: int):
        B, V = logits.shape
        self.K, self.most, self.power = options.num_beams, options.max_new_tokens, options.length_penalty
        self.stops, self.pad, device = stops, pad, logits.device
        self.candidates = self.K * (1 + len(stops))  # of these at least K go on
        self.scores = torch.zeros(B, 1, device=device)  # (B, K): at first there is one empty beginning a row
        self.tokens = torch.empty(B, 1, 0, dtype=torch.int64, device=device)  # (B, K, n)
        self.first_row = torch.arange(B, device=device)[:, None]
        self.ended = torch.full((B, self.most), pad, device=device)  # the best sequence that has ended
        self.ended_score = torch.full((B,), -torch.inf, device=device)

    def advance(self, log_probs: Tensor) -> Tensor:
        """log_probs: [B * K, V] float32, of each beginning's next token. Returns the rows [B * K] that go on: which
        beginning each new one continues, as rows of log_probs."""
        B, kept, n = self.tokens.shape
        V = log_probs.shape[-1]
        total = (self.scores[:, :, None] + log_probs.view(B, kept, V)).flatten(1)  # (B, kept * V)
        scores, choice = total.topk(min(self.candidates, kept * V), dim=1)  # best first
        parent, token = choice // V, choice % V
        sequences = torch.cat([self.tokens.gather(1, parent[:, :, None].expand(-1, -1, n)), token[:, :, None]], dim=2)
        ends = torch.isin(token, self.stops)
        # only what is among the K best may end: a beam of one is greedy search
        self._end(sequences, scores, ends | (n + 1 == self.most))
        scores, order = scores.masked_fill(ends, -torch.inf).topk(min(self.K, scores.shape[1]), dim=1)
        self.scores = scores
        self.tokens = sequences.gather(1, order[:, :, None].expand(-1, -1, n + 1))
        return (self.first_row * kept + parent.gather(1, order)).flatten()

    def _end(self, sequences: Tensor, scores: Tensor, ends: Tensor) -> None:
        """Keep the best of `sequences` [B, C, n] that end, where it beats the one that is kept."""
        ends[:, self.K :] = False
        score, which = scores.masked_fill(~ends, -torch.inf).max(dim=1)
        n = sequences.shape[2]
        score = score / n**self.power
        better = score > self.ended_score
        found = sequences[self.first_row[:, 0], which]  # (B, n)
        self.ended[:, :n] = torch.where(better[:, None], found, self.ended[:, :n])
        self.ended_score = torch.where(better, score, self.ended_score)

    def newest(self) -> Tensor:
        return self.tokens[:, :, -1].flatten()

    def over(self) -> bool:
        """Whether no beginning can still win: log-probabilities only fall, so the best that it can come to is its own,
        at the length that flatters it most."""
        n = self.tokens.shape[2]
        if n == self.most:
            return True
        flattering = self.most if self.power > 0 else n + 1
        return bool((self.scores[:, 0] / flattering**self.power <= self.ended_score).all())

    def best(self) -> tuple[Tensor, Tensor]:
        """(tokens [B, N] int64, scores [B])."""
        return self.ended[:, : int(self.lengths().max())], self.ended_score

    def lengths(self) -> Tensor:
        """[B]: up to and with the first token that stops, or all of max_new_tokens."""
        stops = torch.isin(self.ended, self.stops)
        first = stops.int().argmax(1)
        return torch.where(stops.any(1), first + 1, self.most)
