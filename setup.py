"""Builds seqfuse._C: the CPU kernels once per instruction set, the CUDA kernels where torch has CUDA, the bindings.

Install torch >= 2.11 first (torch is left out of build-system.requires on purpose: pip would fetch the newest CUDA
build into an isolated environment, gigabytes and the wrong ABI), then `pip install --no-build-isolation .`

The build is one generated ninja file, so an edit recompiles only what it touches:

    csrc/cpu/*.cpp       -> one object per level in CPU_LEVELS (RUN_ONCE: once; avx512_bf16: WITH_DOTS;
                            amx: WITH_TILES)
    csrc/cuda/*.cu       -> fat objects: sm_80, sm_90a, and compute_80 PTX for everything else (HOPPER_ONLY: sm_90a)
    pyext/bindings/*.cpp -> seqfuse._C, on LibTorch's stable ABI: one build serves torch >= 2.11
    pyext/autograd/*.cpp -> seqfuse._autograd, on torch's own ABI: used under the torch it was built with, and no loss
                            where it can't be built

Where there is no C++ compiler the package installs without seqfuse._C and says so; every op then runs on torch's own.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11
RUN_ONCE = {"caches.cpp", "dispatch.cpp", "isa.cpp"}
# they multiply pairs of bf16 or narrow to it
WITH_DOTS = {"attention_backward.cpp", "attention_forward.cpp", "linear.cpp"}
WITH_DOTS |= {"cross_entropy.cpp", "gated.cpp", "layer_norm.cpp"}
WITH_DOTS |= {"rnn_backward.cpp", "rnn_cell_step.cpp", "rnn_forward.cpp", "rnn_gemm.cpp", "rnn_scan.cpp"}
WITH_TILES = {"attention_backward.cpp", "attention_forward.cpp"}  # they multiply tiles of bf16
WITH_TILES |= {"rnn_backward.cpp", "rnn_cell_step.cpp", "rnn_forward.cpp", "rnn_gemm.cpp", "rnn_scan.cpp"}
HOPPER_ONLY = {"attention.cu", "rnn_cluster.cu"}
SOME_FILES = {"avx512_bf16": WITH_DOTS, "amx": WITH_TILES}  # the others: as one level below
BASELINE = ["-O1"]  # on x86 for processors from before 2013: quick to compile matters more
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mprfchw"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
WARN = ["-Wall"]  # at one level: it takes time, and all levels are made of the same lines
CPU_LEVELS = {
    "baseline": BASELINE,
    "avx2": [*AVX2, *WARN],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
INCLUDES = ["-Icsrc/include", "-Icsrc"]


def cxx_flags():
    return ["-std=c++20", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]


def kernel_flags():
    # no errno and no traps, so that loops vectorise; still IEEE: no reassociation, NaN and inf behave
    return [*cxx_flags(), "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", *INCLUDES]


def nvcc_flags(name: str):
    architectures = [("90a", "sm_90a")]
    if name not in HOPPER_ONLY:
        architectures += [("80", "sm_80"), ("80", "compute_80")]
    codes = [f"-gencode=arch=compute_{arch},code={code}" for arch, code in architectures]
    return ["-std=c++20", "-O1", "-Xcompiler=-fPIC,-fvisibility=hidden", *codes, *INCLUDES]


def cpu_levels():
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return CPU_LEVELS if x86 else {"baseline": WARN}


def sources():
    def find(pattern):
        return sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob(pattern))

    return {
        "cpu": find("csrc/cpu/*.cpp"),
        "cuda": find("csrc/cuda/*.cu"),
        "bindings": find("pyext/bindings/*.cpp"),
        "autograd": find("pyext/autograd/*.cpp"),
    }


def compiler():
    """$CXX if it is set, else the first C++ compiler on the PATH; None if there is none."""
    named = os.environ.get("CXX")
    candidates = (
        [named] if named else [shlex.split(sysconfig.get_config_var("CXX") or "c++")[0], "c++", "g++", "clang++"]
    )
    return next((c for c in candidates if shutil.which(shlex.split(c)[0])), None)


def cuda_toolkit(home: str) -> Path:
    """Where the toolkit of home/bin/nvcc lies: torch takes what is above the nvcc on the PATH for it, and that nvcc may
    be a script that calls another."""
    said = subprocess.run([f"{home}/bin/nvcc", "--dryrun", "-c", "any.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(\S+)", said.stdout + said.stderr, re.MULTILINE)
    return Path(top[1]).resolve() if top else Path(home)


def is_gcc(cxx: str) -> bool:
    said = subprocess.run([*shlex.split(cxx), "--version"], capture_output=True, text=True)
    return "Free Software Foundation" in said.stdout


def ninja_file(build: Path, targets: dict[str, Path], cxx: str) -> str:
    """The whole build as text. Paths are relative to the repository root, where ninja runs.

    targets: where to put "_C" and "_autograd".
    """
    import pybind11
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, include_paths, library_paths

    cuda = CUDA_HOME is not None and torch.version.cuda is not None
    files = sources()
    headers = [f"-isystem{p}" for p in [*include_paths(), pybind11.get_include(), sysconfig.get_path("include")]]
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    built_with = f"-DSEQFUSE_TORCH='\"{torch.__version__}\"'"
    libraries = [f"-L{p}" for p in library_paths()] + ["-ltorch_cpu"]
    if cuda:
        defines += ["-DUSE_CUDA", "-DSEQFUSE_CUDA"]
        toolkit = cuda_toolkit(CUDA_HOME)
        headers.append(f"-isystem{toolkit}/include")
        folders = [f"-L{toolkit / lib}" for lib in ("lib64", "lib") if (toolkit / lib).is_dir()]
        libraries += ["-ltorch_cuda", *folders, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    if sys.platform == "darwin":
        libraries += ["-undefined", "dynamic_lookup"]

    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {build.as_posix()}",
        f"rule cxx\n  command = {cxx} $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
        "  description = compile $in $level",
        f"rule link\n  command = {cxx} -shared -s $in $flags -o $out\n  description = link $out",
    ]
    if cuda:
        lines.append(f"rule nvcc\n  command = {CUDA_HOME}/bin/nvcc $flags -MMD -MF $out.d -c $in -o $out\n"
                     "  depfile = $out.d\n  deps = gcc\n  description = nvcc $in")  # fmt: skip
    objects, nodes = [], []
    gcc = is_gcc(cxx)

    def compile_one(rule, source, flags, level="", objects=objects, needs=""):
        out = (build / f"{source.replace('/', '_')}{'.' if level else ''}{level}.o").as_posix()
        after = f" | {needs}" if needs else ""
        lines.append(f"build {out}: {rule} {source}{after}\n  flags = {' '.join(flags)}\n  level = {level}")
        objects.append(out)

    def parse_once(header, flags, level=""):
        """(the precompiled header, the flags that use it). Only GCC's can stand in for an #include."""
        if not gcc:
            return "", []
        name = (build / "parsed" / level / Path(header).name).as_posix()
        lines.append(f"build {name}.gch: cxx {header}\n  flags = -w -x c++-header {' '.join(flags)}\n  level = {level}")
        return f"{name}.gch", ["-include", name]

    # ninja begins at the top: what takes longest comes first, or it would be waited for at the end
    first, *others = files["autograd"]  # compiled as one file: torch's headers are most of their time
    others = [f"-include {source}" for source in others]
    # and a seventh of what is left is GCC's search for memory that it can use again: it does with 1.1 GB
    others += ["--param=ggc-min-heapsize=1000000"] if gcc else []
    compile_one("cxx", first, [*cxx_flags(), "-O1", "-DAT_PER_OPERATOR_HEADERS", *headers, *others], objects=nodes)
    for source in files["cuda"] if cuda else []:
        compile_one("nvcc", source, nvcc_flags(Path(source).name))
    for level, isa in cpu_levels().items():
        flags = [*kernel_flags(), *isa, f"-DSEQFUSE_ISA={level}"]
        parsed, use_parsed = parse_once("csrc/cpu/vec.h", flags, level)  # the compiler's intrinsics, 0.7 s a file
        for source in files["cpu"]:
            name = Path(source).name
            if name not in RUN_ONCE and name in SOME_FILES.get(level, {name}):
                compile_one("cxx", source, [*use_parsed, *flags], level, needs=parsed)
    for source in files["cpu"]:
        if Path(source).name in RUN_ONCE:
            compile_one("cxx", source, kernel_flags())
    binding_flags = [*cxx_flags(), *WARN, "-O1", *INCLUDES, *headers, *defines]
    parsed, use_parsed = parse_once("pyext/bindings/common.h", binding_flags)  # torch's: most of a binding's time
    for source in files["bindings"]:
        if Path(source).name == "module.cpp":
            compile_one("cxx", source, [*binding_flags, "-O0", built_with])
        else:
            compile_one("cxx", source, [*use_parsed, *binding_flags], needs=parsed)
    for name, linked, flags in (
        ("_C", objects, libraries),
        ("_autograd", nodes, [*libraries, "-lc10", "-ltorch_python"]),
    ):
        lines.append(f"build {targets[name].as_posix()}: link {' '.join(linked)}\n  flags = {' '.join(flags)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    def build_extension(self, ext):
        cxx = compiler()
        if cxx is None:
            print("seqfuse: no C++ compiler found, so the compiled kernels are left out; torch's own are used instead.")
            return
        try:
            import torch  # noqa: F401
        except ImportError:
            raise SystemExit(
                "seqfuse: install torch >= 2.11 first, then build with `pip install --no-build-isolation .`"
            ) from None
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        targets = {e.name.split(".")[-1]: Path(self.get_ext_fullpath(e.name)).resolve() for e in self.extensions}
        target = targets[ext.name.split(".")[-1]]
        target.parent.mkdir(parents=True, exist_ok=True)
        script = build / "build.ninja"
        text = ninja_file(build, targets, cxx)
        if not script.exists() or script.read_text() != text:
            script.write_text(text)
        ninja = shutil.which("ninja")
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jobs = os.environ.get("MAX_JOBS") or cpus  # ninja's own choice, three jobs on two cores, takes 15% longer
        command = [*([ninja] if ninja else [sys.executable, "-m", "ninja"]), "-j", str(jobs), "-f", str(script)]
        built = subprocess.run([*command, "-k", "0"], cwd=ROOT).returncode == 0  # both extensions, side by side
        if not built and subprocess.run([*command, target.as_posix()], cwd=ROOT).returncode:
            if not ext.optional:
                raise SystemExit("seqfuse: the build failed; the compiler's messages are above")
            print(f"seqfuse: {ext.name} could not be built and is left out; small calls cost more.")

    def copy_extensions_to_source(self):  # --inplace and editable installs
        everything = self.extensions
        self.extensions = [
            e for e in everything if Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(e.name))).exists()
        ]
        super().copy_extensions_to_source()
        self.extensions = everything

    def get_outputs(self):
        return [path for path in super().get_outputs() if os.path.exists(path)]  # the compiler may be missing


if __name__ == "__main__":
    setup(
        license="Apache-2.0",
        ext_modules=[Extension("seqfuse._C", []), Extension("seqfuse._autograd", [], optional=True)],
        cmdclass={"build_ext": NinjaBuild},
    )
