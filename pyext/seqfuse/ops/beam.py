"""beam_step: one step of beam search, from the logits of every beginning to what goes on and what has ended."""

from typing import NamedTuple

import torch

from seqfuse import dispatch, reference
from seqfuse.ops import library


class BeamCase(NamedTuple):
    """What the choice of a backend may depend on."""

    device: str
    candidates: int  # of a row: beginnings times tokens

    def shape_class(self) -> str:
        return f"candidates{dispatch.size_class(self.candidates)}"


def beam_step(logits, scores, stops, best_scores, best_at, *, beams, step, last, divisor, flattering, normalised):
    """Which beginnings of each row go on, and what has ended; see csrc/include/seqfuse/beam.h.

    logits: float32 [B * kept, V] of each beginning's next token; normalised=False: they are log-probabilities already.
    scores: float32 [B, kept], log-probabilities of the beginnings. stops: int64 [S], tokens that end. best_scores:
    float32 [B] and best_at: int64 [B, 3] of (step, parent, token), the best that has ended before. beams: how many go
    on. last: all that is found ends. divisor: of a total that ends; flattering: of one that goes on.
    Returns (scores [B, beams], parents [B * beams] in [0, B * kept), tokens [B * beams], best_scores, best_at,
    over []: bool, whether no beginning can still win).
    """
    name = dispatch.select("beam_step", BeamCase(logits.device.type, scores.shape[1] * logits.shape[1])).backend
    run = dispatch.get("beam_step", name).fwd
    return run(logits, scores, stops, best_scores, best_at, beams, step, last, divisor, flattering, normalised)


def _fake(logits, scores, stops, best_scores, best_at, beams, step, last, divisor, flattering, normalised):
    B, empty = scores.shape[0], torch.empty_like
    goes_on = (scores.new_empty(B, beams), stops.new_empty(B * beams), stops.new_empty(B * beams))
    return *goes_on, empty(best_scores), empty(best_at), scores.new_empty((), dtype=torch.bool)


library.register_fake("beam_step", _fake)
dispatch.register(
    "beam_step",
    dispatch.Backend("cpu", library.kernel("beam_step"), None, lambda c: library.cpu_refusal(c.device, torch.float32)),
    dispatch.Backend("torch", reference.beam_step, None, note="a chain of PyTorch's ops"),
    dispatch.Backend("reference", reference.beam_step, None),
    # so that a search whose model runs on them by name runs as a whole
    *(
        dispatch.Backend(name, reference.beam_step, None, by_name_only="the choice is PyTorch's ops")
        for name in ("triton", "cuda")
    ),
)
