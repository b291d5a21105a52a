"""What every model has in common: a frozen config, a folder to live in, and how large it is.

model = Decoder(DecoderConfig(vocab=50257, width=768, layers=12, heads=12))
model.save("DIR")               # config.json, model.safetensors, tokenizer.json if it has one
model = seqfuse.models.load("DIR")
"""

from pathlib import Path
from typing import Self

import torch
from torch import nn

from seqfuse import ops
from seqfuse.models import files
from seqfuse.models.config import MODELS, Config
from seqfuse.models.files import CheckpointError
from seqfuse.models.projections import multiply
from seqfuse.ops.autograd import traced
from seqfuse.ops.checks import describe

TOKENIZERS = {"tokenizer": "tokenizer.json", "source_tokenizer": "source_tokenizer.json"}


class Model(nn.Module):
    """A model with a config, weights and perhaps a tokenizer, and another one for a source with a vocabulary of its own
    (source_tokenizer). A subclass names its config_class.

    Subclasses give hidden(ids [B, T], lengths=None) -> [B, T, d] and output_weights(); models that generate also
    begin(ids, lengths, capacity) and step(ids, cache). Rows are padded on the right; lengths: int64 [B], or None where
    no row is padded.
    """

    config_class: type[Config]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "config_class" in vars(cls):  # else it is what several models share
            MODELS[cls.__name__] = cls

    def __init__(self, config: Config):
        super().__init__()
        if type(config) is not self.config_class:
            wanted = self.config_class.__name__
            raise TypeError(
                f"{type(self).__name__}: config must be a {wanted}, got {config!r}; from_config takes dicts"
            )
        self.config = config
        self.tokenizer = self.source_tokenizer = None

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
        return multiply(self.hidden(ids, lengths), weight, bias)

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

    def save(self, folder: str | Path, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Write config.json, model.safetensors and the tokenizers that there are, each atomically.

        tensors: instead of the model's own, by the same names, where those are spread over processes.
        """
        folder = files.make_folder(folder)
        files.write_json(folder / "config.json", self.config.to_dict())
        files.write_tensors(folder / "model.safetensors", files.tensors_of(self) if tensors is None else tensors)
        self.save_tokenizers(folder)

    def save_tokenizers(self, folder: Path) -> None:
        for name, file in TOKENIZERS.items():
            if getattr(self, name) is not None:
                getattr(self, name).save(folder / file)


def empty_model(config: Config, path: Path) -> Model:
    """The model of `config` with memory for its weights and nothing in it; path: the file that asked for it."""
    try:
        with torch.device("meta"):  # a module's make_tables() is called again by files.fill()
            return MODELS[config.model](config)
    except (RuntimeError, TypeError) as error:  # a size that no tensor can have
        raise CheckpointError(f"{path}: no model can be made of it: {error}") from error


def check_ids(model: Model, ids, lengths=None, name: str = "ids", vocab: int | None = None) -> None:
    """One sentence for tokens that the model does not take; their numbers are looked at on a CPU only."""
    who, longest = type(model).__name__, getattr(model.config, "max_positions", None)
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64 or ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"{who}: {name} must be an int64 tensor of shape [B, T], not empty, got {describe(ids)}")
    B, T = ids.shape
    if longest is not None and T > longest:
        raise ValueError(f"{who}: {T} tokens are more than the {longest} that it has positions for")
    if lengths is not None and (
        not isinstance(lengths, torch.Tensor) or lengths.dtype != torch.int64 or lengths.shape != (B,)
    ):
        raise ValueError(f"{who}: lengths must be an int64 tensor of shape [{B}], got {describe(lengths)}")
    if traced() or not ids.is_cpu:
        return
    for what, numbers, least, most in ((name, ids, 0, (vocab or model.config.vocab) - 1), ("lengths", lengths, 1, T)):
        if numbers is None:
            continue
        low, high = (int(n) for n in numbers.aminmax())
        if low < least or high > most:
            raise ValueError(f"{who}: {what} must lie in {least} to {most}, got {low} to {high}")


def check_capacity(model: Model, capacity: int | None, needed: int) -> None:
    """Whether a cache of so many tokens has room for those that there are, and the model positions for them."""
    longest = model.config.max_positions
    if capacity is not None and not needed <= capacity <= longest:
        who = type(model).__name__
        raise ValueError(f"{who}: capacity must be {needed} to {longest} (max_positions), got {capacity}")


def check_tokenizer(model: Model, name: str, path: Path) -> None:
    """A tokenizer may have fewer tokens than the embedding has rows, never more."""
    tokens, rows = getattr(model, name).vocab_size, model.config.vocab
    if name == "source_tokenizer":
        rows = getattr(model.config, "source_vocab", None) or rows
    if tokens > rows:
        raise CheckpointError(f"{path}: it has {tokens} tokens, but the model's embedding has {rows} rows")
