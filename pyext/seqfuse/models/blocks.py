"""The parts that all transformers here are built from: norm, attention, MLP, a block of them, and a stack of blocks.

    tokens -> embedding (+ position) -> block -> block -> ... -> norm -> hidden states

A branch (attention, MLP) and the residual stream it is added to travel apart until the next norm, which drops out, adds
and normalises in one pass over memory. Nothing here knows which backend an op runs on.

B sequences, T tokens, d width, H heads, Hkv heads of keys and values, D width of a head, F width of the MLP.
"""

import dataclasses
import math
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from seqfuse import explanation, ops
from seqfuse.models.cache import KVCache
from seqfuse.models.config import Config
from seqfuse.models.positions import RopeSettings, Rotary, Sinusoidal
from seqfuse.models.projections import project

GATED = {
    "swiglu": ops.swiglu,
    "geglu": ops.geglu,
    "geglu_tanh": partial(ops.geglu, approximate="tanh"),
}
PLAIN = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu}
MOST_LAYERS, MOST_POSITIONS = 10_000, 1 << 21  # a damaged config.json is not to take an hour, or all memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig(Config):
    """The shape of a stack of blocks.

    kv_heads: heads of keys and values (None: as many as heads). head_width: None for width / heads. mlp_width: None for
    4 * width. norm_first: norm before each branch (GPT-2, Llama) or after the sum (Vaswani, BERT). max_positions: the
    longest sequence. scale_embeddings: by sqrt(width). embedding_norm: a norm after the embeddings. dropout: of
    embeddings and branches; attention_dropout: of attention weights.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int | None = None
    head_width: int | None = None
    mlp_width: int | None = None
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu", "geglu_tanh"] = "gelu"
    norm: Literal["layer", "rms"] = "layer"
    norm_first: bool = True
    eps: float = 1e-5
    attention_bias: bool = True
    mlp_bias: bool = True
    positions: Literal["learned", "sinusoidal", "rope"] = "learned"
    max_positions: int = 1024
    rope: RopeSettings = RopeSettings()
    scale_embeddings: bool = False
    embedding_norm: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self.positive(
            "vocab", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "max_positions", "eps"
        )
        for name, most in (("layers", MOST_LAYERS), ("max_positions", MOST_POSITIONS)):
            self.require(getattr(self, name) <= most, f"{name} must be at most {most}, got {getattr(self, name)}")
        divides = self.head_width or self.width % self.heads == 0
        self.require(divides, f"width must be a multiple of heads, got {self.width} and {self.heads}")
        grouped = self.heads % self.Hkv == 0
        self.require(grouped, f"heads must be a multiple of kv_heads, got {self.heads} and {self.Hkv}")
        self.require(self.positions != "rope" or self.D % 2 == 0, f"rope turns pairs: a head has {self.D} elements")
        for name in ("dropout", "attention_dropout"):
            self.require(getattr(self, name) < 1, f"{name} must be below 1, got {getattr(self, name)}")

    @property
    def Hkv(self) -> int:
        return self.kv_heads or self.heads

    @property
    def D(self) -> int:
        return self.head_width or self.width // self.heads

    @property
    def F(self) -> int:
        return self.mlp_width or 4 * self.width


class Norm(nn.Module):
    """LayerNorm or RMSNorm; with a residual, dropout and the addition in the same pass."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.width))
        self.bias = nn.Parameter(torch.zeros(config.width)) if config.norm == "layer" else None
        self.eps, self.dropout = config.eps, config.dropout

    def forward(self, x, residual=None):
        """(norm(s), s) with s = dropout(x) + residual, or without a residual s = x. All (B, T, d)."""
        explanation.entering(self)
        options = {"eps": self.eps}
        if residual is not None:
            x = x.to(residual.dtype)  # under autocast a branch ends in 16 bits, what it is added to has 32
            options |= {"residual": residual, "dropout_p": self.dropout if self.training else 0.0}
        if self.bias is None:
            y = ops.rms_norm(x, self.weight, **options)
        else:
            y = ops.layer_norm(x, self.weight, self.bias, **options)
        return (y, x) if residual is None else y  # with a residual the op returns both


