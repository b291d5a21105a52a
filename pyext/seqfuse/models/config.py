"""Configs: frozen dataclasses of plain values, read from and written to config.json, wrong values refused by name."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from typing import ClassVar, Literal, Self

MODELS: dict[str, type] = {}  # what "model" in a config.json may name; every subclass of base.Model enters itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Values of the types that the fields are annotated with; numbers are finite and not negative.

    A value of a wrong type or out of range raises ValueError with one sentence; so does an unknown key in from_dict.
    """

    def __post_init__(self):
        for name, hint in _hints(type(self)).items():
            value = getattr(self, name)
            self.require(_fits(hint, value), f"{name} must be {_describe(hint)}, got {value!r}")
            if isinstance(value, (int, float)):
                self.require(abs(value) < math.inf, f"{name} must be finite, got {value!r}")
                self.require(value >= 0, f"{name} must not be negative, got {value!r}")

    def require(self, holds: bool, sentence: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}: {sentence}")

    def positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self.require(value is None or value > 0, f"{name} must be positive, got {value!r}")

    def to_dict(self) -> dict:
        """Plain values that from_dict takes, as JSON gives them back."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__}: keys and values are wanted, got {values!r}")
        fields, hints = {f.name: f for f in dataclasses.fields(cls)}, _hints(cls)
        for key in values:
            if key not in fields:
                raise ValueError(f"{cls.__name__}: {unknown_key(key, fields)}")
        for name, field in fields.items():
            if name not in values and field.default is field.default_factory is dataclasses.MISSING:
                raise ValueError(f"{cls.__name__}: the key {name!r} is missing")
        return cls(**{name: _read(hints[name], value) for name, value in values.items()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """What every model's config has.

    vocab: how many tokens there are. bos_id, eos_id, pad_id: tokens with a meaning, or None. more_eos_ids: further
    tokens that end a text. checkpoint: in training, compute the activations within a block again in the backward pass
    instead of keeping them.
    """

    model: ClassVar[str]  # the name of the class that it configures
    encoder_decoder: ClassVar[bool] = False  # True: a source goes in and new tokens come out

    vocab: int
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    more_eos_ids: tuple[int, ...] = ()
    checkpoint: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name, value in vars(self).items():
            if value is None or not name.endswith(("_id", "_ids")):
                continue
            for token in value if isinstance(value, tuple) else (value,):
                there = 0 <= token < self.vocab
                self.require(there, f"{name} is {value}, but there are {self.vocab} tokens (vocab)")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All tokens that end a text."""
        return (*(() if self.eos_id is None else (self.eos_id,)), *self.more_eos_ids)

    def to_dict(self) -> dict:
        return {"model": self.model} | super().to_dict()

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        """The config of a model; Config.from_dict itself gives that of whichever model "model" names."""
        rest = dict(values) if isinstance(values, dict) else values
        name = rest.pop("model", None) if isinstance(rest, dict) else None
        if cls.__dict__.get("model") is not None:
            if name not in (None, cls.model):
                raise ValueError(f'{cls.__name__}: "model" must be {cls.model!r}, got {name!r}')
            return super().from_dict(rest)
        if not isinstance(name, str) or name not in MODELS:
            raise ValueError(f'"model" must be one of {", ".join(sorted(MODELS))}, got {name!r}')
        return MODELS[name].config_class.from_dict(rest)


def unknown_key(key: str, known: Iterable[str], listed: Iterable[str] | None = None) -> str:
    """A sentence about a key that there is not: perhaps which one was meant, and those that there are (`listed`, if
    `known` has more than one wants to read)."""
    known = list(known)
    meant = [k for k in known if k.endswith("." + key)] or difflib.get_close_matches(key, known, 1, 0.8)
    perhaps = f" (did you mean {meant[0]!r}?)" if meant else ""
    return f"unknown key {key!r}{perhaps}; there are {', '.join(sorted(known if listed is None else listed))}"


def _hints(cls) -> dict:
    hints = typing.get_type_hints(cls)
    return {name: hint for name, hint in hints.items() if typing.get_origin(hint) is not ClassVar}


def _plain(value):
    if isinstance(value, Settings):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def _read(hint, value):
    """What JSON gave for a field."""
    if isinstance(hint, type) and issubclass(hint, Settings):
        return hint.from_dict(value)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, list) and any(typing.get_origin(kind) is tuple for kind in kinds):
        return tuple(value)
    return value


def _fits(hint, value) -> bool:
    if typing.get_origin(hint) is Literal:
        return isinstance(value, (str, type(None))) and value in typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_fits(h, value) for h in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(typing.get_args(hint)[0], v) for v in value)
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
    if typing.get_origin(hint) is tuple:
        return f"a list, each of it {_describe(typing.get_args(hint)[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", type(None): "None"}
    return names.get(hint, f"a {getattr(hint, '__name__', hint)}")
