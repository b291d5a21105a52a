"""Greedy decoding of whole models: seqfuse.generate against the generate() of Hugging Face's transformers with a static
cache, with the same weights. Bound by memory: every token reads every weight once.

The gate: which tokens equal those that transformers finds in float64, by the rule of seqfuse.testing.
"""

import contextlib
import copy
import functools
import importlib.util
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

import seqfuse
from seqfuse.benchmarks.harness import Contender
from seqfuse.benchmarks.registry import DTYPES, Case


@dataclass
class Decoding:
    """A case with its data: one model twice, and prompts (Problem's part)."""

    case: "GreedyDecoding"
    theirs: torch.nn.Module
    ours: seqfuse.models.Model
    samples: list[torch.Tensor]
    exact: torch.Tensor | None = None  # ids that float64 finds for the first sample

    def result_names(self, mode: str) -> list[str]:
        return list(self.case.outputs)

    def truth(self) -> list[torch.Tensor]:
        self.exact = self.call_theirs(copy.deepcopy(self.theirs).double(), 0)[0]
        return [torch.ones(self.exact.shape, dtype=torch.float64)]

    def call_theirs(self, model: torch.nn.Module, i: int) -> list[torch.Tensor]:
        ids, everything = self.samples[i], torch.ones_like(self.samples[i])
        options = dict(max_new_tokens=self.case.new, do_sample=False, cache_implementation="static")
        return [model.generate(ids, attention_mask=everything, **options)]

    def call_ours(self, i: int) -> list[torch.Tensor]:
        return [seqfuse.generate(self.ours, self.samples[i], max_new_tokens=self.case.new, stop=())]

    def contender(self, name: str, call: Callable[[int], list[torch.Tensor]], asked: str = "") -> Contender:
        scope = functools.partial(seqfuse.backend, asked) if asked else contextlib.nullcontext
        return Contender(name, call, scope, asked, lambda: [(call(0)[0] == self.exact).float()], captured=False)


@dataclass(frozen=True)
class GreedyDecoding(Case):
    """GPT-2 of width D with L layers: B prompts of T tokens, `new` new ones."""

    D: int = 0
    L: int = 0
    heads: int = 0
    V: int = 0
    B: int = 0
    T: int = 64
    new: int = 128
    bound: ClassVar[str] = "memory"
    modes: ClassVar[tuple[str, ...]] = ("generate",)
    outputs: ClassVar[tuple[str, ...]] = ("equal tokens",)
    eager_name: ClassVar[str] = "transformers, static"

    @property
    def name(self) -> str:
        return f"gpt2-D{self.D}-L{self.L}-V{self.V}-B{self.B}-T{self.T}-new{self.new}"

    @property
    def tokens_per_call(self) -> int:
        return self.B * self.new

    def missing(self) -> str | None:
        if importlib.util.find_spec("transformers") is None:
            return "decode needs Hugging Face's transformers (pip install transformers), which is not installed"
        return None

    def dtypes(self, device: str) -> tuple[str, ...]:
        return ("fp32",)  # two roundings of bfloat16 soon choose different tokens

    def _weights(self) -> float:
        return self.L * 12 * self.D**2 + self.D * self.V

    def flops(self, mode: str) -> float:
        return 2.0 * self.B * (self.new + self.T) * self._weights()

    def bytes(self, mode: str, itemsize: int) -> float:
        return float(itemsize * self.new * self._weights())

    def build(self, device: str, dtype: str, sets: int = 1, quick: bool = False) -> Decoding:
        import transformers

        with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(zlib.crc32(self.id.encode()))
            config = transformers.GPT2Config(
                vocab_size=self.V, n_embd=self.D, n_layer=self.L, n_head=self.heads, bos_token_id=0, eos_token_id=None,
                pad_token_id=0,
            )  # fmt: skip
            theirs = transformers.GPT2LMHeadModel(config).eval()
            theirs.save_pretrained(folder)
            ours = seqfuse.models.load(folder).eval()
            samples = [torch.randint(0, self.V, (self.B, self.T), device=device) for _ in range(sets)]
        theirs, ours = (model.to(device=device, dtype=DTYPES[dtype]) for model in (theirs, ours))
        return Decoding(self, theirs, ours, samples)

    def line_up(self, problem: Decoding, mode: str, backends: Sequence[str], compile: bool):
        if "auto" not in backends:
            reason = "a whole model has many ops, and none is tuned here: each takes what auto chooses"
            return [], {f"seqfuse {name}": reason for name in backends}
        theirs = functools.partial(problem.call_theirs, problem.theirs)
        return [problem.contender(self.eager_name, theirs), problem.contender("seqfuse", problem.call_ours, "auto")], {}


CASES = (
    GreedyDecoding("decode", D=768, L=12, heads=12, V=50257, B=1),
    GreedyDecoding("decode", D=768, L=12, heads=12, V=50257, B=8),
    GreedyDecoding("decode", D=256, L=4, heads=4, V=8192, B=1, T=16, new=32, quick=True),
)