class Context(NamedTuple):
    """What all blocks of one call share. lengths, source_lengths: int64 (B,), or None where no row is padded."""

    lengths: torch.Tensor | None = None
    memory: torch.Tensor | None = None  # (B, Ts, d), what the encoder made of the source
    source_lengths: torch.Tensor | None = None
    cache: KVCache | None = None  # in generation
    positions: torch.Tensor | None = None  # int64 (B, T), or None: from 0 on


_WHOLE = Context()  # sequences from their first token on, without padding


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself, with grouped keys and values (GQA) where Hkv < H."""

    def __init__(self, config: BlockConfig, layer: int, causal: bool):
        super().__init__()
        self.layer, self.causal, self.dropout = layer, causal, config.attention_dropout
        self.D, self.sizes = config.D, [h * config.D for h in (config.heads, config.Hkv, config.Hkv)]
        self.qkv = nn.Linear(config.width, sum(self.sizes), bias=config.attention_bias)
        self.out = nn.Linear(self.sizes[0], config.width, bias=config.attention_bias)

    def heads(self, x, context, rotary=None):
        """x (B, T, d) -> queries (B, H, T, D), keys and values (B, Hkv, T, D)."""
        q, k, v = project(self.qkv, x).split(self.sizes, dim=-1)  # (B, T, H D), (B, T, Hkv D) twice
        q, k, v = (t.unflatten(-1, (-1, self.D)).transpose(1, 2) for t in (q, k, v))
        if rotary is not None:
            q, k = rotary(q, k, context.positions)
        return q, k, v

    def forward(self, x, context, rotary=None):
        """x (B, T, d) -> (B, T, d)."""
        q, k, v = self.heads(x, context, rotary)
        explanation.entering(self)
        if context.cache is not None:
            y = context.cache.attend(self.layer, q, k, v)  # (B, H, T, D)
        else:
            lengths = None if self.causal else context.lengths  # padding stands behind every query that counts
            dropout = self.dropout if self.training else 0.0
            y = ops.attention(q, k, v, causal=self.causal, key_lengths=lengths, dropout_p=dropout)  # (B, H, T, D)
        return project(self.out, y.transpose(1, 2).flatten(2))  # (B, T, d)


class CrossAttention(nn.Module):
    """Attention of a decoder to what the encoder made of the source (Ts tokens)."""

    def __init__(self, config: BlockConfig, layer: int):
        super().__init__()
        self.layer, self.D, self.dropout = layer, config.D, config.attention_dropout
        self.q = nn.Linear(config.width, config.heads * self.D, bias=config.attention_bias)
        self.kv = nn.Linear(config.width, 2 * config.Hkv * self.D, bias=config.attention_bias)
        self.out = nn.Linear(config.heads * self.D, config.width, bias=config.attention_bias)

    def keys_and_values(self, memory):
        """memory (B, Ts, d) -> (B, Hkv, Ts, D) twice. In generation once for a source, not once for a token."""
        k, v = project(self.kv, memory).chunk(2, dim=-1)  # (B, Ts, Hkv D) twice
        return k.unflatten(-1, (-1, self.D)).transpose(1, 2), v.unflatten(-1, (-1, self.D)).transpose(1, 2)

    def queries(self, x):
        """x (B, T, d) -> (B, H, T, D)."""
        return project(self.q, x).unflatten(-1, (-1, self.D)).transpose(1, 2)

    def forward(self, x, context):
        """x (B, T, d) -> (B, T, d)."""
        q = self.queries(x)
        explanation.entering(self)
        if context.cache is not None:
            y = context.cache.attend_source(self.layer, q)  # (B, H, T, D)
        else:
            k, v = self.keys_and_values(context.memory)
            dropout = self.dropout if self.training else 0.0
            y = ops.attention(q, k, v, key_lengths=context.source_lengths, dropout_p=dropout)  # (B, H, T, D)
        return project(self.out, y.transpose(1, 2).flatten(2))  # (B, T, d)


class MLP(nn.Module):
    """Two layers, or three where the activation is gated (Shazeer 2020): then gate and up are one matrix."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.activation, self.gated = config.activation, config.activation in GATED
        self.up = nn.Linear(config.width, config.F * (2 if self.gated else 1), bias=config.mlp_bias)
        self.down = nn.Linear(config.F, config.width, bias=config.mlp_bias)

    def forward(self, x):
        """x (B, T, d) -> (B, T, d)."""
        h = project(self.up, x)  # (B, T, F), gated: (B, T, 2 F)
        if self.gated:
            explanation.entering(self)
            h = GATED[self.activation](*h.chunk(2, dim=-1))  # (B, T, F)
        else:
            h = PLAIN[self.activation](h)
        return project(self.down, h)  # (B, T, d)


