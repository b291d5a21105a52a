"""Grapheme-to-phoneme conversion: spelled words in, phonemes out (`thought` -> `TH AO1 T`).

An encoder-decoder with attention, in plain torch.nn:

    letters  -> Embedding -> bidirectional GRU -> LayerNorm -> memory
    phonemes -> Embedding -> GRU -> LayerNorm -> Luong "general" attention over the memory -> Linear -> next phoneme

The attention comes after the decoder's GRU and is not fed back into it (Luong et al. 2015, section 3.1, without the
input feeding of section 3.3). So, in training, the decoder runs over all phonemes in one call, which a fused kernel can
take as a whole; with input feeding or Bahdanau's attention it would be a Python loop over the steps.

Words of one batch all have the same number of letters: the encoder sees no padding at all, in either direction, and the
attention needs no mask. Only the target side is padded, at its end, where a causal decoder cannot see it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqfuse.data import DataError, Lexicon, split_of

PAD, BOS, EOS, UNK = range(4)
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]


@dataclass(frozen=True)
class Config:
    """Everything that decides the result, apart from the data and the machine."""

    steps: int = 5000
    batch_size: int = 64  # words
    embed: int = 128
    hidden: int = 384  # the encoder has half of it in each direction
    lr: float = 2e-3
    warmup: int = 200  # steps
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    bf16: bool = False  # autocast
    validate_every: int = 200  # steps
    checkpoint_every: int = 400  # steps

    @classmethod
    def from_dict(cls, values: dict) -> Config:
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


# ---------------------------------------------------------------------------------------------------------- the model


class G2P(nn.Module):
    """Attention encoder-decoder. B words, T letters, U phonemes, H hidden size, V phoneme vocabulary."""

    def __init__(self, letters: int, phonemes: int, embed: int = 128, hidden: int = 384):
        super().__init__()
        self.letters = nn.Embedding(letters, embed)
        self.encoder = nn.GRU(embed, hidden // 2, bidirectional=True, batch_first=True)
        self.memory_norm = nn.LayerNorm(hidden)
        self.phonemes = nn.Embedding(phonemes, embed)
        self.decoder = nn.GRU(embed, hidden, batch_first=True)
        self.query_norm = nn.LayerNorm(hidden)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.combine = nn.Linear(2 * hidden, hidden)
        self.output = nn.Linear(hidden, phonemes)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """source (B, T) -> memory (B, T, H) and the decoder's first state (1, B, H)."""
        states, last = self.encoder(self.letters(source))  # (B, T, H), (2, B, H/2)
        return self.memory_norm(states), torch.cat([last[0], last[1]], dim=-1)[None]

    def decode(self, memory: Tensor, state: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """inputs (B, U) -> logits (B, U, V), the new state (1, B, H) and the attention weights (B, U, T)."""
        hidden, state = self.decoder(self.phonemes(inputs), state)  # (B, U, H)
        hidden = self.query_norm(hidden)
        scores = self.query(hidden) @ memory.transpose(1, 2)  # (B, U, T)
        weights = scores.softmax(dim=-1)
        context = weights @ memory  # (B, U, H)
        combined = torch.tanh(self.combine(torch.cat([context, hidden], dim=-1)))  # (B, U, H)
        return self.output(combined), state, weights

    def forward(self, source: Tensor, inputs: Tensor) -> Tensor:
        """Teacher forcing: source (B, T), inputs (B, U) starting with <bos> -> logits (B, U, V)."""
        return self.decode(*self.encode(source), inputs)[0]

    @torch.no_grad()
    def greedy(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """source (B, T) -> the likeliest phonemes one by one (B, U), <eos> or <pad> at the end; weights (B, U, T)."""
        memory, state = self.encode(source)
        token = torch.full((source.shape[0], 1), BOS, device=source.device)  # (B, 1)
        done = torch.zeros_like(token, dtype=torch.bool)
        tokens, attention = [], []
        for _ in range(2 * source.shape[1] + 10):  # no word of the dictionary needs more
            logits, state, weights = self.decode(memory, state, token)
            logits[..., [PAD, BOS, UNK]] = -math.inf
            token = logits.argmax(dim=-1).masked_fill(done, PAD)
            done = done | (token == EOS)
            tokens.append(token)
            attention.append(weights)
            if bool(done.all()):
                break
        return torch.cat(tokens, dim=1), torch.cat(attention, dim=1)


# ----------------------------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Group:
    """All pairs of one split whose words have the same number of letters."""

    source: Tensor  # (N, T) letters
    target: Tensor  # (N, U) <bos> phonemes <eos> <pad>...
    lengths: Tensor  # (N,) phonemes and <eos>, on the CPU: batches are planned there


class Corpus:
    """A lexicon, split by word and turned into tensors."""

    def __init__(self, lexicon: Lexicon, device: torch.device | str = "cpu"):
        self.lexicon = lexicon
        self.device = torch.device(device)
        self.words: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
        for word in lexicon:
            self.words[split_of(word)].append(word)
        for split, words in self.words.items():
            if not words:
                raise DataError(f"the {split} split is empty: {len(lexicon)} words are too few, give some hundreds")
        train = self.words["train"]
        self.letters = SPECIALS + sorted({letter for word in train for letter in word})
        self.phonemes = SPECIALS + sorted({p for word in train for reading in lexicon[word] for p in reading})
        self._letter_id = {letter: i for i, letter in enumerate(self.letters)}
        self._phoneme_id = {phoneme: i for i, phoneme in enumerate(self.phonemes)}
        self.train = self._groups(train)
        self.valid = self._groups(self.words["valid"][:1000])

    def encode(self, words: list[str]) -> Tensor:
        """Words of equal length -> (B, T)."""
        ids = [[self._letter_id.get(letter, UNK) for letter in word] for word in words]
        return torch.tensor(ids, device=self.device)

    def spell(self, tokens: list[int]) -> tuple[str, ...]:
        """Token ids -> phonemes, up to <eos>."""
        end = tokens.index(EOS) if EOS in tokens else len(tokens)
        return tuple(self.phonemes[token] for token in tokens[:end] if token != PAD)

    def _groups(self, words: list[str]) -> list[Group]:
        pairs: dict[int, list[tuple[str, list[int]]]] = {}
        for word in words:
            for reading in self.lexicon[word]:
                ids = [BOS, *(self._phoneme_id.get(p, UNK) for p in reading), EOS]
                pairs.setdefault(len(word), []).append((word, ids))
        groups = []
        for _, group in sorted(pairs.items()):
            width = max(len(ids) for _, ids in group)
            target = torch.tensor([ids + [PAD] * (width - len(ids)) for _, ids in group])
            lengths = (target != PAD).sum(dim=1) - 1  # <bos> is not predicted
            groups.append(Group(self.encode([word for word, _ in group]), target.to(self.device), lengths))
        return groups

    def pairs(self, split: str) -> int:
        return sum(len(self.lexicon[word]) for word in self.words[split])

    def epoch(self, config: Config, number: int) -> list[tuple[int, Tensor]]:
        """The batches of one epoch as (group, rows): the same list for the same seed and number, on any machine.

        Shuffled words of one length are cut into pools of eight batches, and each pool is sorted by target length
        before it is cut into batches: that leaves little padding on the target side as well.
        """
        random = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
        batches = []
        for index, group in enumerate(self.train):
            order = torch.randperm(len(group.lengths), generator=random)
            for pool in order.split(8 * config.batch_size):
                pool = pool[group.lengths[pool].argsort(stable=True)]
                batches += [(index, rows) for rows in pool.split(config.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=random).tolist()]

    def batch(self, index: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """source (B, T) and target (B, 1 + U), cut to the longest target of the batch."""
        group = self.train[index]
        width = 1 + int(group.lengths[rows].max())
        rows = rows.to(self.device)
        return group.source[rows], group.target[rows, :width]


def batches(corpus: Corpus, config: Config, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """(source, target) for step `start` and all steps after it, epoch after epoch without end."""
    number, skip = 0, start
    while True:
        plan = corpus.epoch(config, number)
        for index, rows in plan[skip:]:
            yield corpus.batch(index, rows)
        skip = max(0, skip - len(plan))
        number += 1


# ------------------------------------------------------------------------------------------------------- the training


def build(corpus: Corpus, config: Config) -> G2P:
    """A new model, initialised from the seed on the CPU, so that it is the same model on every device."""
    torch.manual_seed(config.seed)
    return G2P(len(corpus.letters), len(corpus.phonemes), config.embed, config.hidden).to(corpus.device)


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, then half a cosine down to zero at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def loss_of(model: nn.Module, source: Tensor, target: Tensor, config: Config) -> Tensor:
    """Mean cross entropy per phoneme, in nats."""
    with torch.autocast(source.device.type, torch.bfloat16, enabled=config.bf16):
        logits = model(source, target[:, :-1])  # (B, U, V)
    return F.cross_entropy(logits.float().flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD)


def train_step(model: nn.Module, optimizer, source: Tensor, target: Tensor, step: int, config: Config) -> Tensor:
    """One step of AdamW; returns the loss without waiting for the device."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    loss = loss_of(model, source, target, config)
    optimizer.zero_grad(set_to_none=True)
    # Rare word lengths make small batches. Weighted like this, every word counts the same.
    (loss * (source.shape[0] / config.batch_size)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def validation_loss(model: nn.Module, corpus: Corpus, config: Config) -> float:
    total, count = 0.0, 0
    for group in corpus.valid:
        tokens = int(group.lengths.sum())
        total += float(loss_of(model, group.source, group.target, config)) * tokens
        count += tokens
    return total / count


class Run:
    """A training run that can be saved at any step and resumed there with the same losses to the last bit.

    The whole state is one safetensors file (weights, optimizer moments, losses; settings and step as JSON in its
    header), written under another name and renamed: there is always one whole checkpoint, and reading it runs no code.
    """

    def __init__(self, model: nn.Module, corpus: Corpus, config: Config):
        self.model, self.corpus, self.config = model, corpus, config
        self.optimizer = make_optimizer(model, config)
        self.step = 0
        self.seconds = 0.0
        self.losses = torch.zeros(config.steps, device=corpus.device)  # of each step, nats per phoneme
        self.valid: list[tuple[int, float]] = []  # (step, loss)

    def train(self, on_step: Callable[[Run, int], bool], save: Callable[[Run], None]) -> bool:
        """Train to the last step. `on_step(run, words)` returns False to stop after this step; True if all was done."""
        config, start = self.config, time.perf_counter() - self.seconds
        source_of_batches = batches(self.corpus, config, self.step)
        going = True
        while going and self.step < config.steps:
            source, target = next(source_of_batches)
            self.losses[self.step] = train_step(self.model, self.optimizer, source, target, self.step, config)
            self.step += 1
            if self.step % config.validate_every == 0 or self.step == config.steps:
                self.valid.append((self.step, validation_loss(self.model, self.corpus, config)))
            self.seconds = time.perf_counter() - start
            going = on_step(self, source.shape[0])
            if not going or self.step % config.checkpoint_every == 0 or self.step == config.steps:
                save(self)
        return self.step == config.steps

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors and plain values from which `restore` continues."""
        tensors = {f"model.{name}": value.detach() for name, value in self.model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        tensors["losses"] = self.losses
        values = {"config": asdict(self.config), "step": self.step, "seconds": self.seconds, "valid": self.valid}
        return {name: value.contiguous() for name, value in tensors.items()}, values

    def restore(self, tensors: dict[str, Tensor], values: dict) -> None:
        model = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        self.model.load_state_dict(model)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                moments.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.losses.copy_(tensors["losses"])
        self.step, self.seconds = values["step"], values["seconds"]
        self.valid = [(step, loss) for step, loss in values["valid"]]


# ----------------------------------------------------------------------------------------------------- the evaluation


def edit_distance(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """Levenshtein: the fewest insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


@dataclass(frozen=True)
class Sample:
    """One decoded word; `truth` is the reading of the dictionary that is closest to it."""

    word: str
    decoded: tuple[str, ...]
    truth: tuple[str, ...]
    errors: int


@dataclass(frozen=True)
class Evaluation:
    samples: list[Sample]
    seconds: float

    @property
    def phoneme_error_rate(self) -> float:
        """Percent: edits needed over all words / phonemes in all (closest) references."""
        return 100 * sum(s.errors for s in self.samples) / sum(len(s.truth) for s in self.samples)

    @property
    def word_error_rate(self) -> float:
        """Percent of words that equal none of their references."""
        return 100 * sum(s.errors > 0 for s in self.samples) / len(self.samples)


def transcribe(model: G2P, corpus: Corpus, words: list[str], batch_size: int = 512) -> dict[str, tuple[str, ...]]:
    """Greedy decoding of any words, batched by their number of letters."""
    by_length: dict[int, list[str]] = {}
    for word in words:
        by_length.setdefault(len(word), []).append(word)
    decoded = {}
    for group in by_length.values():
        for i in range(0, len(group), batch_size):
            tokens, _ = model.greedy(corpus.encode(group[i : i + batch_size]))
            decoded |= {w: corpus.spell(row) for w, row in zip(group[i:], tokens.tolist(), strict=False)}
    return decoded


def evaluate(model: G2P, corpus: Corpus, words: list[str]) -> Evaluation:
    """Decode held-out words and count errors against the closest of each word's pronunciations."""
    start = time.perf_counter()
    samples = []
    for word, decoded in transcribe(model, corpus, words).items():
        distances = [(edit_distance(decoded, reading), reading) for reading in corpus.lexicon[word]]
        errors, truth = min(distances, key=lambda pair: pair[0])
        samples.append(Sample(word, decoded, truth, errors))
    return Evaluation(samples, time.perf_counter() - start)


def attention_map(model: G2P, corpus: Corpus, word: str) -> tuple[list[str], list[str], list[list[float]]]:
    """Letters (T), decoded phonemes (U) and weights[u][t]: which letters the model read for each phoneme."""
    tokens, weights = model.greedy(corpus.encode([word]))
    ids = tokens[0].tolist()
    phonemes = [*corpus.spell(ids), *(["end"] if EOS in ids else [])]
    return list(word), phonemes, weights[0, : len(phonemes)].float().cpu().tolist()
