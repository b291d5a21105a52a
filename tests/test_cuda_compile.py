"""Every CUDA source compiled by nvcc with the flags of the product: registers, spills, shared memory, and what the fat
object holds. This needs no GPU; whether the kernels are fast or free of races only a GPU can show."""

import re
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p.name for p in (ROOT / "csrc" / "cuda").glob("*.cu"))
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_functions")
ARCHITECTURES = {s: ["sm_90a"] if s in SETUP["HOPPER_ONLY"] else ["sm_80", "sm_90a"] for s in SOURCES}
REGISTERS, STATIC_SHARED = 65536, 48 * 1024  # of an SM; of a block, without asking for more

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


class Kernel(NamedTuple):
    name: str
    architecture: str
    registers: int
    stack: int
    spills: int
    shared: int


def run(command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=ROOT, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def kernels_of(log):
    """What `ptxas -v` says of each kernel and architecture."""
    found = []
    for part in log.split("Compiling entry function ")[1:]:
        name, architecture = re.match(r"'(\w+)' for '(\w+)'", part).groups()
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(Kernel(name, architecture, registers, stack, stores + loads, int(shared[1]) if shared else 0))
    return found


def check(kernel, threads, blocks):
    """The limits that every kernel keeps; threads and blocks an SM are what its launch bounds promise."""
    assert kernel.stack == 0 and kernel.spills == 0, f"{kernel} spills"
    allocated = -(-kernel.registers // 8) * 8 * threads * blocks
    assert allocated <= REGISTERS, f"{kernel}: {blocks} x {threads} threads do not fit an SM's registers"
    assert kernel.shared <= STATIC_SHARED, f"{kernel}: too much static shared memory"


def launch_bounds(ptx):
    """Kernel name -> (threads of a block, blocks an SM)."""
    found = {}
    for part in ptx.split(".entry ")[1:]:
        threads = re.search(r"\.maxntid (\d+)", part)
        blocks = re.search(r"\.minnctapersm (\d+)", part)
        found[re.match(r"\w+", part)[0]] = int(threads[1]), int(blocks[1])
    return found


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Source name -> (fat object, kernels, PTX text, what nvcc said), all from one nvcc call each."""
    folder = tmp_path_factory.mktemp("cuda_compile")

    def build(source):
        keep = folder / source.removesuffix(".cu")
        keep.mkdir()
        target = keep / "fat.o"
        flags = [*SETUP["nvcc_flags"](source), "-Xptxas", "-v", "--keep", "--keep-dir", keep]
        log = run(["nvcc", *flags, "-c", f"csrc/cuda/{source}", "-o", target])
        ptx = "".join(p.read_text() for p in sorted(keep.glob("*.ptx")))
        return target, kernels_of(log), ptx, log

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SOURCES, pool.map(build, SOURCES), strict=True))


@pytest.mark.parametrize("source,architecture", [(s, a) for s in SOURCES for a in ARCHITECTURES[s]])
def test_kernels_fit_without_spilling(compiled, source, architecture):
    _, kernels, ptx, _ = compiled[source]
    kernels = [k for k in kernels if k.architecture == architecture]
    bounds = launch_bounds(ptx)
    assert kernels and {k.name for k in kernels} == set(bounds)
    for kernel in kernels:
        check(kernel, *bounds[kernel.name])


def test_the_spill_check_can_fail(tmp_path):
    source = tmp_path / "starved.cu"
    source.write_text("""
        extern "C" __global__ void __launch_bounds__(1024, 2) starved(float* p) {  // 64 values in 32 registers
          float x[64];
          #pragma unroll
          for (int i = 0; i < 64; i++) x[i] = p[i * 4096 + threadIdx.x];
          __syncthreads();
          #pragma unroll
          for (int i = 0; i < 64; i++) p[i * 4096 + threadIdx.x] = x[63 - i] + 1.0f;
        }
    """)
    log = run(["nvcc", "-arch=sm_80", "-Xptxas", "-v", "-c", source, "-o", tmp_path / "starved.o"])
    (kernel,) = kernels_of(log)
    with pytest.raises(AssertionError, match="spills"):
        check(kernel, 1024, 2)


def cuobjdump():
    """The CUDA toolkit's, or the one that comes with Triton."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        pytest.skip("there is no cuobjdump on the PATH, and no Triton, which brings one")
    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not found.exists():
        pytest.skip("there is no cuobjdump on the PATH, nor in Triton's folder")
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_the_fat_object_holds_what_the_product_promises(compiled, source):
    tool, target = cuobjdump(), compiled[source][0]
    elf = re.findall(r"\.(sm_\w+|compute_\w+)\.cubin", run([tool, "--list-elf", target]))
    ptx = re.findall(r"\.(sm_\w+|compute_\w+)\.ptx", run([tool, "--list-ptx", target]))
    assert sorted(elf) == ARCHITECTURES[source]
    assert [name.replace("compute_", "sm_") for name in ptx] == ([] if source in SETUP["HOPPER_ONLY"] else ["sm_80"])


def test_the_toolkit_is_found_behind_a_script(tmp_path):
    """An nvcc on the PATH may only call the toolkit's: torch's CUDA_HOME is then its grandparent."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {shutil.which("nvcc")} "$@"\n')
    script.chmod(0o755)
    toolkit = SETUP["cuda_toolkit"](tmp_path)
    assert toolkit != tmp_path and (toolkit / "bin" / "nvcc").exists()
    assert SETUP["cuda_toolkit"](toolkit) == toolkit


def bodies(ptx):
    return {re.match(r"\w+", part)[0]: part for part in ptx.split(".entry ")[1:]}


@pytest.mark.parametrize("kernel", ["rnn_forward_step", "rnn_backward_step"])
def test_16_bit_steps_use_the_tensor_cores_and_float_does_not(compiled, kernel):
    steps = {n: body for n, body in bodies(compiled["rnn.cu"][2]).items() if kernel in n}
    assert len(steps) == 18  # cells x dtypes x aligned or not
    for name, body in steps.items():
        kind = "bf16" if "bf16" in name else "f16" if "f16" in name else None
        assert (f"m16n8k16.row.col.f32.{kind}.{kind}.f32" in body) if kind else ("mma" not in body), name


@pytest.mark.parametrize("source", SOURCES)
def test_memory_is_read_in_vectors_of_16_bytes(compiled, source):
    for name, body in bodies(compiled[source][2]).items():
        if "layer_norm_" in name or ("_step" in name and "Lb1" in name):
            assert re.search(r"ld\.global\.nc\.v4", body), name


def test_the_layers_clusters_compile(tmp_path):
    """The self-test kernels hold what no product kernel uses yet: clusters and their shared memory, sm_90a only."""
    command = ["nvcc", "-std=c++20", "-Icsrc/include", "-Icsrc", "-gencode=arch=compute_90a,code=compute_90a", "-ptx"]
    run([*command, "-x", "cu", "tests/host_device/self_test.cuh", "-o", tmp_path / "self.ptx"])
    ring = next(body for name, body in bodies((tmp_path / "self.ptx").read_text()).items() if "ring" in name)
    assert "barrier.cluster.arrive" in ring and "mapa" in ring


def test_the_microbenchmark_of_clusters_compiles(tmp_path):
    command = ["nvcc", "-std=c++20", "-O3", "-Icsrc/include", "-Icsrc", "-arch=sm_90a", "-Xptxas", "-v"]
    log = run([*command, "benchmarks/cluster_latency.cu", "-o", tmp_path / "cluster_latency"])
    (kernel,) = kernels_of(log)
    assert kernel.stack == 0 and kernel.spills == 0


GATES = {"0": 1, "2": 3, "3": 4}  # by the number of the cell


def functions(sass):
    """Kernel name -> [(address, instruction)]."""
    found = {}
    for part in sass.split("Function : ")[1:]:
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?) ?;", part)
        found[part.split()[0]] = [(int(address, 16), text) for address, text in lines]
    return found


def opcode(text):
    return re.sub(r"^@!?U?P\w+ +", "", text).split()[0]


def time_loop(instructions):
    """The opcodes of the longest loop that holds a matrix product."""
    best = []
    for address, text in instructions:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            body = [opcode(t) for a, t in instructions if int(target[1], 16) <= a <= address]
            if any(o.startswith("HMMA") for o in body) and len(body) > len(best):
                best = body
    return best


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_cluster_kernels_keep_their_weights_in_registers(compiled, direction):
    """In the machine code: every product of the kernel lies in the time loop, and too few loads to fetch w_hh again."""
    sass = run([cuobjdump(), "-sass", "-arch", "sm_90a", compiled["rnn_cluster.cu"][0]])
    kernels = {n: code for n, code in functions(sass).items() if f"rnn_cluster_{direction}" in n}
    # cells x 16-bit types x extents; in tf32 the larger extent is the plain RNN's alone
    assert len(kernels) == 12 + 4
    for name, code in kernels.items():
        cell, extent = re.search(r"CellE(\d).*Li(\d+)E", name).groups()
        gates, body = GATES[cell], time_loop(code)
        tf32 = 1 if "bf16" in name or "f16" in name else 2  # words of a value
        fragments = gates * int(extent) // 32 * tf32
        kind = ".TF32" if tf32 == 2 else ".BF16" if "bf16" in name else ".F32"
        assert all(kind in opcode(t) for _, t in code if opcode(t).startswith("HMMA")), name
        assert sum(o.startswith("HMMA") for o in body) == fragments, name
        assert sum(opcode(t).startswith("HMMA") for _, t in code) == fragments, name
        # a pair is one load of 4 bytes or two of 2, in two places: what the step before left may be in two arrays
        pairs = gates if direction == "forward" else {"0": 2, "2": 6, "3": 6}[cell]
        flags = 5 + 2  # bytes of masks, dcells
        # w_hh is not among them: its share of a thread is many times as much
        assert 3 * pairs + 2 + flags < fragments * 2 or gates == 1
        loads = sum(o.startswith("LDG") for o in body)
        assert loads <= 3 * pairs + 2 + flags, f"{name}: {loads} loads from global memory a step"
        # fragments come from shared memory 16 bytes a lane; w_hh would be twice as many again
        tiles = tf32 * (int(extent) // 32 if direction == "forward" else 2 * gates)
        assert sum(o == "LDS.128" for o in body) <= tiles + 1, name
        # blocks exchange by counted bytes: no fence and no barrier of the cluster in the loop
        assert any(o.startswith("STAS") for o in body) and any(o.startswith("SYNCS") for o in body), name
        assert not any(o.startswith(("MEMBAR", "UCGABAR", "LDL", "STL")) for o in body), name


ATTENTION = {"attention_forward": 8, "attention_backward": 16}  # head sizes x causal or not x types (x passes)


def hopper_kernels(compiled, kernel):
    """Name, machine code, (D, causal) of each instance for sm_90a."""
    sass = run([cuobjdump(), "-sass", "-arch", "sm_90a", compiled["attention.cu"][0]])
    kernels = {n: [opcode(t) for _, t in code] for n, code in functions(sass).items() if kernel in n}
    assert len(kernels) == ATTENTION[kernel]
    for name, code in kernels.items():
        D, causal = re.search(r"Li(\d+)ELb(\d)", name).groups()
        yield name, code, int(D), causal == "1"


def test_products_of_attention_are_not_serialised(compiled):
    """ptxas says C7510 and the like where it makes wgmma wait for each other, or adds synchronisation of its own."""
    _, _, ptx, log = compiled["attention.cu"]
    assert not re.search(r"\(C7\d+\)|wgmma", log)
    for name, body in bodies(ptx).items():  # the last one of each name is for sm_90a
        if "delta" in name:
            continue
        for word in ("wgmma", "cp.async.bulk.tensor.4d", "setmaxnreg.inc", "setmaxnreg.dec", "mbarrier.try_wait"):
            assert word in body, f"{name}: no {word}"


def test_attention_forward_keeps_its_schedule(compiled):
    """In the machine code of each turn of the loop: both products are queued, and all exponentials of S lie between
    the wait for S and the wait for O, beside the second product."""
    for name, code, D, causal in hopper_kernels(compiled, "attention_forward"):
        assert not any(o.startswith(("LDL", "STL", "LDG")) for o in code), name
        assert sum(o.startswith("UTMALDG") for o in code) == 3 * D // 64, name
        events = [o for o in code if o.startswith(("HGMMA", "WARPGROUP.DEPBAR", "MUFU.EX2"))]
        text = "".join({"H": "h", "W": "w", "M": "x"}[o[0]] for o in events)
        turn = f"h{{{D // 16 + 8}}}wx{{66}}w"  # S and O queued; S done; 64 scores and 2 factors; O done
        assert len(re.findall(turn, text)) == (2 if causal else 1), f"{name}: {text}"
        assert text.count("h") == D // 16 + 8 + (D // 16 + 8) * (2 if causal else 1), name


def test_attention_backward_keeps_its_schedule(compiled):
    """The exponentials of a turn lie between the wait for S and the next one, with all products queued before that
    have registers."""
    for name, code, D, _ in hopper_kernels(compiled, "attention_backward"):
        keys = re.search(r"Li\d+ELb\dELb(\d)", name)[1] == "1"
        assert not any(o.startswith(("LDL", "STL")) for o in code), name
        events = [o for o in code if o.startswith(("HGMMA", "WARPGROUP.DEPBAR", "MUFU.EX2"))]
        text = "".join({"H": "h", "W": "w", "M": "x"}[o[0]] for o in events)
        scores, results = D // 16, (2 if keys else 1) * 4
        late = keys and D == 128  # dP
        turn = f"h{{{scores + results + (0 if late else scores)}}}wx{{32}}w" + ("w*h{8}w" if late else "")
        assert len(re.findall(turn, text)) == 1, f"{name}: {text}"
        assert text.count("h") == 2 * (2 * scores + results), name  # before the loop, in it, and after it
