"""What the CUDA C++ backend of lstm, gru and rnn takes, by which launches, and why not: on paper, with a device that is
described instead of there. The plans are the compiled extension's own."""

import pytest
import torch

import seqfuse
from seqfuse import dispatch, native
from seqfuse.ops import library
from seqfuse.ops.rnn_rules import RecurrentCase

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


@pytest.fixture
def device(monkeypatch):
    """device(capability, resident): what the GPU is, and how many clusters forward and backward it holds at once."""

    def describe(capability=90, resident=(8, 8)):
        def plan(cell, dtype, batch, hidden, scans, tf32, backward):
            return native._C.rnn_cluster_plan(cell, dtype, batch, hidden, capability, resident[backward], scans, tf32)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(native, "has_cuda", lambda: True)
        monkeypatch.setattr(native, "rnn_cluster_plan_here", plan)
        dispatch.forget()

    yield describe
    dispatch.forget()


def case(cell="lstm", dtype=torch.bfloat16, B=64, H=512, grad=True, extras=(), bidirectional=False, tf32=False):
    return RecurrentCase(cell, "cuda", dtype, 128, B, H, H, 1, bidirectional, grad, tuple(extras), 1, tf32)


def chosen(*args, **kwargs):
    """The words of explain() for a call that asks for the backend by name."""
    found = case(*args, **kwargs)
    with seqfuse.backend("cuda"):
        return dispatch.select("lstm" if found.cell == "lstm" else "gru", found).reason


