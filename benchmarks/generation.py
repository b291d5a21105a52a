"""Beam search on the GRU encoder-decoder against plain PyTorch: `python -m seqfuse.benchmarks.generation`.

Both search a batch at once, all beams of all sources in one step of the model. The plain one is what one writes with
torch.nn.GRU and the formulas of Luong's attention: the memory repeated for the beams, the query projected and the
readout's product taken at each step. The gate: the same tokens, of every source. Alternately, medians of rounds.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from torch import Tensor

import seqfuse
from seqfuse import models

PAD, BOS, EOS = 0, 1, 2
NEW = 24


class Plain:
    """The model's own weights in torch.nn's modules, and beam search as it is usually written."""

    def __init__(self, model: models.RNNSeq2Seq):
        self.model, H = model, model.config.hidden
        self.encoder = torch.nn.GRU(model.config.embed, H // 2, bidirectional=True, batch_first=True)
        self.decoder = torch.nn.GRU(model.config.embed, H, batch_first=True)
        self.encoder.load_state_dict(model.encoder.layers[0].state_dict())
        self.decoder.load_state_dict(model.decoder.layers[0].state_dict())
        self.query = model.keys.weight.detach()  # h . (W m) = (h W) . m
        self.combine = torch.nn.Linear(2 * H, H)
        with torch.no_grad():
            self.combine.weight.copy_(torch.cat([model.read_context.weight, model.read_hidden.weight], 1))
            self.combine.bias.copy_(model.read_hidden.bias)

    def step(self, tokens: Tensor, state: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """tokens: [N], state: [1, N, H], memory: [N, T, H] -> (logits [N, V], state)."""
        hidden, state = self.decoder(self.model.decoder.embedding(tokens)[:, None], state)  # (N, 1, H)
        weights = (hidden @ self.query @ memory.transpose(1, 2)).softmax(-1)
        combined = torch.tanh(self.combine(torch.cat([weights @ memory, hidden], -1)))
        return self.model.output(combined)[:, 0], state

    @torch.no_grad()
    def search(self, source: Tensor, beams: int, most: int) -> list[list[int]]:
        B = len(source)
        memory, last = self.encoder(self.model.encoder.embedding(source))
        memory = memory.repeat_interleave(beams, 0)
        state = torch.cat([last[0], last[1]], -1)[None].repeat_interleave(beams, 1)
        tokens = torch.full((B, beams, 1), BOS)
        scores = torch.full((B, beams), -torch.inf)
        scores[:, 0] = 0.0
        finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(B)]
        for n in range(1, most + 1):
            logits, state = self.step(tokens[:, :, -1].flatten(), state, memory)
            log_probs = logits.log_softmax(-1).view(B, beams, -1)
            V = log_probs.shape[-1]
            best, choice = (scores[:, :, None] + log_probs).flatten(1).topk(2 * beams)
            parent, token = choice // V, choice % V
            going = [[] for _ in range(B)]
            for b, (row, parents, chosen) in enumerate(
                zip(best.tolist(), parent.tolist(), token.tolist(), strict=True)
            ):
                for rank, (score, p, t) in enumerate(zip(row, parents, chosen, strict=True)):
                    if t == EOS or n == most:
                        if rank < beams:
                            finished[b].append((score / n, [*tokens[b, p, 1:].tolist(), t]))
                    if t != EOS and len(going[b]) < beams:
                        going[b].append((score, p, t))
            scores = torch.tensor([[g[0] for g in row] for row in going])
            parents = torch.tensor([[g[1] for g in row] for row in going])
            tokens = tokens.gather(1, parents[:, :, None].expand(-1, -1, n))
            tokens = torch.cat([tokens, torch.tensor([[g[2] for g in row] for row in going])[:, :, None]], 2)
            state = state[:, (torch.arange(B)[:, None] * beams + parents).flatten()]
            ends = [max(f)[0] if f else -torch.inf for f in finished]
            if all(e >= s / most for e, s in zip(ends, scores[:, 0].tolist(), strict=True)):
                break
        return [max(f)[1] for f in finished]


def ours(model, source: Tensor, beams: int, most: int) -> list[list[int]]:
    rows = seqfuse.generate(model, source, num_beams=beams, max_new_tokens=most).tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def case(hidden: int, vocab: int, batch: int, beams: int = 4, letters: int = 9, rounds: int = 7) -> str:
    """One line of the table; raises if the two don't find the same."""
    torch.manual_seed(0)
    config = models.RNNSeq2SeqConfig(
        vocab=vocab, source_vocab=30, embed=128, hidden=hidden, cell="gru", pad_id=PAD, bos_id=BOS, eos_id=EOS
    )
    model = models.RNNSeq2Seq(config).eval()
    with torch.no_grad():
        model.output.weight.mul_(8)  # else all tokens are about as likely
    source = torch.randint(3, 30, (batch, letters))
    plain = Plain(model)
    contenders = {
        "plain": lambda: plain.search(source, beams, NEW),
        "seqfuse": lambda: ours(model, source, beams, NEW),
    }
    found = {name: call() for name, call in contenders.items()}
    if found["plain"] != found["seqfuse"]:
        raise AssertionError(f"hidden {hidden}, batch {batch}: the two found different tokens")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        for name in list(contenders)[:: 1 if i % 2 == 0 else -1]:
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
    ratio = statistics.median(p / s for p, s in zip(*seconds.values(), strict=True))
    plain_ms, ours_ms = (1000 * statistics.median(values) for values in seconds.values())
    return f"{hidden:>6} {vocab:>6} {batch:>6} {beams:>6} {plain_ms:>9.1f} {ours_ms:>11.1f} {ratio:>9.2f}x"


def main() -> None:
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, at most {NEW} new tokens; the same tokens found"
    )
    print("hidden  vocab  batch  beams  plain ms  seqfuse ms     ratio")
    for hidden, vocab in ((256, 74), (384, 74), (512, 8000)):
        for batch in (1, 8, 32):
            print(case(hidden, vocab, batch))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
