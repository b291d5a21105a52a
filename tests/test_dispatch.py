"""The dispatcher's rules: who is chosen, who is refused with which sentence, and what an installation may lack."""

import os
import subprocess
import sys

import pytest
import torch

import seqfuse
from seqfuse import dispatch, native, tuned


def python(code, **env):
    """Run code in a fresh interpreter; returns the finished process."""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def toy(monkeypatch):
    """An op with two backends: `cpu` runs even numbers and is preferred above 10; `reference` runs all."""
    monkeypatch.setattr(dispatch, "_ops", dict(dispatch._ops))
    dispatch.register(
        "toy",
        dispatch.Backend(
            "cpu",
            None,
            None,
            lambda case: None if case % 2 == 0 else "the number is odd",
            lambda case: None if case > 10 else "slower than the reference up to 10",
        ),
        dispatch.Backend("reference", None, None),
    )
    monkeypatch.setattr(tuned, "lookup", lambda op, case: None)
    dispatch.forget()
    yield
    dispatch.forget()


def test_auto_takes_the_first_that_can_and_should(toy):
    assert dispatch.select("toy", 12).backend == "cpu"
    assert dispatch.select("toy", 13) == (
        "toy",
        "reference",
        "the first that fits",
        (("cpu", "the number is odd"),),
    )
    assert dispatch.select("toy", 4).refused == (("cpu", "slower than the reference up to 10"),)


def test_a_backend_asked_for_by_name_runs_or_raises(toy):
    with dispatch.backend("cpu"):
        assert dispatch.select("toy", 4).backend == "cpu"  # slower, but asked for
        with pytest.raises(RuntimeError, match="backend 'cpu' can't run toy here: the number is odd"):
            dispatch.select("toy", 3)
    with dispatch.backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' has no toy"):
        dispatch.select("toy", 4)
    assert dispatch.forced_backend() == os.environ.get("SEQFUSE_BACKEND", "auto")


def test_backend_contexts_nest_and_survive_errors(toy):
    with pytest.raises(KeyError), dispatch.backend("reference"):
        with dispatch.backend("cpu"):
            assert dispatch.forced_backend() == "cpu"
        assert dispatch.forced_backend() == "reference"
        raise KeyError
    assert dispatch.forced_backend() == os.environ.get("SEQFUSE_BACKEND", "auto")


def test_unknown_backend_names_those_that_exist():
    with pytest.raises(ValueError, match="unknown backend 'gpu': use one of auto, reference, cpu, triton, cuda, torch"):
        with seqfuse.backend("gpu"):
            pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_gpu_asked_for_where_there_is_none(name):
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter takes CPU tensors")
    x = torch.randn(2, 3, 4)
    with seqfuse.backend(name):
        with pytest.raises(RuntimeError, match="(no CUDA device is available|Triton is not installed)"):
            seqfuse.ops.layer_norm(x)
        with pytest.raises(RuntimeError, match="(no CUDA device is available|Triton is not installed)"):
            seqfuse.nn.GRU(4, 4)(x)


def test_environment_variable():
    code = (
        "import torch, seqfuse; x = torch.randn(9, 2000);"
        "from seqfuse import dispatch; dispatch.add_listener(lambda c, _: print(c.backend)); seqfuse.ops.layer_norm(x)"
    )
    assert python(code, SEQFUSE_BACKEND="reference").stdout.strip() == "reference"
    wrong = python(code, SEQFUSE_BACKEND="gpu")
    said = "ValueError: unknown backend 'gpu' in the environment variable SEQFUSE_BACKEND: use one of auto, "
    assert wrong.returncode and wrong.stderr.strip().splitlines()[-1].startswith(said)
    assert python(code, SEQFUSE_BACKEND="").stdout.strip() in ("cpu", "torch")


def test_import_without_extension_and_without_triton():
    """Hide both; everything must still import, compute and say what is missing."""
    code = """
import sys
sys.modules["seqfuse._C"] = None
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton": raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoTriton())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else real(name, *a)
import torch, seqfuse
model = seqfuse.fuse(torch.nn.Sequential(torch.nn.LayerNorm(300), torch.nn.LSTM(300, 8)))
y, _ = model(torch.randn(4, 50, 300))
y.sum().backward()
text = str(seqfuse.explain(model))
assert "the compiled extension is missing" in text and "Triton is not installed" in text, text
assert seqfuse.build_info()["isa"] == "none"
print("ok")
"""
    done = python(code)
    assert done.stdout.strip() == "ok", done.stderr


def test_tuned_table_is_followed_and_survives_damage(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.reload()
    x = torch.randn(64, 512)
    seen = []
    monkeypatch.setattr(dispatch, "_listeners", [lambda choice, case: seen.append((choice, case))])
    seqfuse.ops.layer_norm(x)
    choice, case = seen[-1]
    other = "torch" if choice.backend == "cpu" else "cpu"
    tuned.save("cpu", "layer_norm", {case.shape_class(): other})
    seqfuse.ops.layer_norm(x)
    assert seen[-1][0].backend == other and "measured fastest on this machine" in seen[-1][0].reason
    for damaged in (
        "{damaged",
        "[1]",
        "5",
        "null",
        "[]",
        "[{}]",
        f'{{"{tuned.machine("cpu")}": [1]}}',
        f'{{"{tuned.machine("cpu")}": {{"a": 1}}}}',
    ):
        tuned.path().write_text(damaged)
        tuned.reload()
        seqfuse.ops.layer_norm(x)
        assert seen[-1][0].backend == choice.backend
    monkeypatch.undo()
    tuned.reload()


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_isa_limit():
    for level in native.LEVELS:
        with native.isa_limit(level):
            assert native.LEVELS.index(native.isa()) <= native.LEVELS.index(level)
    with pytest.raises(ValueError, match="unknown instruction set 'sse9'"), native.isa_limit("sse9"):
        pass


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_slow_instructions_for_bf16_products_are_used_only_when_asked_for():
    found = native.isa()
    has = native.isa_has("avx512_bf16")
    assert not native.bf16_dots_are_slow() or found == "avx512_bf16"
    assert native.bf16_dots() == (has and not native.bf16_dots_are_slow())
    with native.isa_limit("avx512_bf16"):
        assert native.bf16_dots() == has
        with native.isa_limit("avx512"):
            assert not native.bf16_dots()
        assert native.bf16_dots() == has
    assert native.isa() == found
    assert native.bf16_dots() == (has and not native.bf16_dots_are_slow())


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_what_the_caches_keep():
    """At least 8 MiB, and what was found comes back after a limit."""
    facts = native.build_facts()
    assert facts["cached_bytes"] == max(8 << 20, facts["last_level_cache"] // 4)
    with native.cached_bytes(5):
        assert native.build_facts()["cached_bytes"] == 5
    assert native.build_facts() == facts


def test_build_info_names_what_a_report_needs():
    info = seqfuse.build_info()
    for key in ("seqfuse", "torch", "python", "triton", "cpu", "threads", "isa", "gpu", "extension"):
        assert info[key] not in (None, ""), key