def refusal(*args, **kwargs):
    with pytest.raises(RuntimeError) as caught:
        chosen(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_cluster_kernel_is_named_with_its_launch(device, cell):
    device()
    assert chosen(cell).startswith("CUDA C++, clusters of 16 blocks, 4 in 1 wave (")
    assert "clusters of 16 blocks, 4 in 1 wave " in chosen(cell, extras=("lengths", "resets", "zoneout"))
    assert "clusters of 3 blocks, 2 in 1 wave " in chosen(cell, H=70, B=17)
    assert "clusters of 16 blocks, 20 in 3 waves " in chosen(cell, B=160, bidirectional=True), "both in one launch"
    assert "10 in 2 waves " in chosen(cell, B=160, bidirectional=True, extras=("recompute",)), "each by itself"
    device(resident=(8, 2))
    assert "forward clusters of 16 blocks, 4 in 1 wave; backward clusters of 16 blocks, 4 in 2 waves" in chosen(cell)
    assert "backward" not in chosen(cell, grad=False)


def test_it_says_that_it_has_not_run_on_a_gpu(device):
    device()
    assert library.NOT_RUN_ON_GPU in chosen() and chosen().endswith("asked for by name")


@pytest.mark.parametrize("extras", [(), ("lengths",), ("zoneout", "return_cell_states"), ("packed_sequence",)], ids=str)
@pytest.mark.parametrize("compiling", [False, True])
def test_auto_never_chooses_it(device, monkeypatch, extras, compiling):
    device()
    monkeypatch.setattr(library, "triton_missing", lambda: "no Triton")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    with seqfuse.backend("auto"):
        choice = dispatch.select("lstm", case(extras=extras))
    assert choice.backend in ("torch", "reference")
    assert dict(choice.refused)["cuda"] == f"{library.NOT_RUN_ON_GPU}: only asked for by name"


@pytest.mark.parametrize(
    "capability,dtype,H,tf32,words",
    [
        (80, torch.bfloat16, 256, False, "compute capability 9.0 (Hopper), this device has 8.0"),
        (100, torch.bfloat16, 256, False, "this device has 10.0"),
        (90, torch.float16, 768, False, "512 hidden units at most, not 768"),
        (90, torch.float32, 128, False, "which torch.set_float32_matmul_precision must allow"),
        (90, torch.float32, 257, True, "256 hidden units at most in float32, not 257"),
    ],
)
def test_what_it_does_not_take_runs_step_by_step_if_the_scan_is_plain(device, capability, dtype, H, tf32, words):
    device(capability)
    found = chosen(dtype=dtype, H=H, tf32=tf32)
    assert "CUDA C++, one launch a step, as" in found and words in found
    # what the other kernel does as well
    for extras in (("recompute",), ("proj_size",), ("weight_drop",), ("variational_dropout",)):
        assert words in chosen(dtype=dtype, H=H, tf32=tf32, extras=extras)
    assert words in chosen(dtype=dtype, H=H, tf32=tf32, grad=False, extras=("return_cell_states",))
    # what only the cluster kernel could do
    for extras in (("lengths",), ("resets",), ("zoneout",), ("packed_sequence",), ("return_cell_states",)):
        said = refusal(dtype=dtype, H=H, tf32=tf32, extras=extras)
        assert f"{extras[0]} needs the CUDA cluster kernel, and " in said and words in said


def test_float32_where_tf32_is_allowed(device):
    device()
    assert "clusters of 8 blocks, 4 in 1 wave" in chosen(dtype=torch.float32, H=256, tf32=True)
    assert "clusters of 16 blocks" in chosen("rnn_tanh", dtype=torch.float32, H=512, tf32=True)
    assert "clusters of 8 blocks" in chosen(dtype=torch.float32, H=256, tf32=True, extras=("zoneout",))


def test_a_device_without_room_for_a_cluster(device):
    device(resident=(0, 0))
    assert "as the device has no room for a cluster of 16 blocks" in chosen()
    assert "no room for a cluster of 16 blocks" in refusal(extras=("lengths",))
    device(resident=(8, 0))  # no gradient could come back
    assert "no room" in refusal(extras=("lengths",))
    assert "1 wave" in chosen(extras=("lengths",), grad=False)


@pytest.mark.parametrize(
    "extra,words",
    [
        ("peephole", "no peepholes"),
        ("heads", "no block-diagonal heads"),
        ("variational_dropout of h", "no mask between h and its product"),
        ("layer_norm", "sum over all hidden units"),
        ("dropout of a projected h", "no projected h"),
    ],
)
def test_what_no_cuda_kernel_has(device, extra, words):
    device()
    assert words in refusal(extras=(extra, "lengths"))


def test_an_empty_batch(device):
    device()
    assert "the batch is empty" in refusal(B=0)


@pytest.mark.parametrize(
    "capability, hip, words",
    [
        ((7, 5), None, "need compute capability 8.0, this GPU has 7.5"),
        ((9, 4), "6.2", "not for ROCm"),
        ((8, 0), None, None),
        ((0, 0), None, None),  # there is no GPU, and a case is only described
    ],
    ids=str,
)
def test_gpus_that_tritons_kernels_are_not_for(capability, hip, words, monkeypatch):
    monkeypatch.setattr(library, "gpu_capability", lambda: capability)
    monkeypatch.setattr(library, "triton_missing", lambda: None)
    monkeypatch.setattr(library, "interpreting", lambda: False)
    monkeypatch.setattr(torch.version, "hip", hip)
    refusal = library.triton_refusal("cuda", torch.float32)
    assert refusal is None if words is None else words in refusal


def test_the_newer_switch_for_tf32_decides_too():
    """Triton's attention as well: the older switches raise beside it."""
    from seqfuse.ops import rnn_scan

    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        for precision, allowed in (("tf32", True), ("ieee", False)):
            switch.fp32_precision = precision
            assert rnn_scan.tf32_allowed() == allowed
            if library.triton_missing() is None:
                from seqfuse.kernels import attention

                assert attention.tf32(torch.float32) == allowed and not attention.tf32(torch.bfloat16)
    finally:
        switch.fp32_precision = before


def test_tf32_follows_torchs_setting(monkeypatch):
    from seqfuse.ops import rnn_scan

    before = torch.get_float32_matmul_precision()
    try:
        for precision, allowed in (("highest", False), ("high", True), ("medium", True)):
            torch.set_float32_matmul_precision(precision)
            assert rnn_scan.tf32_allowed() == allowed
    finally:
        torch.set_float32_matmul_precision(before)
    seen = []

    class Ops:
        rnn_scan_fwd = staticmethod(lambda *args: seen.append(args))

    monkeypatch.setattr(torch.ops, "seqfuse", Ops)
    rnn_scan.SCAN["cuda"].fwd("gru", 1, 2)
    rnn_scan.SCAN["cpu"].fwd("gru", 1, 2)
    assert seen == [(2, 1, 2, rnn_scan.tf32_allowed()), (2, 1, 2)]
