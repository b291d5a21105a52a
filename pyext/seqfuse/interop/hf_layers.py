"""Hugging Face transformers: RMSNorm, gated MLPs, GELU, Conv1D and the loss of causal language models, for fuse().

As with torch.nn's modules a module changes its class, here to one made of the original and of a class below; so it
keeps its name, its Parameters and its projections (plain nn.Linear, which PEFT may wrap). Classes are known by name,
because others that look alike compute something else; transformers is not imported before a model is there.
"""

import functools
import sys

import torch
import torch.nn.functional as F
from torch import nn

from seqfuse import explanation, ops
from seqfuse.nn.linear import Linear
from seqfuse.ops.linear import compiled_pays, ever_pays

RMS_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "T5LayerNorm"}
ZERO_CENTERED_RMS_NORMS = {"GemmaRMSNorm", "Gemma2RMSNorm"}
MLPS = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "Gemma2MLP"}
TANH_GELUS = {"NewGELUActivation", "FastGELUActivation"}  # written out there, each step a pass over the memory
CAUSAL_LMS = {"GPT2LMHeadModel", "LlamaForCausalLM"}
_ACTIVATIONS = {
    "SiLU": ops.swiglu,
    "SiLUActivation": ops.swiglu,
    "GELUActivation": ops.geglu,
    "GELUTanh": functools.partial(ops.geglu, approximate="tanh"),
}


class _Fused:
    """What the classes below have in common. Copies and pickles name the original class, for this one has no module."""

    def __reduce__(self):
        return _remake, (type(self).original, type(self).fused), self.__dict__


class _RMSNorm(_Fused):
    centered = False

    def forward(self, hidden_states):
        if self.weight.dtype != hidden_states.dtype:  # each family has its own rule for the result's dtype
            explanation.handed_over(self, "input and weight have different dtypes")
            return super().forward(hidden_states)
        explanation.entering(self)
        eps = self.eps if self.centered else self.variance_epsilon
        return ops.rms_norm(hidden_states, self.weight, eps=eps, zero_centered=self.centered)


class _ZeroCenteredRMSNorm(_RMSNorm):
    centered = True


class _GatedMLP(_Fused):
    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        explanation.entering(self)
        return self.down_proj(_ACTIVATIONS[type(self.act_fn).__name__](gate, up))


class _TanhGELU(_Fused):
    def forward(self, input):
        return F.gelu(input, approximate="tanh")


class _Conv1D(_Fused):
    """GPT-2's linear layer, whose weight is stored [inputs, outputs]."""

    def forward(self, x):
        if torch.compiler.is_compiling():
            if not x.is_cpu or not compiled_pays(x.dtype, *self.weight.shape):
                return super().forward(x)
        elif type(x) is not torch.Tensor or not x.is_cpu:
            return super().forward(x)
        explanation.entering(self)
        return ops.linear(x, self.weight.t(), self.bias)


class _CausalLM(_Fused):
    """With labels the loss comes from ops.linear_cross_entropy, and logits are None; without them nothing changes."""


def _forward_with_loss(original):
    @functools.wraps(original.forward)
    def forward(self, *args, labels=None, **kwargs):
        head, kept = self.get_output_embeddings(), kwargs.get("logits_to_keep", 0)
        keeps_all = isinstance(kept, int) and kept == 0
        plain_head = type(head) in (nn.Linear, Linear) and not head._forward_hooks and not head._forward_pre_hooks
        if labels is None or len(args) > 1 or not (keeps_all and plain_head) or hasattr(self, "_loss_function"):
            return original.forward(self, *args, labels=labels, **kwargs)
        kwargs.pop("logits_to_keep", None)
        count, target = (kwargs.pop(name, None) for name in ("num_items_in_batch", "shift_labels"))
        ignored, as_dict = kwargs.pop("ignore_index", -100), kwargs.pop("return_dict", None)
        hidden = self.base_model(*args, **kwargs)
        if target is None:  # tokens up to n predict n + 1
            target = F.pad(labels, (0, 1), value=ignored)[..., 1:]
        explanation.entering(self)
        loss = ops.linear_cross_entropy(hidden.last_hidden_state, head.weight, target.to(head.weight.device),
                                        bias=head.bias, ignore_index=ignored,
                                        reduction="mean" if count is None else "sum")  # fmt: skip
        if count is not None:
            loss = loss / (count.to(loss.device) if isinstance(count, torch.Tensor) else count)
        from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions as Output

        rest = {name: value for name, value in hidden.items() if name in Output.__dataclass_fields__}
        out = Output(loss=loss, logits=None, **rest)
        return out.to_tuple() if as_dict is False else out

    return forward


@functools.cache
def _fused_class(original: type, fused: type) -> type:
    members = {"original": original, "fused": fused, "__module__": original.__module__, "__doc__": original.__doc__}
    if fused is _CausalLM:
        members["forward"] = _forward_with_loss(original)
    return type(original.__name__, (fused, original), members)


def _remake(original, fused):
    return (cls := _fused_class(original, fused)).__new__(cls)


def fused_class(module: nn.Module, fuse_loss: bool) -> type | None:
    """The class that takes the place of the module's, or None where there is none."""
    cls = type(module)
    if "transformers" not in sys.modules or not cls.__module__.startswith("transformers."):
        return None
    if issubclass(cls, _Fused):
        return None
    if cls.__name__ in RMS_NORMS:
        return _fused_class(cls, _RMSNorm)
    if cls.__name__ in ZERO_CENTERED_RMS_NORMS:
        return _fused_class(cls, _ZeroCenteredRMSNorm)
    if cls.__name__ in MLPS and type(module.act_fn).__name__ in _ACTIVATIONS:
        return _fused_class(cls, _GatedMLP)
    if cls.__name__ in TANH_GELUS:
        return _fused_class(cls, _TanhGELU)
    if cls.__name__ == "Conv1D" and ever_pays(module.weight.t()):
        return _fused_class(cls, _Conv1D)
    if fuse_loss and cls.__name__ in CAUSAL_LMS:
        return _fused_class(cls, _CausalLM)
    return None


def has_its_loss(module: nn.Module) -> bool:
    """Whether the module is a causal language model whose loss can be fused."""
    return type(module).__name__ in CAUSAL_LMS and type(module).__module__.startswith("transformers.")


def has_a_loss_to_fuse(model: nn.Module) -> bool:
    return any(has_its_loss(m) for m in model.modules())


def original_class(module: nn.Module) -> type | None:
    """The class that the module had, or None if it was not fused here."""
    return type(module).original if issubclass(type(module), _Fused) else None
