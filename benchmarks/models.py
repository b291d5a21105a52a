"""Whole training steps: forward, loss, backward, AdamW(fused=True). GPT-2 and Llama of Hugging Face's transformers with
random weights, and the demo's GRU encoder-decoder. Bound by matrix products.

Four builds compete: the plain model, torch.compile of it, seqfuse.fuse of it (language models with fuse_loss=True), and
torch.compile of that. The gate judges what a training run is for: each build trains from the same weights on the same
batches, and its losses must be those of float64 by the rule of seqfuse.testing. The first and the last batch have the
size that is timed; the others are smaller, for 200 steps in float64 take their time.
"""

import copy
import functools
import importlib.util
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import seqfuse
from seqfuse.benchmarks.harness import Contender
from seqfuse.benchmarks.registry import DTYPES, Case
from seqfuse.models import RNNSeq2Seq, RNNSeq2SeqConfig
from seqfuse.ops import products

STEPS, QUICK_STEPS = 200, 10  # of the loss curves
Batch = tuple[Tensor, Tensor]


@dataclass
class Training:
    """A case with its data: the model all builds start from, batches to time and batches to check (Problem's part)."""

    case: "TrainingStep"
    dtype: str
    model: torch.nn.Module
    samples: list[Batch]
    curve: list[Batch]

    def result_names(self, mode: str) -> list[str]:
        return list(self.case.outputs)

    def truth(self) -> list[Tensor]:
        """The losses of the plain model in float64, but for what transformers always computes in float32."""
        return self._losses(self.case.stepper(copy.deepcopy(self.model).double(), "fp32"))

    def _losses(self, step: Callable[[Batch], Tensor]) -> list[Tensor]:
        return [torch.stack([step(batch).detach() for batch in self.curve])]

    def contender(self, name: str, fused: bool, compiled: bool) -> Contender:
        """A build with a model and an optimizer of its own. The check must come first: it trains the same model."""
        model = copy.deepcopy(self.model)
        if fused:
            self.case.fuse(model)
        if compiled:
            model = torch.compile(model, dynamic=False)
        step = self.case.stepper(model, self.dtype)
        asked = "auto" if fused else ""
        scope = functools.partial(seqfuse.backend, "auto") if fused else torch.enable_grad
        check = functools.partial(self._losses, step)
        return Contender(name, lambda i: [step(self.samples[i]).detach()], scope, asked, check, captured=False)


