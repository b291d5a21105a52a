"""One step of beam search in plain PyTorch: no host waits for it, on any device."""

import torch


def beam_step(
    logits, scores, stops, best_scores, best_at, beams, step, last, divisor, flattering, normalised
):  # csrc/include/seqfuse/beam.h
    B, kept = scores.shape
    log_probs = logits.log_softmax(-1) if normalised else logits
    V = logits.shape[-1]
    total = (log_probs.view(B, kept, V) + scores[:, :, None]).flatten(1)  # (B, kept * V)
    values, places = total.topk(min(beams * (1 + len(stops)), kept * V), dim=1)  # (B, C), best first
    first = torch.arange(0, B * kept, kept, device=scores.device)[:, None]  # (B, 1), each row's first parent
    parents, tokens = first + places // V, places % V
    stopped = torch.isin(tokens, stops)

    ended = torch.ones_like(stopped) if last else stopped
    final, rank = (values / divisor).masked_fill(~ended, -torch.inf)[:, :beams].max(1, keepdim=True)  # (B, 1)
    better = final > best_scores[:, None]
    where = torch.cat([torch.full_like(rank, step), parents.gather(1, rank), tokens.gather(1, rank)], 1)  # (B, 3)
    best_scores, best_at = torch.where(better, final, best_scores[:, None])[:, 0], torch.where(better, where, best_at)

    order = stopped.to(torch.uint8).argsort(dim=1, stable=True)[:, :beams]  # those that go on come first
    scores = values.masked_fill(stopped, -torch.inf).gather(1, order)
    none = scores == -torch.inf
    parents = torch.where(none, first, parents.gather(1, order))
    tokens = tokens.gather(1, order).masked_fill(none, 0)
    missing = beams - order.shape[1]
    if missing > 0:
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
        parents = torch.cat([parents, first.expand(B, missing)], 1)
        tokens = torch.nn.functional.pad(tokens, (0, missing))
    over = (scores[:, 0] / flattering <= best_scores).all()
    return scores, parents.flatten(), tokens.flatten(), best_scores, best_at, over
