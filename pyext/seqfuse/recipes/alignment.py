"""What the stages of recipe `align` share: settings, data in splits and as tokens, and the models of earlier stages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from seqfuse import data, models
from seqfuse.data import DataError, Preference
from seqfuse.generate import generate
from seqfuse.models.base import Model
from seqfuse.models.config import MODELS
from seqfuse.models.decoder import DecoderConfig
from seqfuse.recipes import lora
from seqfuse.recipes.base import Optim, RunConfig, Task, check_positions, fingerprint
from seqfuse.recipes.texts import EVALUATED_ROWS, IGNORED
from seqfuse.tokenizer import Tokenizer

HELD_OUT = 10.0  # percent of the texts
SHOWN = 8  # prompts in the report
SAMPLING_SEED = 1  # of the held-out prompts' answers: always the same, so that evaluations can be compared
REPORT_SEED = 1_000_001  # of the answers that the report measures


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignConfig(RunConfig):
    """stage: what is trained. start: the folder of the model to start from; of all stages but sft it is the fine-tuned
    one, which is also the reference. reward: the folder of a reward model. Where they are not given, the earlier stages
    are trained first, into the run's own folders sft and reward: sft_steps and reward_steps, by default four and two
    for each step of this run.

    lora: rank of the adapters that are trained instead of the model's own weights, 0: none.

    vocab: tokens of a new model. longest: tokens of prompt and answer together; answer: those of a new answer, at most.
    prompt_words: of a review, that an answer goes on from. gap: points between the ratings of a pair.

    beta: how much the distance from the reference costs, in dpo, grpo and ppo. kl_bound: the finished model is the one
    of the highest reward among those whose KL to the reference, in nats for an answer, was not above this.
    measured: held-out prompts that are answered in an evaluation, and as many others in the report; at most half of
    them each. samples: answers to a prompt in grpo and ppo. updates: steps on the same answers. clip: of the ratio of
    probabilities. unfinished: reward that an answer without an end loses in training. value_weight, lam: of ppo's
    critic.
    """

    stage: Literal["sft", "reward", "dpo", "grpo", "ppo"] = "grpo"
    start: str | None = None
    reward: str | None = None
    sft_steps: int | None = None
    reward_steps: int | None = None
    lora: int = 0
    vocab: int = 2000
    longest: int = 56
    answer: int = 40
    prompt_words: int = 3
    gap: float = 1.0
    beta: float = 0.05
    kl_bound: float = 20.0
    measured: int = 256
    samples: int = 8
    updates: int = 2
    clip: float = 0.2
    unfinished: float = 1.0
    value_weight: float = 0.1
    lam: float = 0.95

    def __post_init__(self):
        super().__post_init__()
        self.positive("sft_steps", "reward_steps", "vocab", "answer", "prompt_words", "measured", "samples", "updates",
                      "kl_bound")  # fmt: skip
        smooth = self.stage in ("sft", "dpo") or not self.label_smoothing
        self.require(smooth, f"label_smoothing is of sft and dpo, {self.stage} has none")
        fits = self.answer + 2 <= self.longest
        self.require(fits, f"longest must leave room for a prompt: at least answer + 2, got {self.longest}")
        self.require(self.stage != "grpo" or self.samples > 1, "samples must be two at least in grpo: a group")
        pretrained = self.stage != "sft" or self.start is not None or not self.lora
        self.require(pretrained, "adapters (lora) are for a trained model, which start names")
        whole = self.sharding == "ddp" or self.stage not in ("grpo", "ppo")
        self.require(whole, f"{self.stage} draws answers from the whole model: sharding must be ddp, not fsdp")
        for name in ("clip", "lam"):
            self.require(getattr(self, name) <= 1, f"{name} must be at most 1, got {getattr(self, name)!r}")


def align(stage: str = "grpo") -> AlignConfig:
    """stage: sft, reward, dpo, grpo or ppo."""
    steps, batch, lr = {
        "sft": (800, 32, 3e-3),
        "reward": (400, 32, 5e-4),
        "dpo": (200, 32, 3e-4),
        "grpo": (200, 16, 3e-4),
        "ppo": (200, 16, 3e-4),
    }.get(stage, (1, 1, 1e-3))
    decay = 0.1 if stage in ("sft", "reward") else 0.0  # away from the reference is no virtue
    return AlignConfig(
        recipe="align",
        stage=stage,
        max_steps=steps,
        batch_size=batch,
        evaluate_every=max(1, steps // 10),
        checkpoint_every=max(1, steps // 10),
        optim=Optim(lr=lr, warmup=50 if stage == "sft" else 10, weight_decay=decay, beta2=0.95, schedule="linear"),
        model=DecoderConfig(
            vocab=4, width=96, layers=3, heads=3, mlp_width=256, max_positions=256, norm="rms", activation="swiglu",
            positions="rope", attention_bias=False, mlp_bias=False,
        ),
    )  # fmt: skip


class Rows(NamedTuple):
    """Texts as ids, [B, T], padded on the right: <bos>, prompt, answer, <eos>. first: [B], where the answer begins;
    lengths: [B]."""

    ids: Tensor
    first: Tensor
    lengths: Tensor

    @property
    def targets(self) -> Tensor:
        """What each token but the last is to predict: [B, T - 1], IGNORED in prompt and padding."""
        place = torch.arange(1, self.ids.shape[1], device=self.ids.device)
        answer = (place >= self.first[:, None]) & (place < self.lengths[:, None])
        return self.ids[:, 1:].masked_fill(~answer, IGNORED)

    @property
    def inputs(self) -> Tensor:
        return self.ids[:, :-1].contiguous()


class Align(Task):
    """What all stages share: the data, in two splits each, and its tokens.

    demonstrations: (prompt, answer); pairs; prompts: to be answered. The held-out ones share no prompt, and without
    prompts no text, with those for training.
    """

    config: AlignConfig

    def prepare(self) -> None:
        config = self.config
        what = self.read_preferences(config.data) if config.data else self.read_reviews()
        for name, (train, held) in self.splits().items():
            if not train or not held:
                raise DataError(
                    f"{config.data or 'ratings'}: the {'training' if held else 'held-out'} split has no {name}; more "
                    "lines are needed, or lines with more different prompts"
                )
        self.fingerprint = fingerprint("\n".join("\t".join(row) for part in self.demonstrations for row in part),
                                       "\n".join("\t".join(row) for part in self.pairs for row in part))  # fmt: skip
        self.model_tokenizer = self.tokenizer(self.first_tokenizer)
        self.start_model = None if config.start is None else self.loaded(config.start)
        self.bos_id, self.ends = self.edges()
        self.encode_all()
        counts = ", ".join(f"{len(train):,} and {len(held):,} {name}" for name, (train, held) in self.splits().items())
        self.said = f"{what}\nto train on and held out: {counts}"

    def edges(self) -> tuple[int, tuple[int, ...]]:
        """<bos>, and the tokens that end an answer, of which training writes the first. What the model to start from
        says of itself comes before what its tokenizer's tokens are called."""
        known, tokens = getattr(self.start_model, "config", None), self.model_tokenizer
        bos = tokens.bos_id if known is None or known.bos_id is None else known.bos_id
        ends = (known and known.eos_ids) or (tokens.eos_id,)
        for name, token in (("bos", bos), ("eos", ends[0])):
            if token is None:
                raise DataError(f"{self.config.start}: the tokenizer has no token that {name} could be")
        return bos, ends

    def splits(self) -> dict[str, tuple[list, list]]:
        return {"demonstrations": self.demonstrations, "pairs": self.pairs, "prompts": self.prompts}

    def read_preferences(self, path: str) -> str:
        """Returns what was read."""
        parts: tuple[list[Preference], list[Preference]] = ([], [])
        pairs, what = data.read_preferences(path)
        for pair in pairs:
            parts[is_held_out(pair.prompt)].append(pair)
        self.pairs = parts
        self.demonstrations = tuple([(pair.prompt, pair.chosen) for pair in part] for part in parts)
        self.prompts = tuple(list(dict.fromkeys(pair.prompt for pair in part)) for part in parts)
        return what

    def read_reviews(self) -> str:
        parts: tuple[list[data.Rated], list[data.Rated]] = ([], [])
        for text in data.rated_reviews():
            parts[is_held_out(text.text)].append(text)
        words = self.config.prompt_words
        self.pairs = tuple(data.length_matched_pairs(part, self.config.gap, rounds=4) for part in parts)
        self.demonstrations = tuple([("", text.text) for text in part] for part in parts)
        begun = ([t.text.split() for t in part] for part in parts)
        train, held = ([" ".join(t[:words]) for t in part if len(t) > 2 * words] for part in begun)
        known = set(train)
        self.prompts = train, [prompt for prompt in dict.fromkeys(held) if prompt not in known]
        item = data.RATINGS
        return f"{item.source}: {sum(map(len, parts)):,} sentences of film reviews; licence: {item.licence}"

    def first_tokenizer(self) -> Tokenizer:
        if self.config.start is None:
            texts = [joined(*row) for row in self.demonstrations[0]]
            texts += [joined(pair.prompt, pair.rejected) for pair in self.pairs[0]]
            return Tokenizer.train(texts, "bpe", vocab=self.config.vocab).with_template("<bos> $A")
        return Tokenizer.load(Path(self.config.start) / "tokenizer.json")

    # ---------------------------------------------------------------------------------------------------------- tokens

    def encode_all(self) -> None:
        """Texts to ids; what is longer than `longest` is left out, and an answer needs room for `answer` tokens."""
        config = self.config
        self.demonstrations = tuple(self.encoded(part) for part in self.demonstrations)
        self.pairs = tuple(
            [
                pair
                for pair in zip(self.encoded([(p.prompt, p.chosen) for p in part], keep=True),
                                self.encoded([(p.prompt, p.rejected) for p in part], keep=True), strict=True)
                if max(len(ids) for ids, _ in pair) <= config.longest
            ]
            for part in self.pairs
        )  # fmt: skip
        room = config.longest - config.answer
        texts = (self.model_tokenizer.encode_batch(part, specials=False) for part in self.prompts)
        begun = ([[self.bos_id, *ids] for ids in part] for part in texts)
        self.prompts = tuple([ids for ids in part if len(ids) <= room] for part in begun)
        for name, parts in self.splits().items():
            if not all(parts):
                raise DataError(
                    f"{config.data or 'ratings'}: all {name} of a split are too long: at most {config.longest} tokens "
                    f"(longest), {room} of a prompt"
                )

    def encoded(self, texts: list[tuple[str, str]], keep: bool = False) -> list[tuple[list[int], int]]:
        """(ids, where the answer begins) of prompts and answers, those that are too long left out unless `keep`."""
        tokenizer = self.model_tokenizer
        prompts = tokenizer.encode_batch([prompt for prompt, _ in texts], specials=False)
        answers = tokenizer.encode_batch([answer_after(*text) for text in texts], specials=False)
        rows = [
            ([self.bos_id, *prompt, *answer, self.ends[0]], 1 + len(prompt))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return [row for row in rows if keep or len(row[0]) <= self.config.longest]

    def rows(self, texts: list[tuple[list[int], int]]) -> Rows:
        ids, first = zip(*texts, strict=True)
        lengths = torch.tensor([len(row) for row in ids])
        padded = pad_sequence([torch.tensor(row) for row in ids], batch_first=True, padding_value=self.pad_id)
        return Rows(padded, torch.tensor(first), lengths)

    @property
    def pad_id(self) -> int:
        pad = self.model_tokenizer.pad_id
        return self.ends[0] if pad is None else pad

    # ---------------------------------------------------------------------------------------------------------- models

    def build(self) -> Model:
        if self.start_model is not None:
            model, self.start_model = self.start_model, None
        else:
            config = dataclasses.replace(self.config.model, **self.model_tokenizer.config())
            model = MODELS[config.model](config)
            model.tokenizer = self.model_tokenizer
        check_positions(model.config, self.config.longest, "longest")
        return lora.attach(model, self.config.lora) if self.config.lora else model

    def loaded(self, folder: str | Path) -> Model:
        model = models.load(folder, dtype=torch.float32, device=self.device)
        if model.config.eos_id is None and model.tokenizer is not None:  # generation is to stop where training does
            model.config = dataclasses.replace(model.config, eos_id=model.tokenizer.eos_id)
        return model

    def earlier(self, stage: str, steps: int, start: str | None = None) -> AlignConfig:
        """The config of an earlier stage: this one's, with what the stage has of its own."""
        own = {"max_steps": steps, "evaluate_every": max(1, steps // 10), "checkpoint_every": max(1, steps // 10)}
        shared = ("seed", "data", "precision", "vocab", "longest", "answer", "prompt_words", "gap", "model")
        return dataclasses.replace(align(stage), start=start, **own, **{k: getattr(self.config, k) for k in shared})

    def ready(self, folder, train):
        """The fine-tuned model, which is trained first if there is none."""
        self.folder = folder
        if self.config.stage == "sft" or self.config.start is not None:
            return True
        if not train(self.earlier("sft", self.config.sft_steps or 4 * self.config.max_steps), "sft"):
            return False
        self.take_weights(self.loaded(folder / "sft"))
        return True

    def take_weights(self, model: Model) -> None:
        lora.load_plain(self.model, model.state_dict())

    @property
    def start_folder(self) -> Path:
        if self.config.start is None and self.folder is None:
            raise ValueError(f"align: without a run's folder {self.config.stage} needs start, a fine-tuned model's")
        return Path(self.config.start or self.folder / "sft")


class OnPairs(Align):
    """Training on pairs: a batch is the chosen texts and then the rejected ones, as many."""

    unit = "pairs"

    def prepare(self):
        super().prepare()
        self.examples = len(self.pairs[0])

    def batch(self, indices):
        return tuple(self.both([self.pairs[0][i] for i in indices]))

    def both(self, pairs) -> Rows:
        return self.rows([pair[0] for pair in pairs] + [pair[1] for pair in pairs])

    def held_out(self):
        held = self.pairs[1]
        for i in range(0, len(held), EVALUATED_ROWS):
            yield tuple(self.both(held[i : i + EVALUATED_ROWS]))


# ------------------------------------------------------------------------------------------------------------- helpers


def is_held_out(text: str) -> bool:
    return data.split_of(text, 0.0, HELD_OUT) == "valid"


def answer_after(prompt: str, answer: str) -> str:
    """As it stands in the text: one space lies between a prompt and its answer."""
    return f" {answer}" if prompt else answer


def joined(prompt: str, answer: str) -> str:
    return prompt + answer_after(prompt, answer)


def answers(model: Model, prompts: list[list[int]], tokens: int, seed: int | None) -> Tensor:
    """Prompts with answers drawn from the model's own distribution: [B, T]. seed: None for torch's own generator."""
    return generate(model, prompts, max_new_tokens=tokens, temperature=1.0, seed=seed)
