"""What every model has in common: a frozen config, a folder to live in, and how large it is.

model = Decoder(DecoderConfig(vocab=50257, width=768, layers=12, heads=12))
model.save("DIR")               # config.json, model.safetensors, tokenizer.json if it has one
model = seqfuse.models.load("DIR")
"""

import dataclasses
import types
import typing
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from torch import nn

from seqfuse import ops
from seqfuse.models import files
from seqfuse.models.files import CheckpointError

MODELS: dict[str, type["Model"]] = {}  # what "model" in a config.json may name; every subclass of Model enters itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and switches of a model: numbers, strings, None, or the config of a body within a head's.

    vocab: how many tokens there are. bos_id, eos_id, pad_id: tokens with a meaning, or None. checkpoint: in training,
    compute activations within a block again in the backward pass instead of keeping them.

    A value of a wrong type or out of range raises ValueError with one sentence; so does an unknown key in from_dict.
    """

    model: ClassVar[str]  # the name of the class that it configures
    encoder_decoder: ClassVar[bool] = False  # True: a source goes in and new tokens come out

    vocab: int
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    checkpoint: bool = False

    def __post_init__(self):
        for name, hint in typing.get_type_hints(type(self)).items():
            if typing.get_origin(hint) is ClassVar:
                continue
            value = getattr(self, name)
            self.require(_fits(hint, value), f"{name} must be {_describe(hint)}, got {value!r}")
            if isinstance(value, (int, float)):
                self.require(value >= 0, f"{name} must not be negative, got {value!r}")
            if isinstance(value, int) and name.endswith("_id"):
                self.require(value < self.vocab, f"{name} is {value}, but there are {self.vocab} tokens (vocab)")

    def require(self, holds: bool, sentence: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}: {sentence}")

    def positive(self, *names: str) -> None:
        for name in names:
            self.require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)!r}")

    def to_dict(self) -> dict:
        """What from_dict takes: plain values, and "model", the name of the model's class."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"model": self.model} | {k: v.to_dict() if isinstance(v, Config) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__}: expected keys and values, got {values!r}")
        values = dict(values)
        name = values.pop("model", None)
        if cls is Config:  # of whichever model it names
            if name not in MODELS:
                raise ValueError(f'"model" must be one of {", ".join(sorted(MODELS))}, got {name!r}')
            return MODELS[name].config_class.from_dict(values)
        if name not in (None, cls.model):
            raise ValueError(f'{cls.__name__}: "model" must be {cls.model!r}, got {name!r}')
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise ValueError(f"{cls.__name__}: unknown key {key!r}; there are {', '.join(sorted(fields))}")
        required = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
        if required:
            raise ValueError(f"{cls.__name__}: missing key {required[0]!r}")
        if isinstance(values.get("body"), dict):
            values["body"] = Config.from_dict(values["body"])
        return cls(**values)


class Model(nn.Module):
    """A model with a config, weights and perhaps a tokenizer. A subclass names its config_class.

    Subclasses give hidden(ids [B, T], lengths=None) -> [B, T, d] and output_weights(); models that generate also
    begin(ids, lengths, capacity) and step(ids, cache). Rows are padded on the right; lengths: int64 [B], or None where
    no row is padded.
    """

    config_class: type[Config]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        MODELS[cls.__name__] = cls

    def __init__(self, config: Config):
        super().__init__()
        if type(config) is not self.config_class:
            wanted = self.config_class.__name__
            raise TypeError(
                f"{type(self).__name__}: config must be a {wanted}, got {config!r}; from_config takes dicts"
            )
        self.config = config
        self.tokenizer = None

    @classmethod
    def from_config(cls, config: Config | dict | str | Path) -> Self:
        """A model with random weights, from a config, a dict of its keys, or the path of a config.json."""
        kind = Config if cls is Model else cls.config_class
        if isinstance(config, (str, Path)):
            path = Path(config)
            with files.named(path):
                config = kind.from_dict(files.read_json(path))
        elif isinstance(config, dict):
            config = kind.from_dict(config)
        return MODELS[config.model](config) if cls is Model else cls(config)

    def forward(self, ids, lengths=None):
        """ids: int64 [B, T] -> logits [B, T, V]."""
        weight, bias = self.output_weights()
        return nn.functional.linear(self.hidden(ids, lengths), weight, bias)

    def loss(self, ids, targets, lengths=None, **options):
        """Mean cross entropy of targets, int64 [B, T] (-100: ignored), in nats; logits are never in memory as a whole.

        options: as in ops.linear_cross_entropy (label_smoothing, softcap, z_loss, class_weight, reduction ...).
        """
        weight, bias = self.output_weights()
        return ops.linear_cross_entropy(self.hidden(ids, lengths), weight, targets, bias=bias, **options)

    def hidden(self, ids, lengths=None):
        """What the output projection reads, after the last norm: [B, T, d]."""
        raise NotImplementedError(f"{type(self).__name__} has no hidden()")

    def output_weights(self):
        """(weight [V, d], bias [V] or None) of the output projection; the embedding's own weight where it is tied."""
        raise NotImplementedError(f"{type(self).__name__} has no output_weights()")

    @property
    def width(self) -> int:
        """d, the size of hidden()."""
        return self.config.width

    def num_parameters(self, trainable_only: bool = False) -> int:
        """How many numbers are learned; a weight that serves twice counts once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    def step_modules(self) -> list[nn.Module]:
        """The parts whose weights step() reads."""
        return [self]

    def weight_bytes(self) -> int:
        """Bytes of weights that one step() reads: all but the embeddings, of which it looks up a few rows."""
        read = {id(p): p for m in self.step_modules() for p in m.parameters()}
        for m in self.modules():
            if isinstance(m, nn.Embedding):
                read.pop(id(m.weight), None)
        read |= {id(p): p for p in self.output_weights() if p is not None}
        return sum(p.numel() * p.element_size() for p in read.values())

    def save(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and, if there is a tokenizer, tokenizer.json, each atomically."""
        folder = files.make_folder(folder)
        files.write_json(folder / "config.json", self.config.to_dict())
        files.write_tensors(folder / "model.safetensors", files.tensors_of(self))
        if self.tokenizer is not None:
            self.tokenizer.save(folder / "tokenizer.json")


def empty_model(config: Config, path: Path) -> Model:
    """The model of `config` with memory for its weights and nothing in it; path: the file that asked for it."""
    try:
        with torch.device("meta"):  # buffers, which are computed, name their device
            return MODELS[config.model](config)
    except (RuntimeError, TypeError) as error:  # a size that no tensor can have
        raise CheckpointError(f"{path}: no model can be made of it: {error}") from error


def check_tokenizer(model: Model, path: Path) -> None:
    """A tokenizer may have fewer tokens than the embedding has rows, never more."""
    tokens = model.tokenizer.vocab_size
    if tokens > model.config.vocab:
        raise CheckpointError(
            f"{path}: it has {tokens} tokens, but the model's embedding has {model.config.vocab} rows"
        )


def _fits(hint, value) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint) and not isinstance(value, bool)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(h, value) for h in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (tuple, list)) and all(_fits(typing.get_args(hint)[0], v) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_describe, typing.get_args(hint)))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", type(None): "None"}
    return names.get(hint, str(getattr(hint, "__name__", hint)))
