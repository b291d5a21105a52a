"""fuse(model): replace what seqfuse has kernels for, in place; unfuse(model): back again.

A module is not replaced by a copy but changes its class: the object, its Parameters, buffers, hooks, and whoever holds
a reference to it (a second parent, an optimizer) stay the same, and so do the keys of its state_dict. RULES is the
whole list; a later op adds a line.
"""

import fnmatch
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch.nn.utils import parametrize

from seqfuse import explanation, nn
from seqfuse.interop import hf_attention, hf_layers
from seqfuse.nn.linear import pays as linear_pays


def _nothing(module) -> None:
    return None


def _always(module) -> bool:
    return True


class Rule(NamedTuple):
    """original <-> fused: two classes with the same attributes. after_*: mends what is not shared. pays: whether the
    module gains anything from it here."""

    original: type
    fused: type
    after_fuse: Callable[[torch.nn.Module], None] = _nothing
    after_unfuse: Callable[[torch.nn.Module], None] = _nothing
    pays: Callable[[torch.nn.Module], bool] = _always


def _drop_flat_weights(module):
    # torch keeps a second list of the weights for cuDNN; it would go stale here
    for name in ("_flat_weights", "_flat_weight_refs"):
        module.__dict__.pop(name, None)


def _restore_flat_weights(module):
    module.__dict__.update(_flat_weights=[], _flat_weight_refs=[])
    module._init_flat_weights()


RULES = [
    Rule(torch.nn.LSTM, nn.LSTM, _drop_flat_weights, _restore_flat_weights),
    Rule(torch.nn.GRU, nn.GRU, _drop_flat_weights, _restore_flat_weights),
    Rule(torch.nn.RNN, nn.RNN, _drop_flat_weights, _restore_flat_weights),
    Rule(torch.nn.LSTMCell, nn.LSTMCell),
    Rule(torch.nn.GRUCell, nn.GRUCell),
    Rule(torch.nn.RNNCell, nn.RNNCell),
    Rule(torch.nn.LayerNorm, nn.LayerNorm),
    Rule(torch.nn.MultiheadAttention, nn.MultiheadAttention),
    Rule(torch.nn.TransformerEncoderLayer, nn.TransformerEncoderLayer),
    Rule(torch.nn.TransformerDecoderLayer, nn.TransformerDecoderLayer),
    Rule(torch.nn.RMSNorm, nn.RMSNorm),
    Rule(torch.nn.Linear, nn.Linear, pays=linear_pays),
]


def fuse(
    model: torch.nn.Module,
    include: Iterable[str | type] | None = None,
    exclude: Iterable[str | type] | None = None,
    fuse_loss: bool = False,
) -> torch.nn.Module:
    """Put seqfuse's kernels under every torch.nn.LSTM, GRU, RNN, their cells, LayerNorm, RMSNorm, MultiheadAttention
    and TransformerEncoderLayer / DecoderLayer of `model`, and under each Linear that is faster with them on this
    processor, in place; returns `model`.

    include, exclude: paths as in named_modules() (with * and ?), which stand for all that is in the module there, or
    module classes. A module with several paths goes by any of them. Without include, everything.
    Hugging Face models (without include) change their attention implementation to "seqfuse", unless their class is in
    exclude; RMSNorm, gated MLPs and GPT-2's Conv1D of the families in interop/hf_layers.py are replaced like torch.nn's
    modules.
    fuse_loss: GPT2LMHeadModel and LlamaForCausalLM, called with labels, compute the loss without ever holding the
    logits, and return logits=None, whatever `include` says. Raises ValueError where the model has neither.
    Same Parameter objects, same state_dict keys, hooks kept; outputs agree within the numerics policy. Subclasses of
    these classes and scripted modules are left alone. A module already fused stays as it is.
    """
    everything = include is None
    include, exclude = _listed("include", include), _listed("exclude", exclude)
    wanted, unwanted = _matcher(include), _matcher(exclude)
    rules = {rule.original: rule for rule in RULES}
    modules = _modules(model, "fuse")
    paths = _paths(model)
    for name, patterns in (("include", include), ("exclude", exclude)):
        _warn_of_strangers(name, patterns, paths)
    if fuse_loss and not hf_layers.has_a_loss_to_fuse(model):
        known = " and ".join(sorted(hf_layers.CAUSAL_LMS))
        raise ValueError(
            f"fuse: fuse_loss=True knows the loss of {known}, and {type(model).__name__} has neither in it"
        )
    for _, module in modules:
        rule = rules.get(_plain_class(module))
        if (fused := hf_layers.fused_class(module, fuse_loss)) is not None:
            rule = Rule(type(module), fused)
        is_loss = hf_layers.has_its_loss(module)
        if rule is None or "forward" in module.__dict__ or not rule.pays(module):
            continue
        classes = rule.original, rule.fused
        if not (everything or is_loss or wanted(paths[module], classes)) or unwanted(paths[module], classes):
            continue
        _change_class(module, rule.fused)
        rule.after_fuse(module)
    hf_attention.fuse(model, lambda part: everything and not unwanted(paths[part], (type(part),)))
    return model