class Block(nn.Module):
    """Attention, perhaps attention to a source, and an MLP, each with its residual connection and norm."""

    def __init__(self, config: BlockConfig, layer: int, causal: bool, cross: bool):
        super().__init__()
        self.norm_first = config.norm_first
        self.norm1, self.attention = Norm(config), Attention(config, layer, causal)
        self.norm2, self.mlp = Norm(config), MLP(config)
        if cross:
            self.norm_cross, self.cross = Norm(config), CrossAttention(config, layer)
        self.has_cross = cross

    def forward(self, x, residual, context, rotary=None):
        """x: the last branch, or the embeddings; residual: what x is yet to be added to, or None. Both anew."""
        if self.norm_first:  # GPT-2, Llama: the residual stream itself is never normalised
            x, residual = self.norm1(x, residual)
            x = self.attention(x, context, rotary)
            if self.has_cross:
                x, residual = self.norm_cross(x, residual)
                x = self.cross(x, context)
            x, residual = self.norm2(x, residual)
            return self.mlp(x), residual
        x, _ = self.norm1(self.attention(x, context, rotary), x)  # Vaswani, BERT, BART: every sum is normalised
        if self.has_cross:
            x, _ = self.norm_cross(self.cross(x, context), x)
        x, _ = self.norm2(self.mlp(x), x)
        return x, None


class Stack(nn.Module):
    """Embeddings, blocks, and the last norm where norms come first."""

    def __init__(self, config: BlockConfig, *, causal: bool, cross: bool = False, layers: int | None = None,
                 vocab: int | None = None, token_types: int = 0):  # fmt: skip
        super().__init__()
        layers = layers or config.layers
        self.config = config
        self.embedding = nn.Embedding(vocab or config.vocab, config.width)
        self.position = {
            "learned": lambda: nn.Embedding(config.max_positions, config.width),
            "sinusoidal": lambda: Sinusoidal(config.max_positions, config.width),
            "rope": lambda: None,
        }[config.positions]()
        self.rotary = Rotary(config.rope, config.D, config.max_positions) if config.positions == "rope" else None
        self.token_type = nn.Embedding(token_types, config.width) if token_types else None
        self.embedding_norm = Norm(config) if config.embedding_norm else None
        self.blocks = nn.ModuleList([Block(config, i, causal, cross) for i in range(layers)])
        self.norm = Norm(config) if config.norm_first else None
        self.initialise()

    def initialise(self):
        """GPT-2's: normal with deviation 0.02, smaller by sqrt(branches) where a branch ends in the residual stream."""
        branches = len(self.blocks) * (3 if self.blocks[0].has_cross else 2)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                ends = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(branches) if ends else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if self.config.scale_embeddings:  # scaled up, they then have deviation 1
            nn.init.normal_(self.embedding.weight, std=self.config.width**-0.5)

    def embed(self, ids, positions=None, types=None):
        """ids (B, T) -> (B, T, d)."""
        x = self.embedding(ids)  # (B, T, d)
        if self.config.scale_embeddings:
            x = x * math.sqrt(self.config.width)
        if self.position is not None:
            where = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
            x = x + self.position(where).to(x.dtype)  # (T, d) or (B, T, d)
        if self.token_type is not None:
            x = x + self.token_type(torch.zeros_like(ids) if types is None else types)  # (B, T, d)
        if self.embedding_norm is not None:
            x, _ = self.embedding_norm(x)
        return F.dropout(x, self.config.dropout, self.training)

    def forward(self, ids, context=_WHOLE, types=None):
        """ids, types (B, T) -> hidden states (B, T, d)."""
        x, residual = self.embed(ids, context.positions, types), None
        again = self.config.checkpoint and torch.is_grad_enabled()
        for block in self.blocks:
            if again:
                x, residual = checkpoint(block, x, residual, context, self.rotary, use_reentrant=False)
            else:
                x, residual = block(x, residual, context, self.rotary)
        return x if self.norm is None else self.norm(x, residual)[0]
