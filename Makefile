# `make help` lists the verbs. Each one makes what it needs: .venv is created on first use.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
BIN := .venv/bin
# A CUDA machine gets the CUDA builds of torch and vLLM; anything else the CPU builds.
KIND := $(shell if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then echo gpu; else echo cpu; fi)
LOCK := .ci/requirements-$(KIND).txt
INSTALLED := .venv/.installed-$(KIND)
ARGS ?=

.PHONY: help install train test quick lint types docs bench bench-gpu mutants nightly parity lock check-lock clean

help:  ## List the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18
	@echo; echo "  ARGS=\"...\" adds arguments, as in: make train ARGS=\"--recipe quickstart --seed 1\""

install: $(INSTALLED)  ## Create .venv with the pinned environment

$(INSTALLED): $(LOCK) pyproject.toml
	@echo "Installing the pinned $(KIND) environment into .venv (a few minutes, once) ..."
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is required, this is %s" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@if [ $(KIND) = gpu ]; then .ci/check-driver; fi
	@# Made anew where it is unfinished, or was made for the other kind of machine.
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1 || ls .venv/.installed-* 2>/dev/null | grep -qv -- '-$(KIND)$$'; then \
	    $(PYTHON) -m venv --clear .venv || { \
	        echo "No virtual environment can be made: install python3-venv, or name another Python: make $(MAKECMDGOALS) PYTHON=python3.12"; \
	        exit 1; }; fi
	@.ci/install $(LOCK)
	@touch $@

train: $(INSTALLED)  ## Train with GRPO; without ARGS the embedded quickstart
	$(BIN)/python drivers/train.py $(ARGS)

test: $(INSTALLED)  ## The whole test suite: what CI runs
	.ci/test $(ARGS)

quick: $(INSTALLED)  ## The fast tests, with few examples of each property
	HYPOTHESIS_PROFILE=quick .ci/test -m "not slow and not medium" $(ARGS)

lint: $(INSTALLED)  ## Formatting, style and layers of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(INSTALLED)  ## Static types, strict
	$(BIN)/mypy

docs: $(INSTALLED)  ## Build the documentation into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file .ci/mkdocs.yml --site-dir ../site

bench: $(INSTALLED)  ## Speed and memory, as ratios within one run; beside TRL, verl and others after `make parity`
	if [ -e .venv-parity/.installed ]; then python=.venv-parity/bin/python; else python=$(BIN)/python; fi; \
	$$python -m tests.benchmarks $(ARGS)

bench-gpu: $(INSTALLED)  ## The first run on a GPU: tests, head, step, vLLM and ten steps of training, in 9 minutes
	if [ -e .venv-parity/.installed ]; then python=.venv-parity/bin/python; else python=$(BIN)/python; fi; \
	$$python -m tests.benchmarks.gpu $(ARGS)

mutants: $(INSTALLED)  ## Break library and programs by hand; every break must turn a test red
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.mutants $(ARGS)

nightly: $(INSTALLED)  ## Kill runs, fuzz readers and graders, train by all methods: an hour; ARGS is the number of kills
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.nightly.kills $(or $(ARGS),200)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.nightly.fuzz
	.ci/test -m nightly --nightly
	$(BIN)/python -m tests.nightly.methods

.venv-parity/.installed: .ci/requirements-parity.txt .ci/install-parity $(INSTALLED)
	@echo "Installing TRL, verl and Liger into .venv-parity (a minute, once) ..."
	@.ci/install-parity
	@touch $@

parity: .venv-parity/.installed  ## Run TRL, verl and Liger beside ours; write docs/parity.md
	OMP_WAIT_POLICY=PASSIVE .venv-parity/bin/python -m tests.parity.make_page
	OMP_WAIT_POLICY=PASSIVE .venv-parity/bin/python -m pytest -q tests/parity $(ARGS)

lock: $(INSTALLED)  ## Resolve the pinned environments anew
	$(BIN)/pip install --quiet uv
	PATH="$(CURDIR)/$(BIN):$$PATH" .ci/lock

check-lock: $(INSTALLED)  ## Resolve them without a change, and look for files that two wheels own; needs a network
	$(BIN)/pip install --quiet uv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python .ci/check-lock

clean:  ## Remove what the verbs made, runs excepted
	rm -rf .venv .venv-parity site .pytest_cache .mypy_cache .ruff_cache .hypothesis