def unfuse(model: torch.nn.Module) -> torch.nn.Module:
    """Turn every module that fuse replaced (or seqfuse.nn made) back into torch's, in place; returns `model`.

    A module with something that torch.nn has not (zoneout, heads, ...) stays what it is, with a warning.
    """
    rules = {rule.fused: rule for rule in RULES}
    for path, module in _modules(model, "unfuse"):
        rule = rules.get(_plain_class(module))
        if (original := hf_layers.original_class(module)) is not None:
            rule = Rule(original, type(module))
        beyond = getattr(module, "beyond_torch", tuple)()
        if rule is not None and beyond:
            where = path or "the model"
            warnings.warn(f"unfuse: {where} stays a {rule.fused.__name__} of seqfuse: torch.nn has no {beyond[0]}",
                          stacklevel=2)  # fmt: skip
        elif rule is not None:
            _change_class(module, rule.original)
            explanation.forget(module)
            rule.after_unfuse(module)
    hf_attention.unfuse(model)
    return model


def _modules(model, what):
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{what}: model must be a torch.nn.Module, got {type(model).__name__}")
    return list(model.named_modules())


def _listed(name, patterns) -> list:
    if patterns is None or isinstance(patterns, (str, type)):
        return [] if patterns is None else [patterns]
    if not isinstance(patterns, Iterable):
        raise TypeError(f"fuse: {name} takes module paths and module classes, got {patterns!r}")
    patterns = list(patterns)
    for p in patterns:
        if not isinstance(p, (str, type)):
            raise TypeError(f"fuse: {name} takes module paths and module classes, got {p!r}")
    return patterns


def _paths(model) -> dict[torch.nn.Module, set[str]]:
    """Of every module all of its paths, and those of the modules that it is in."""
    found: dict[torch.nn.Module, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names = path.split(".")
        found.setdefault(module, set()).update(".".join(names[: n + 1]) for n in range(len(names)))
    return found


def _warn_of_strangers(name, patterns, paths) -> None:
    known = set().union(*paths.values())
    for p in patterns:
        if isinstance(p, str) and not any(fnmatch.fnmatchcase(path, p) for path in known):
            warnings.warn(f"fuse: no module's path is {p!r}, which {name} names", stacklevel=3)


def _matcher(patterns):
    def matches(paths, classes):
        for p in patterns:
            if isinstance(p, type):
                if any(issubclass(c, p) for c in classes):
                    return True
            elif any(fnmatch.fnmatchcase(path, p) for path in paths):
                return True
        return False

    return matches


def _plain_class(module) -> type:
    """The class, without what torch.nn.utils.parametrize put over it."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def _change_class(module, plain: type) -> None:
    cls = type(module)
    if parametrize.is_parametrized(module):
        # the parametrized class is made for this one module and holds a property for each parametrized tensor
        members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__", "__doc__", "__module__")}
        plain = type(f"Parametrized{plain.__name__}", (plain,), members)
    module.__class__ = plain
