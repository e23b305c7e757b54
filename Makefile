# Each target creates the environment it needs: .venv, from pyproject.toml and constraints.txt.
#   make train        pretrain configs/tiny.py (ARGS="steps=50 workdir=runs/a" for overrides)
#   make test         lint and all tests that need neither an accelerator nor hours
#   make test-fast    the tests that take under five minutes
#   make test-full    all of that and the long checks, before a release; EXTRAS names the compilers to
#                     install for it: tpu (default), tpu,cuda (4 GB), tpu,cuda,tokamax
#   make bench        the speed figures of docs/benchmarks.md
#   make lint
#   make audit        known vulnerabilities of the pinned dependencies
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= tpu
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

# An allocator that keeps its memory: 15 to 30% more tokens per second on CPU (glibc only).
CPU_TUNING := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_ARENA_MAX=1 \
	MALLOC_TOP_PAD_=268435456 GLIBC_TUNABLES=glibc.malloc.hugetlb=1

.PHONY: train test test-fast test-full bench lint audit clean

train: $(VENV)/.installed
	$(CPU_TUNING) $(BIN)/moejax train configs/tiny.py $(ARGS)

test: lint
	$(PYTEST) -m "not tpu and not gpu and not aot and not slurm and not long"

test-fast: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow and not tpu and not gpu and not aot and not slurm and not long"

test-full: lint
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,$(EXTRAS)]"
	$(PYTEST)

bench: $(VENV)/.installed-dev
	$(BIN)/python tools/bench_data.py
	$(CPU_TUNING) $(BIN)/python tools/bench_train.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

audit: .venv-audit/.installed
	.venv-audit/bin/python tools/audit_dependencies.py

# Of its own: what it needs is no dependency of moejax.
.venv-audit/.installed:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit==2.10.1
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .venv-audit .cache .pytest_cache .ruff_cache
