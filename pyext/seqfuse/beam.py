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

from seqfuse import ops
from seqfuse.generate import Report, capacity, evaluating, padding, stepper
from seqfuse.sampling import Options, Rules


def beam_search(
    model,
    ids: Tensor,
    lengths: Tensor | None,
    options: Options,
    stops: Tensor,
    report: Report | None = None,
    cuda_graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """The best sequence of new tokens of each row.

    model: anything with begin, step and reorder (see generate.py). ids: [B, T] int64, lengths: [B] int64 or None.
    stops: [S] int64, tokens that end a sequence. cuda_graph: see generate.
    Returns (tokens [B, N] int64, padded behind the token that ended each; scores [B] float32).
    """
    report = report or Report()
    with evaluating(model):
        start = time.perf_counter()
        logits, cache = model.begin(ids, lengths, capacity(model, ids, options))  # (B, V)
        step = stepper(model, cache, cuda_graph)
        clock = time.perf_counter()
        report.prompt_seconds = clock - start
        rules = Rules(options, None if model.config.encoder_decoder else ids, lengths, len(ids), ids.device)
        beams = Beams(len(ids), options, stops)
        while True:
            scores = rules.apply(logits.log_softmax(-1)) if rules.active else logits
            parents, tokens = beams.advance(scores, normalised=not rules.active)
            if beams.over():
                break
            rules.reorder(parents)
            cache.reorder(parents, grouped=True)
            rules.push(tokens)
            logits = step(tokens)  # (B * K, V)
            report.steps += 1
        report.step_seconds = time.perf_counter() - clock
    rows = beams.best()
    report.tokens = sum(map(len, rows))
    rows = [torch.tensor(row, dtype=torch.int64, device=ids.device) for row in rows]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding(model))
    return tokens, beams.best_scores


class Beams:
    """K beginnings of each of B rows, and the best sequence of each row that has ended. No state of a model in here.

    Beginnings are kept as what each step's continue and say, and spelled out only at the end. All of it stays on the
    device; `over` is what the host waits for.
    """

    def __init__(self, batch: int, options: Options, stops: Tensor):
        self.K, self.most, self.power = options.num_beams, options.max_new_tokens, options.length_penalty
        self.stops, device = stops, stops.device
        self.scores = torch.zeros(batch, 1, device=device)  # (B, K): at first there is one empty beginning a row
        self.best_scores = torch.full((batch,), -torch.inf, device=device)  # of the sequences that have ended
        self.best_at = torch.zeros(batch, 3, dtype=torch.int64, device=device)  # (step, parent, token) of their ends
        self.parents: list[Tensor] = []  # of each step, [B * K]
        self.tokens: list[Tensor] = []

    def advance(self, logits: Tensor, normalised: bool) -> tuple[Tensor, Tensor]:
        """logits: [B * K, V] float32, of each beginning's next token; normalised=False: they are log-probabilities.

        Returns (which row of logits each new beginning continues, [B * K] int64; its last token, [B * K] int64).
        """
        step = len(self.tokens) + 1
        # log-probabilities only fall: the best that a beginning can come to is its own, at the length that flatters it
        length = self.most if self.power > 0 else step + 1
        self.scores, parents, tokens, self.best_scores, self.best_at, self._over = ops.beam_step(
            logits,
            self.scores,
            self.stops,
            self.best_scores,
            self.best_at,
            beams=self.K,
            step=step,
            last=step == self.most,
            divisor=step**self.power,
            flattering=length**self.power,
            normalised=normalised,
        )
        self.parents.append(parents)
        self.tokens.append(tokens)
        return parents, tokens

    def over(self) -> bool:
        """Whether no beginning can still win."""
        return len(self.tokens) == self.most or bool(self._over)

    def best(self) -> list[list[int]]:
        """The tokens of each row's best sequence; none where none has ended."""
        parents, tokens = torch.stack(self.parents).tolist(), torch.stack(self.tokens).tolist()
        rows = []
        for (step, parent, token), score in zip(self.best_at.tolist(), self.best_scores.tolist(), strict=True):
            row = [] if score == -math.inf else [token]
            for before in range(step - 2, -1, -1):
                row.append(tokens[before][parent])
                parent = parents[before][parent]
            rows.append(row[::-1])
        return rows
