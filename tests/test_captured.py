"""Steps as a CUDA graph, on the CPU: a step's ops are recorded as a graph would, and repeated without its Python."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import seqfuse
import seqfuse.beam
from seqfuse import models
from seqfuse.captured import CapturedSteps
from seqfuse.models.cache import KVCache
from seqfuse.ops import attention_cache

SIZES = dict(vocab=11, bos_id=1, eos_id=2, pad_id=0)
RECURRENT = dict(SIZES, embed=12, hidden=16, layers=2)
ATTENTION = dict(SIZES, width=16, heads=2, layers=2, max_positions=64)
MODELS = {
    "gru": lambda: models.RNNLanguageModel.from_config(RECURRENT | {"cell": "gru"}),
    "lstm": lambda: models.RNNLanguageModel.from_config(RECURRENT),
    "luong": lambda: models.RNNSeq2Seq.from_config(RECURRENT | {"cell": "gru", "norm": True}),
    "bahdanau": lambda: models.RNNSeq2Seq.from_config(RECURRENT | {"attention": "additive"}),
    "sutskever": lambda: models.RNNSeq2Seq.from_config(RECURRENT | {"attention": None}),
    "gpt2": lambda: models.Decoder.from_config(ATTENTION),
    "llama": lambda: models.Decoder.from_config(ATTENTION | {"positions": "rope", "norm": "rms", "kv_heads": 1}),
    "vaswani": lambda: models.Transformer.from_config(ATTENTION | {"start_id": 1}),
}


class Recorder(TorchDispatchMode):
    """What a graph keeps of a run: its ops and their tensors. A number that the host reads is an error, as it is while
    a stream is captured."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out


def record(run):
    """captured.cuda_graph on a CPU."""
    steps = run.__self__
    before = [t.clone() for t in steps.fixed]
    with Recorder() as recorder:
        run()
    for t, was in zip(steps.fixed, before, strict=True):
        t.copy_(was)  # capturing runs nothing
    logits = steps.logits

    def replay():
        successor = {}  # of each tensor that the run made; all others stand where they stood
        for func, args, kwargs, out in recorder.ops:
            args, kwargs = tree_map(lambda t: successor.get(id(t), t), (args, kwargs))
            made = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(made), strict=True):
                if isinstance(old, torch.Tensor) and id(old) not in fixed:
                    successor[id(old)] = new
        logits.copy_(successor[id(logits)])

    fixed = {id(t) for t in steps.fixed}
    return replay


@pytest.fixture
def graphs(monkeypatch):
    """generate() with captured steps on this CPU: the CapturedSteps of each call."""
    made = []

    def stepper(model, cache, cuda_graph):
        made.append(CapturedSteps(model, cache, record))
        return made[-1]

    for module in (attention_cache, sys.modules["seqfuse.ops.rope"]):
        monkeypatch.setattr(module, "_check_numbers", lambda *_: None)  # looked at on a CPU alone
    monkeypatch.setattr(sys.modules["seqfuse.generate"], "stepper", stepper)
    monkeypatch.setattr(sys.modules["seqfuse.beam"], "stepper", stepper)
    return made


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_captured_steps_say_what_the_model_says(name, beams, graphs, monkeypatch):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # else the same token is the likeliest at each step
    prompts = [[3, 4, 5], [6, 7], [8]]
    options = dict(max_new_tokens=12, num_beams=beams, stop=())
    found = seqfuse.generate(model, prompts, **options)
    calls, step = [], type(model).step
    monkeypatch.setattr(type(model), "step", lambda self, *args: (calls.append(1), step(self, *args))[1])
    assert torch.equal(seqfuse.generate(model, prompts, **options), found)
    if isinstance(graphs[1].cache, KVCache):
        assert graphs[1].cache.used == int(graphs[1].cache.lengths.max())
    assert len(calls) <= 3 and graphs[1].replay is not None  # begin's own, the first, and the captured one
    monkeypatch.undo()
    assert torch.equal(seqfuse.generate(model, prompts, **options), found)


def test_a_graph_needs_a_gpu():
    with pytest.raises(ValueError, match="cuda_graph=True needs a model on a CUDA GPU, this one is on cpu"):
        seqfuse.generate(MODELS["gru"](), [[3]], cuda_graph=True)
