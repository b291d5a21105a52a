# Two commands matter: `make demo` and `make test`. Both set up .venv first, from a fresh clone.
#   TORCH=...   what to install as torch (default torch==2.13.0; not used if $(PYTHON) already imports torch >= 2.11)
#   PYTHON=...  the interpreter to build on (default python3, 3.11 or newer)
#   ARGS=...    passed on: make demo ARGS="--resume", make test ARGS="-k lstm", make bench ARGS="gru --quick"
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check

BUILD_TOOLS := "setuptools>=68" wheel "pybind11>=2.12" ninja
RUNTIME := numpy safetensors tokenizers typer rich
TESTING := pytest pytest-benchmark hypothesis expecttest transformers "sacrebleu>=2" seqeval rouge-score peft matplotlib

.PHONY: demo test lint bench claims clean

demo: $(VENV)/.installed
	$(VENV)/bin/seqfuse demo $(ARGS)

# The Triton kernels run twice: interpreted (a process of its own, the switch is read at import) and compiled for GPUs.
# Files of tests run side by side, at most four at once, where pytest-xdist could be installed.
SIDE_BY_SIDE = $(shell $(PY) -c "import os, xdist; print('-n', min(4, os.cpu_count()), '--dist loadfile')" 2>/dev/null)
test: $(VENV)/.testing
	$(PY) -m pytest tests -q $(SIDE_BY_SIDE) $(ARGS)
	TRITON_INTERPRET=1 $(PY) -m pytest tests -q -m interpret $(SIDE_BY_SIDE) $(ARGS)

lint: $(VENV)/.testing
	@test -x $(VENV)/bin/ruff || $(PIP) --ignore-installed ruff
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(VENV)/.testing
	$(VENV)/bin/seqfuse bench $(ARGS)

# What the recipes claim, trained and judged; writes docs/claims.md. A run that was stopped goes on.
claims: $(VENV)/.testing
	$(PY) -m seqfuse.benchmarks.claims $(ARGS)

clean:
	rm -rf $(VENV) build dist pyext/*.egg-info pyext/seqfuse/*.so

HAS_TORCH := import sys, torch; v = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])); sys.exit(v < (2, 11))

# A torch that $(PYTHON) already imports is shared by a path file, which also works where $(PYTHON) is a venv's own.
WHERE_TORCH := import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])
SITE := import site; print(site.getsitepackages()[0])

$(VENV)/.torch:
	@if [ "$(origin TORCH)" = "file" ] && $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then \
	  echo "Using the torch of $(PYTHON)"; $(PYTHON) -m venv $(VENV) && \
	  $(PYTHON) -c '$(WHERE_TORCH)' > "$$($(PY) -c '$(SITE)')/torch_of_the_parent.pth"; \
	else \
	  echo "Installing $(TORCH) into $(VENV)"; $(PYTHON) -m venv $(VENV) && $(PIP) -U pip && $(PIP) "$(TORCH)"; \
	fi
	@touch $@

# Only what is missing is installed, so a machine that has everything needs no network.
$(VENV)/.installed: $(VENV)/.torch setup.py pyproject.toml $(shell find csrc pyext/bindings pyext/autograd -type f 2>/dev/null)
	$(PIP) $(BUILD_TOOLS) $(RUNTIME)
	$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

# Triton comes with a CUDA torch; elsewhere it is installed for its interpreter and its compiler.
$(VENV)/.testing: $(VENV)/.installed
	$(PIP) $(TESTING)
	$(PY) -c "import xdist" 2>/dev/null || $(PIP) pytest-xdist || echo "No pytest-xdist here: the tests run one by one"
	$(PY) -c "import triton" 2>/dev/null || $(PIP) "triton>=3.6,<3.10" || echo "No Triton here: its tests will be skipped"
	@touch $@