@dataclass(frozen=True)
class TrainingStep(Case):
    """B sequences of T tokens."""

    B: int = 0
    T: int = 0
    modes: ClassVar[tuple[str, ...]] = ("step",)
    outputs: ClassVar[tuple[str, ...]] = ("losses",)
    eager_name: ClassVar[str] = "torch eager"

    def model(self) -> torch.nn.Module:
        """The plain model, float32, with random weights."""
        raise NotImplementedError

    def batch(self, B: int, device: str) -> Batch:
        """Inputs and what is to be predicted, of a kind that can be learned."""
        raise NotImplementedError

    def stepper(self, model: torch.nn.Module, dtype: str) -> Callable[[Batch], Tensor]:
        """step(batch) -> loss: one update of `model`."""
        raise NotImplementedError

    def fuse(self, model: torch.nn.Module) -> None:
        seqfuse.fuse(model)

    def parameter_dtype(self, dtype: str) -> torch.dtype:
        return DTYPES[dtype]

    @property
    def size(self) -> str:
        raise NotImplementedError

    @property
    def name(self) -> str:
        return f"{self.size}-T{self.T}-B{self.B}"

    @property
    def tokens_per_call(self) -> int:
        return self.B * self.T

    def dtypes(self, device: str) -> tuple[str, ...]:
        if device == "cuda":
            return ("bf16",)
        return ("fp32",) if products.SLOW_BF16 else ("fp32", "bf16")  # there ATen's products take minutes

    def build(self, device: str, dtype: str, sets: int = 1, quick: bool = False) -> Training:
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(self.id.encode()))
            model = self.model().to(device=device, dtype=self.parameter_dtype(dtype))
            samples = [self.batch(self.B, device) for _ in range(sets)]
            steps = QUICK_STEPS if quick else STEPS
            small = [self.batch(max(self.B // 8, 1), device) for _ in range(steps - 2)]
        return Training(self, dtype, model, samples, [samples[0], *small, samples[-1]])

    def line_up(self, problem: Training, mode: str, backends: Sequence[str], compile: bool):
        refused = {
            f"seqfuse {b}": "a whole model has many ops, and none is tuned here: each takes what auto chooses"
            for b in backends
            if b != "auto"
        }
        if "auto" not in backends:
            return [], refused
        builds = [(self.eager_name, False, False), ("seqfuse", True, False)]
        if compile:
            torch._dynamo.reset()
            builds += [("torch.compile", False, True), ("seqfuse compiled", True, True)]
        return [problem.contender(*build) for build in builds], refused


@dataclass(frozen=True)
class DecoderStep(TrainingStep):
    """GPT2LMHeadModel or LlamaForCausalLM: width D, L layers, V words, no dropout; parameters in the dtype."""

    family: str = "gpt2"
    D: int = 0
    L: int = 0
    heads: int = 0
    kv_heads: int = 0
    hidden: int = 0
    V: int = 0

    def missing(self) -> str | None:
        if importlib.util.find_spec("transformers") is None:
            return "decoder_step needs Hugging Face's transformers (pip install transformers), which is not installed"
        return None

    @property
    def size(self) -> str:
        return f"{self.family}-D{self.D}-L{self.L}-V{self.V}"

    def model(self) -> torch.nn.Module:
        import transformers

        ids = dict(bos_token_id=0, eos_token_id=0, use_cache=False)
        if self.family == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=self.V, n_positions=self.T, n_embd=self.D, n_layer=self.L, n_head=self.heads,
                n_inner=self.hidden, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ids,
            )  # fmt: skip
            return transformers.GPT2LMHeadModel(config)
        config = transformers.LlamaConfig(
            vocab_size=self.V, max_position_embeddings=self.T, hidden_size=self.D, num_hidden_layers=self.L,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, intermediate_size=self.hidden, **ids,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    def fuse(self, model: torch.nn.Module) -> None:
        seqfuse.fuse(model, fuse_loss=True)

    def batch(self, B: int, device: str) -> Batch:
        """Each token is its predecessor plus one of four steps, the same four in all batches."""
        steps = torch.tensor([1, 7, 41, 331], device=device)[torch.randint(0, 4, (B, self.T), device=device)]
        ids = (torch.randint(0, self.V, (B, 1), device=device) + steps.cumsum(1)) % self.V
        return ids, ids

    def stepper(self, model: torch.nn.Module, dtype: str) -> Callable[[Batch], Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

        def step(batch: Batch) -> Tensor:
            loss = model(input_ids=batch[0], labels=batch[1]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        return step

    def flops(self, mode: str) -> float:
        """Of the matrix products and of causal attention; backward is twice forward."""
        if self.family == "gpt2":
            layer = 4 * self.D**2 + 2 * self.D * self.hidden
        else:
            layer = 2 * self.D**2 * (1 + self.kv_heads / self.heads) + 3 * self.D * self.hidden
        attention = 2 * self.D * (self.T + 1) / 2  # a token sees half of the others: scores, and what they weigh
        return 6.0 * self.tokens_per_call * (self.L * (layer + attention) + self.D * self.V)

    def bytes(self, mode: str, itemsize: int) -> float:
        """The parameters and both moments in and out, the gradient in and out; activations can stay in caches."""
        return 8.0 * itemsize * (self.L * 12 * self.D**2 + self.D * self.V)


@dataclass(frozen=True)
class Seq2SeqStep(TrainingStep):
    """The model of recipes/g2p.py: B words of T letters and T phonemes, the demo's sizes; bf16 is autocast, as there.

    The learning rate is lower than there: at 2e-3, 200 steps of batches this small are chaotic, and the losses of
    runs in float32 and float64 differ by 5%; at 5e-5 by 6e-7, so that a wrong gradient shows.
    """

    H: int = 384
    E: int = 128
    letters: ClassVar[int] = 31
    phonemes: ClassVar[int] = 73

    @property
    def size(self) -> str:
        return f"g2p-H{self.H}"

    @property
    def tokens_per_call(self) -> int:
        return 2 * self.B * self.T

    def parameter_dtype(self, dtype: str) -> torch.dtype:
        return torch.float32

    def model(self) -> torch.nn.Module:
        config = RNNSeq2SeqConfig(
            vocab=self.phonemes, source_vocab=self.letters, cell="gru", embed=self.E, hidden=self.H, norm=True, bos_id=1
        )
        return seqfuse.unfuse(RNNSeq2Seq(config))

    def batch(self, B: int, device: str) -> Batch:
        """A phoneme for each letter."""
        source = torch.randint(4, self.letters, (B, self.T), device=device)  # behind the special tokens
        begin, end = (torch.full((B, 1), i, device=device) for i in (1, 2))
        return source, torch.cat([begin, 2 * source[:, 1:], end], dim=1)

    def stepper(self, model: torch.nn.Module, dtype: str) -> Callable[[Batch], Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)

        def step(batch: Batch) -> Tensor:
            source, target = batch
            with torch.autocast(source.device.type, torch.bfloat16, enabled=dtype == "bf16"):
                logits = model(source, target[:, :-1])  # (B, T, V)
                loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        return step

    def flops(self, mode: str) -> float:
        H, E, T = self.H, self.E, self.T
        encoder = 2 * 3 * (H / 2) * (E + H / 2)
        decoder = 3 * H * (E + H) + H * H + 2 * T * H + 2 * H * H + H * self.phonemes
        return 6.0 * self.B * T * (encoder + decoder)

    def bytes(self, mode: str, itemsize: int) -> float:
        return 8.0 * itemsize * (6 * self.H * self.H + 5 * self.H * self.E)


def _gpt2(D, L, heads, T, V, B, **options):
    sizes = dict(D=D, L=L, heads=heads, kv_heads=heads, hidden=4 * D, T=T, V=V, B=B)
    return DecoderStep("decoder_step", family="gpt2", **sizes, **options)


def _llama(D, L, heads, kv_heads, hidden, T, V, B, **options):
    sizes = dict(D=D, L=L, heads=heads, kv_heads=kv_heads, hidden=hidden, T=T, V=V, B=B)
    return DecoderStep("decoder_step", family="llama", **sizes, **options)


_CPU, _CUDA = dict(devices=("cpu",)), dict(devices=("cuda",))
CASES = (
    _gpt2(256, 4, 4, T=256, V=8192, B=4, quick=True, **_CPU),
    _gpt2(384, 6, 6, T=512, V=50257, B=2, **_CPU),
    _llama(256, 4, 4, 2, 704, T=512, V=8192, B=2, quick=True, **_CPU),
    _llama(384, 6, 6, 2, 1024, T=512, V=32000, B=2, **_CPU),
    _gpt2(768, 12, 12, T=1024, V=50257, B=16, quick=True, **_CUDA),  # 124M
    _llama(768, 12, 12, 12, 3072, T=1024, V=32000, B=16, **_CUDA),  # 160M
    _llama(2048, 16, 32, 8, 8192, T=2048, V=128256, B=4, **_CUDA),  # 1B
    Seq2SeqStep("seq2seq_step", B=64, T=8, quick=True),
    Seq2SeqStep("seq2seq_step", B=64, T=16),
    Seq2SeqStep("seq2seq_step", B=256, T=8),
)
