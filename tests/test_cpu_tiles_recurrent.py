"""The recurrent kernels on the tile unit (AMX), emulated, on any machine: scans and cells."""

import ctypes
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_cpu_dots import FLAGS, ROOT, numbers, pointers
from test_rnn_scan import CELLS, SEQUENCES, by_reference, case, lengths_for

from seqfuse import reference
from seqfuse.testing import assert_accurate

SOURCES = [*(f"csrc/cpu/rnn_{name}.cpp" for name in ("forward", "backward", "gemm", "scan", "cell_step")),
           "tests/cpu_dots/recurrent.cpp"]  # fmt: skip
# a vector of the level is as wide as a register of the unit; the compiler makes several of the machine's of it
EMULATED = "-DSEQFUSE_EMULATE_DOTS -DSEQFUSE_EMULATE_TILES -DSEQFUSE_VBYTES=64 -DSEQFUSE_ISA=emulated"


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler on the PATH")
    folder = tmp_path_factory.mktemp("cpu_tiles")
    objects = [str(folder / f"{Path(source).name}.o") for source in SOURCES]

    def run(*command):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    flags = [*shlex.split(FLAGS), *shlex.split(EMULATED)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda s, o: run(compiler, *flags, "-c", s, "-o", o), SOURCES, objects))
    library = folder / "kernels.so"
    run(compiler, "-shared", *objects, "-o", str(library))
    return ctypes.CDLL(str(library))


def by_kernels(kernels, cell, tensors, grads, lengths, reverse):
    """Outputs and gradients of one scan; what nobody writes stays NaN."""
    xg, h0, c0, w_hh, b_hh = (torch.zeros(1) if t is None else t.bfloat16() for t in tensors.values())
    dy, dh_n, dc_n = (torch.zeros(1) if grads[n] is None else grads[n].bfloat16() for n in ("dy", "dh_n", "dc_n"))
    (T, B), H = xg.shape[:2], h0.shape[1]
    empty = xg.new_empty
    y, h_n, c_n, gates, cells = empty(T, B, H), empty(B, H), empty(B, H), empty(T, B, 4 * H), torch.empty(T, B, H)
    sizes = numbers(CELLS.index(cell), T, B, H, reverse)
    lengths = None if lengths is None else numbers(*lengths.tolist())
    kernels.scan_forward(sizes, lengths, pointers(xg, h0, c0, w_hh, b_hh, y, h_n, c_n, gates, cells))
    found = {"y": y, "h_n": h_n} | ({"c_n": c_n, "cells": cells} if cell == "lstm" else {})
    dxg, dan, dh0, dc0, db_hh = empty(xg.shape), empty(T, B, H), empty(B, H), empty(B, H), torch.empty(b_hh.shape)
    kernels.scan_backward(
        sizes, lengths, pointers(dy, dh_n, dc_n, y, gates, cells, h0, c0, w_hh, dxg, dan, dh0, dc0, db_hh)
    )
    found |= {"dxg": dxg, "dh0": dh0, "db_hh": db_hh}
    return found | ({"dc0": dc0} if cell == "lstm" else {"dan": dan} if cell == "gru" else {})


# rows: one register's and less, two registers' and less, more than a tile; units that fill no vector, no pair, no word
@pytest.mark.parametrize("size", [(3, 16, 32), (4, 7, 37), (3, 41, 50), (2, 70, 16)], ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["plain", "lengths"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_scan(kernels, cell, ragged, size):
    lengths = lengths_for(*size[:2]) if ragged else None
    tensors, options, grads = case(cell, *size, lengths=lengths)
    for reverse in (False, True):
        got = by_kernels(kernels, cell, tensors, grads, lengths, reverse)
        exact, theirs = (
            by_reference(cell, tensors, options, grads, reverse, t) for t in (torch.float64, torch.bfloat16)
        )
        assert got.keys() == exact.keys()
        for name, truth in exact.items():
            dims = (0, 1) if name in SEQUENCES else (0,) if truth.dim() == 2 else ()
            assert_accurate(got[name], truth, theirs[name], dims=dims, what=name, dtype=torch.bfloat16)


@pytest.mark.parametrize("size", [(16, 32, 32), (5, 37, 21), (33, 70, 48)], ids=str)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_cell(kernels, cell, size):
    B, inputs, H = size
    G = reference.GATES[cell]
    shapes = (B, inputs), (B, H), (B, H), (G * H, inputs), (G * H, H), (G * H,), (G * H,)
    x, h, c, w_ih, w_hh, b_ih, b_hh = given = [torch.randn(s).bfloat16() for s in shapes]
    h_out, c_out = h.new_empty(B, H), h.new_empty(B, H)
    kernels.cell_step(numbers(CELLS.index(cell), *size), pointers(*given, h_out, c_out))

    def step(dtype):
        x, h, c, w_ih, w_hh, b_ih, b_hh = (t.to(dtype) for t in given)
        linear = torch.nn.functional.linear
        return reference.rnn_cell(cell, linear(x, w_ih, b_ih), linear(h, w_hh, b_hh), h, c if cell == "lstm" else None)

    for got, truth, theirs in zip((h_out, c_out), step(torch.float64), step(torch.bfloat16), strict=True):
        if truth is not None:
            assert_accurate(got, truth, theirs, dims=(0,))


@pytest.mark.parametrize("size", [(16, 64, 32, 96), (3, 37, 21, 63), (40, 70, 48, 300)], ids=str)
def test_products_of_a_cell(kernels, size):
    B, inputs, H, GH = size
    dxg, da, w_ih, w_hh = given = [torch.randn(s).bfloat16() for s in ((B, GH), (B, GH), (GH, inputs), (GH, H))]
    dx, dh = dxg.new_empty(B, inputs), dxg.new_empty(B, H)
    kernels.cell_products(numbers(*size), pointers(*given, dx, dh))
    for got, a, w in ((dx, dxg, w_ih), (dh, da, w_hh)):
        assert_accurate(got, a.double() @ w.double(), a @ w, dims=(0,))
