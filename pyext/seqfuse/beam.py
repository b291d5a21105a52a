"""Beam search: keep the `num_beams` likeliest beginnings of each row, and the best sequence that has ended.

    score = log-probability of the new tokens / (their number) ** length_penalty

(Wu et al. 2016, arXiv:1609.08144, section 7, in its usual simple form.) The search ends when no beginning that is kept
can still beat the best that has ended, however it goes on. So a wide enough beam finds what trying every sequence would
find, which a test does.
"""

from __future__ import annotations

import math
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
        beams = Beams(len(ids), options, stops, padding(model))
        scores = rules.apply(logits.log_softmax(-1))  # (B, V)
        while True:
            parents, tokens = beams.advance(scores)
            if beams.over():
                break
            rules.reorder(parents)
            cache.reorder(parents)
            rules.push(tokens)
            scores = rules.apply(model.step(tokens, cache).log_softmax(-1))  # (B * K, V)
            report.steps += 1
        report.step_seconds = time.perf_counter() - clock
    rows, best_scores = beams.best()
    report.tokens = sum(map(len, rows))
    rows = [torch.tensor(row, dtype=torch.int64, device=ids.device) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding(model)), best_scores


class Beams:
    """K beginnings of each of B rows, and the best sequence of each row that has ended. No state of a model in here.

    The choice among the candidates is a matter of a few numbers a row: plain Python makes it sooner than twenty calls
    of torch. Beginnings are kept as links to what they continue, and spelled out only for what has ended.
    """

    def __init__(self, batch: int, options: Options, stops: Tensor, pad: int):
        self.K, self.most, self.power = options.num_beams, options.max_new_tokens, options.length_penalty
        self.stops, self.pad, self.device = set(stops.tolist()), pad, stops.device
        self.candidates = self.K * (1 + len(self.stops))  # of these at least K go on
        self.scores = torch.zeros(batch, 1, device=self.device)  # (B, K): at first there is one empty beginning a row
        self.links: list[list[tuple | None]] = [[None] for _ in range(batch)]  # of each: (what it continues, its token)
        self.best_scores = [-math.inf] * batch  # of the sequences that have ended
        self.best_links: list[tuple | None] = [None] * batch
        self.steps = 0

    def advance(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """log_probs: [B * K, V] float32, of each beginning's next token.

        Returns (which row of log_probs each new beginning continues, [B * K'] int64; its last token, [B * K'] int64).
        """
        B, kept, V = len(self.links), self.scores.shape[1], log_probs.shape[-1]
        total = (self.scores[:, :, None] + log_probs.view(B, kept, V)).flatten(1)  # (B, kept * V)
        scores, choice = total.topk(min(self.candidates, kept * V), dim=1)  # best first
        self.steps += 1
        going = [
            self._sort(b, kept, V, found) for b, found in enumerate(zip(scores.tolist(), choice.tolist(), strict=True))
        ]
        width = max(map(len, going))
        for row in going:  # where stops left fewer, beginnings that never win keep the shape
            row += [(-math.inf, *row[0][1:]) if row else (-math.inf, 0, self.pad, None)] * (width - len(row))
        self.links = [[link for *_, link in row] for row in going]
        self.scores = torch.tensor([[row[0] for row in rows] for rows in going], device=self.device)
        moves = [(b * kept + parent, token) for b, row in enumerate(going) for _, parent, token, _ in row]
        parents, tokens = torch.tensor(moves, device=self.device).t().contiguous()
        return parents, tokens

    def _sort(self, b: int, kept: int, V: int, found: tuple[list[float], list[int]]) -> list[tuple]:
        """The candidates of row b that go on, as (score, parent, token, link), best first; notes what ends."""
        going, last = [], self.steps == self.most
        for rank, (score, choice) in enumerate(zip(*found, strict=True)):
            parent, token = divmod(choice, V)
            stops = token in self.stops
            if (stops or last) and rank < self.K:  # not the worse ones: a beam of one is greedy search
                final = score / self.steps**self.power
                if final > self.best_scores[b]:
                    self.best_scores[b], self.best_links[b] = final, (self.links[b][parent], token)
            if not stops and len(going) < self.K:
                going.append((score, parent, token, (self.links[b][parent], token)))
        return going

    def over(self) -> bool:
        """Whether no beginning can still win: log-probabilities only fall, so the best that it can come to is its own,
        at the length that flatters it most."""
        if self.steps == self.most:
            return True
        flattering = (self.most if self.power > 0 else self.steps + 1) ** self.power
        best = self.scores[:, 0].tolist()
        return all(s / flattering <= ended for s, ended in zip(best, self.best_scores, strict=True))

    def best(self) -> tuple[list[list[int]], Tensor]:
        """(tokens of each row, scores [B])."""
        rows = []
        for link in self.best_links:
            tokens = []
            while link is not None:
                link, token = link
                tokens.append(token)
            rows.append(tokens[::-1])
        return rows, torch.tensor(self.best_scores, device=self.device)
