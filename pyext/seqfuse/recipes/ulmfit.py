"""ULMFiT (Howard and Ruder 2018, arXiv:1801.06146): a language model becomes a classifier, in three stages.

    general      an AWD-LSTM language model of general text (books)
    target       the same model goes on with the texts of the task, without their labels
    classifier   its layers under a new head learn from a few labels

    seqfuse train ulmfit                                               # all three; runs/ulmfit/target/general ...
    seqfuse train ulmfit --set start=runs/ulmfit/target --set seed=1   # the classifier again, from the same model
    seqfuse train ulmfit --set scratch=true                            # the classifier alone, from random weights
    seqfuse train ulmfit --data mine.tsv                               # text<TAB>label

From target on the layers have rates of their own, lower ones lower rates (discriminative fine-tuning), on a slanted
triangular schedule; the classifier's layers are unfrozen one by one from the top; its head reads the last output, the
maximum and the mean over time (concat pooling).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import torch

from seqfuse import data, models
from seqfuse.data import DataError
from seqfuse.models.base import Model
from seqfuse.models.heads import Classifier
from seqfuse.models.recurrent import RNNLanguageModel, RNNLanguageModelConfig
from seqfuse.recipes.awd_lstm import AWDLSTM
from seqfuse.recipes.base import Optim, Recipe, Task
from seqfuse.recipes.classify import Classification, ClassifyConfig, labelled_texts, split_of
from seqfuse.recipes.texts import TextConfig
from seqfuse.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class UlmfitConfig(TextConfig, ClassifyConfig):
    """stage: what is trained. start: the folder of the language model to start from; without it the earlier stages are
    trained first, for general_steps and target_steps, into folders within the run's own. scratch: start from random
    weights, with one rate for all layers. model: the language model, in all stages.

    decay: what the rate is divided by from one layer to the one below. unfreeze: steps after which the next layer is
    unfrozen, 0: all are trained from the start.
    """

    stage: Literal["general", "target", "classifier"] = "classifier"
    start: str | None = None
    scratch: bool = False
    general_steps: int = 700
    target_steps: int = 700
    decay: float = 2.6
    unfreeze: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.positive("general_steps", "target_steps", "decay")
        from_scratch = self.stage == "general" or self.scratch
        self.require(not (from_scratch and self.start), f"start is given ({self.start}), but nothing starts from it")


def ulmfit(stage: str = "classifier") -> UlmfitConfig:
    """stage: general, target or classifier."""
    language_model = stage != "classifier"
    return UlmfitConfig(
        recipe="ulmfit",
        stage=stage,
        corpus="genres",
        longest=100,
        max_steps=700 if language_model else 150,
        batch_size=20,
        length=35,
        tokens="bpe",
        vocab=4000,
        labelled=100,
        evaluate_every=175 if language_model else 50,
        checkpoint_every=175 if language_model else 50,
        keep="best" if language_model else "last",
        unfreeze=0 if language_model else 15,
        optim=Optim(lr=3e-3, weight_decay=1e-5, clip=0.25, warmup=70 if language_model else 15,
                    schedule="cosine" if stage == "general" else "slanted"),
        model=RNNLanguageModelConfig(
            vocab=1, embed=128, hidden=256, layers=2, dropout_embedding=0.05, dropout_input=0.2, dropout_hidden=0.1,
            dropout_output=0.2, weight_drop=0.2, activation=2.0, temporal=1.0,
        ),
    )  # fmt: skip


class Stage(Task):
    """What the three stages share: the tokenizer, which knows books and the task's texts; rates; where they start.

    A subclass gives `weights`, the part of its model that comes from the stage before.
    """

    config: UlmfitConfig
    before: str | None = None  # the stage before

    def pool_of_texts(self) -> list[str]:
        """The task's texts, those of the test split left out."""
        return [row.text for row in labelled_texts(self.config)[0] if split_of(row) != "test"]

    def train_tokenizer(self, text: str = "") -> Tokenizer:
        """That of the model to start from; else the same in each stage, as it is learned from the same texts."""
        if self.config.start is not None:
            return Tokenizer.load(Path(self.config.start) / "tokenizer.json")
        texts = [self.books(), *self.pool_of_texts()]
        return Tokenizer.train(texts, self.config.tokens, vocab=self.config.vocab)

    def books(self) -> str:
        text = data.gutenberg(self.config.books) if self.config.text == "gutenberg" else data.standard_library()
        return text[: self.config.limit]

    def ready(self, folder, train):
        config = self.config
        if self.before is None or config.scratch:
            return True
        start = config.start
        if start is None:
            plain = ulmfit(self.before)
            steps = config.general_steps if self.before == "general" else config.target_steps
            same = (
                "seed",
                "data",
                "corpus",
                "text",
                "books",
                "limit",
                "tokens",
                "vocab",
                "length",
                "general_steps",
                "model",
            )
            kept = {name: getattr(config, name) for name in same}
            if not train(dataclasses.replace(plain, max_steps=steps, **kept), self.before):
                return False
            start = folder / self.before
        self.take(Path(start))
        return True

    def take(self, start: Path) -> None:
        """The weights of the stage before. Raises DataError if its model is another one."""
        mine, loaded = self.weights(self.model), models.load(start, dtype=torch.float32)
        shapes = [{name: t.shape for name, t in m.state_dict().items()} for m in (mine, loaded)]
        if shapes[0] != shapes[1]:
            wanted, given = mine.config.to_dict(), loaded.config.to_dict()
            names = [name for name in wanted if given.get(name) != wanted[name]]
            differences = ", ".join(f"{name} is {given.get(name)!r}, not {wanted[name]!r}" for name in names)
            raise DataError(f"{start}: its model is another one than this run's: {differences}")
        mine.load_state_dict(loaded.state_dict())

    def weights(self, model: Model) -> RNNLanguageModel:
        return model

    def group(self, name: str) -> int:
        """0: the head; then the layers from the top down; the embedding."""
        layers = self.config.model.layers
        if ".layers." in f".{name}":
            return layers - int(f".{name}".partition(".layers.")[2].partition(".")[0])
        return layers + 1 if "embedding" in name else 0

    def rate(self, group: int, step: int) -> float:
        if self.before is None or self.config.scratch:
            return 1.0
        return 0.0 if step < group * self.config.unfreeze else self.config.decay**-group


class General(Stage, AWDLSTM):
    def read(self):
        return self.books(), f"general text ({self.config.text}, {self.config.books}*)"


class Target(Stage, AWDLSTM):
    before = "general"

    def read(self):
        text = "\n".join(self.pool_of_texts())
        own = self.config.data is not None  # which is read to its end
        return text if own else text[: self.config.limit], "the task's texts, without their labels"


class ToClassifier(Stage, Classification):
    before = "target"

    def text_tokenizer(self) -> Tokenizer:
        return self.tokenizer(self.train_tokenizer)

    def build(self) -> Model:
        body = RNNLanguageModel(dataclasses.replace(self.config.model, **self.pieces.config()))
        body.tokenizer = self.pieces
        model = Classifier.on(body, **self.labels(), pooling="concat", dropout=0.1)
        model.body.output.bias.requires_grad_(False)  # no token is predicted any more
        return model

    def weights(self, model):
        return model.body


STAGES = {"general": General, "target": Target, "classifier": ToClassifier}


def task(config: UlmfitConfig, *args) -> Task:
    return STAGES[config.stage](config, *args)


RECIPE = Recipe("ulmfit", "a language model of books, then of the task's texts, becomes its classifier", ulmfit, task)
