"""The package as a user gets it: an sdist that builds a wheel, and a wheel that works in a fresh environment."""

import os
import runpy
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pybind11
import pytest
import torch
from torch.utils.cpp_extension import include_paths

from seqfuse import native

ROOT = Path(__file__).resolve().parent.parent
TRY = """
import torch, seqfuse
from seqfuse import native
import seqfuse.kernels, seqfuse.benchmarks
assert native.missing() is None, native.missing()
model = seqfuse.fuse(torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.LSTM(16, 24)))
with seqfuse.backend("cpu"):
    y, _ = model(torch.randn(5, 3, 16, requires_grad=True))
y.sum().backward()
print(seqfuse.__file__)
"""


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    pytest.importorskip("setuptools")
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", out, "sdist", "--dist-dir", out, cwd=ROOT)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    if native.missing():
        pytest.skip(native.missing())
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", out, sdist, cwd=out)
    (archive,) = out.glob("*.whl")
    return archive


def test_sdist_holds_every_source(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tracked = [p for folder in ("csrc", "kernels", "pyext", "benchmarks", "tests") for p in (ROOT / folder).rglob("*")]
    wanted = {p.relative_to(ROOT).as_posix() for p in tracked if p.suffix in (".cu", ".cuh", ".cpp", ".h", ".py")}
    assert wanted <= names, sorted(wanted - names)
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names


def test_wheel_imports_and_runs_in_a_fresh_environment(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert any(n.startswith("seqfuse/_C") for n in names) and "seqfuse/kernels/__init__.py" in names
    assert not any(n.startswith(("csrc", "tests")) for n in names)
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    # torch is large: the fresh environment sees this one's, but not this one's seqfuse
    site = run(python, "-c", "import site; print(site.getsitepackages()[0])").strip()
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel)
    (Path(site) / "torch_of_the_tests.pth").write_text(str(Path(torch.__file__).parents[1]))
    where = run(python, "-c", TRY, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}).strip()
    assert where.startswith(site)
    assert "demo" in run(tmp_path / "env" / "bin" / "seqfuse", "--help", env={**os.environ, "PYTHONPATH": ""})


def test_build_without_a_compiler_says_so(tmp_path):
    """The package builds without the extension and says what is left out."""
    env = {**os.environ, "PATH": str(tmp_path), "CXX": "no-such-compiler"}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no C++ compiler found" in done.stdout and not list((tmp_path).rglob("*.so"))


def test_importing_is_quick():
    code = "import time, torch; t = time.perf_counter(); import seqfuse; print(time.perf_counter() - t)"
    heavy = "import sys, torch, seqfuse; print({'torch._dynamo', 'triton', 'transformers'} & set(sys.modules))"
    assert run(sys.executable, "-c", heavy).strip() == "set()"
    assert min(float(run(sys.executable, "-c", code)) for _ in range(3)) < 1.0


def test_bindings_compile_for_cuda(tmp_path):
    """The CUDA half of the bindings, against the stable ABI. Nothing is linked: a CPU torch has no CUDA shim."""
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_functions")
    compiler = build["compiler"]()
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    headers = [*include_paths(), pybind11.get_include(), sysconfig.get_path("include")]
    flags = [*build["cxx_flags"](), *build["INCLUDES"], *(f"-isystem{p}" for p in headers)]
    defines = [f"-DTORCH_TARGET_VERSION={build['TORCH_TARGET']}", "-DUSE_CUDA", "-DSEQFUSE_CUDA"]
    defines.append('-DSEQFUSE_TORCH="2.11.0"')
    for source in build["sources"]()["bindings"]:
        run(compiler, *flags, *defines, "-fsyntax-only", source, cwd=ROOT)
