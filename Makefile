# Everything a contributor runs, from a fresh clone: `make demo`, `make test`, `make lint`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The torch to train with. On a machine with GPUs choose the build for its driver: `make venv TORCH=torch==2.11.0+cu130`.
# A CUDA build brings a Triton of its own, and the kernels are tested with 3.6.0, that of torch 2.11: pip refuses another.
TORCH ?= torch==2.13.0

# The first interpreter that is new enough; the tested one comes first.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# Test files run side by side, those of many processes first: they wait much of their time, so there is one more than two
# cores. A file's tests share what they made.
WORKERS ?= 3

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
STAMP := $(VENV)/.installed

.PHONY: help venv demo test test-fast lint docs docs-serve format wheel clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP)  ## .venv with the package (editable), its dependencies and the developer tools

# DeepSpeed comes as source only and imports torch while it is built, hence torch first and no build isolation. Naming
# torch again in the second command keeps pip from trading it for another build. pip would compile to bytecode file after
# file; afterwards every core does, and fails for templates in packages that are no Python, which pip passes over too.
$(STAMP): pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] || { echo "no Python 3.11 or newer found; install one or give its path: make venv PYTHON=…" >&2; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@if ! command -v nvidia-smi >/dev/null \
	    && $(PIP) install --dry-run --quiet --report - '$(TORCH)' | grep -E '"name": "(nvidia|cuda)-' >/dev/null; then \
	  echo "$(TORCH) is a CUDA build in your package index and this machine has no GPU: several GB for nothing." >&2; \
	  echo "Point pip at an index of CPU builds (PIP_EXTRA_INDEX_URL) and run: make venv TORCH=torch==2.13.0+cpu" >&2; \
	  exit 1; \
	fi
	$(PIP) install --no-compile '$(TORCH)' 'setuptools>=77' wheel 'numpy>=1.26' -c constraints.txt
	DS_BUILD_OPS=0 $(PIP) install --no-compile --no-build-isolation '$(TORCH)' -e '.[dev,docs]' -c constraints.txt
	$(BIN)/python -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib || true
	@touch $@

demo: $(STAMP)  ## data, tokenizer, both stages and samples on this machine, in minutes
	$(BIN)/hmar-mega demo $(ARGS)

test: $(STAMP)  ## the whole suite, WORKERS test files at a time
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadscope --no-loadscope-reorder

test-fast: $(STAMP)  ## the suite without slow tests and without tests that start several processes
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadscope --no-loadscope-reorder -m "not slow and not dist"

lint: $(STAMP)  ## ruff and mypy, as the pre-commit hooks run them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# NO_MKDOCS_2_WARNING: Material for MkDocs announces its successor at every build otherwise. Not --quiet: warnings that
# are not shown are not counted either, and then nothing is strict.
docs: $(STAMP)  ## the documentation in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir site
	@echo "open site/index.html"

docs-serve: $(STAMP)  ## the documentation at http://127.0.0.1:8000, built anew at every change; with search
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

format: $(STAMP)  ## rewrite the sources as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# setuptools packs whatever earlier builds left in build/ and listed in *.egg-info: both go first.
wheel: $(STAMP)  ## dist/hmar_mega-*.whl
	rm -rf build *.egg-info
	$(PIP) wheel . --no-deps --no-build-isolation --wheel-dir dist
	rm -rf build *.egg-info

clean:  ## remove build leftovers and tool caches; .venv and runs stay
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
