"""What the next token may be: the options of seqfuse.generate, the rules that forbid or weaken tokens, and the choice.

The order is the field's usual one: forbidden tokens, repetition penalty, no-repeat-ngram, then temperature, top-k and
top-p.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """The keywords of seqfuse.generate that decide which tokens come out; see there."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    stop: int | str | list | tuple | None = None
    forbidden: list | tuple = ()
    seed: int | None = None

    @classmethod
    def of(cls, values: dict) -> Options:
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise TypeError(f"generate: unknown option {name!r}; known are {', '.join(known)}")
        return cls(**values)

    def __post_init__(self):
        _whole("max_new_tokens", self.max_new_tokens, 1)
        _whole("num_beams", self.num_beams, 1)
        _whole("no_repeat_ngram", self.no_repeat_ngram, 0)
        if self.top_k is not None:
            _whole("top_k", self.top_k, 1)
        if self.seed is not None:
            _whole("seed", self.seed, 0)
            if self.seed >= 2**63:
                raise ValueError(f"generate: seed must be below 2**63, got {self.seed}")
        if not isinstance(self.forbidden, list | tuple) or not all(type(token) is int for token in self.forbidden):
            raise TypeError(f"generate: forbidden must be a list of token ids, got {self.forbidden!r}")
        _number("temperature", self.temperature, "at least 1e-6, or 0 (greedy)", lambda v: v == 0 or v >= 1e-6)
        _number("repetition_penalty", self.repetition_penalty, "above 0 (1 does nothing)", lambda v: v > 0)
        _number("length_penalty", self.length_penalty, "between -10 and 10", lambda v: abs(v) <= 10)
        if self.top_p is not None:
            _number("top_p", self.top_p, "in (0, 1]", lambda v: 0 < v <= 1)
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(
                f"generate: num_beams={self.num_beams} searches for the likeliest text and draws nothing: "
                f"leave out temperature={self.temperature}"
            )
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("generate: top_k and top_p limit what is drawn, and temperature=0 draws nothing")


def _whole(name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"generate: {name} must be a whole number of at least {least}, got {value!r}")


def _number(name: str, value, accepted: str, good) -> None:
    finite = not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < float("inf")
    if not finite or not good(value):
        raise ValueError(f"generate: {name} must be a number {accepted}, got {value!r}")


class Rules:
    """What lowers scores: forbidden tokens, and by what a row has said so far repetition penalty and no-repeat-ngram.

    said: [B, L] int64, each row's tokens at its right end, -1 before them: so the last tokens of rows of any length
    stand in the same column, and one comparison serves the batch.
    """

    def __init__(self, options: Options, ids: Tensor | None, lengths: Tensor | None, batch: int, device):
        """ids: [B, T] int64 what counts as said already (a decoder's prompt), or None. lengths: [B] int64 or None."""
        self.penalty, self.ngram = options.repetition_penalty, options.no_repeat_ngram
        self.forbidden = torch.tensor(options.forbidden, device=device) if options.forbidden else None
        self.remembers = self.penalty != 1.0 or self.ngram > 0
        self.active = self.remembers or self.forbidden is not None
        if not self.remembers:
            return
        if ids is None:
            self.said = torch.empty(batch, 0, dtype=torch.int64, device=device)
        elif lengths is None:
            self.said = ids
        else:
            T = ids.shape[1]
            source = torch.arange(T, device=device) - (T - lengths.to(device))[:, None]  # (B, T)
            self.said = torch.where(source < 0, -1, ids.gather(1, source.clamp_min(0)))
        self.seen: Tensor | None = None  # [B, V] bool, made when V is known

    def apply(self, scores: Tensor) -> Tensor:
        """scores: [B, V] float32, logits or log-probabilities; a new tensor if a rule is in force."""
        if self.forbidden is not None:
            scores = scores.index_fill(1, self.forbidden, -torch.inf)
        if self.penalty != 1.0:
            # Keskar et al. 2019 (arXiv:1909.05858), section 4.1, with the sign taken care of
            weakened = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
            scores = torch.where(self._seen(scores.shape[1]), weakened, scores)
        if self.ngram and self.said.shape[1] >= self.ngram:
            scores = scores.masked_fill(self._repeating(scores.shape[1]), -torch.inf)
        return scores

    def push(self, token: Tensor) -> None:
        """token: [B] int64, what was chosen."""
        if self.remembers:
            self.said = torch.cat([self.said, token[:, None]], dim=1)
            if self.seen is not None:
                self.seen.scatter_(1, token[:, None], True)

    def reorder(self, index: Tensor) -> None:
        if self.remembers:
            self.said = self.said[index]
            self.seen = None if self.seen is None else self.seen[index]

    def _seen(self, vocabulary: int) -> Tensor:
        if self.seen is None:
            self.seen = self._mask(self.said, self.said >= 0, vocabulary)
        return self.seen

    def _repeating(self, vocabulary: int) -> Tensor:
        """[B, V]: the tokens that would complete an n-gram which the row has said before."""
        windows = self.said.unfold(1, self.ngram, 1)  # (B, L - n + 1, n)
        last = self.said[:, self.said.shape[1] - self.ngram + 1 :]  # (B, n - 1)
        same = (windows[..., :-1] == last[:, None]).all(-1) & (last >= 0).all(-1)[:, None]
        return self._mask(windows[..., -1], same & (windows[..., -1] >= 0), vocabulary)

    @staticmethod
    def _mask(tokens: Tensor, wanted: Tensor, vocabulary: int) -> Tensor:
        """[B, V] bool: true at tokens[b, i] where wanted[b, i]."""
        mask = torch.zeros(tokens.shape[0], vocabulary + 1, dtype=torch.bool, device=tokens.device)
        return mask.scatter_(1, torch.where(wanted, tokens, vocabulary), True)[:, :vocabulary]


def choose(logits: Tensor, options: Options, generator: torch.Generator | None) -> Tensor:
    """logits: [B, V] float32 -> the next tokens, [B] int64."""
    if options.temperature == 0:
        return logits.argmax(-1)
    logits = logits / options.temperature
    if options.top_k is not None and options.top_k < logits.shape[1]:
        least = logits.topk(options.top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, -torch.inf)
    if options.top_p is not None and options.top_p < 1:
        logits = _nucleus(logits, options.top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _nucleus(logits: Tensor, p: float) -> Tensor:
    """Only the likeliest tokens whose probabilities together reach p (Holtzman et al. 2020, arXiv:1904.09751)."""
    ordered, order = logits.sort(-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # the mass of everything likelier: 0 for the first, which stays
    return torch.empty_like(logits).scatter_(1, order, ordered.masked_fill(before >= p, -torch.inf))
