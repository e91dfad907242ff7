# Two commands matter: `make train` and `make test`. Both set everything up first, in .venv, and only once.

VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints-dev.txt
# The first interpreter on this machine that is new enough; PYTHON=/some/python chooses another.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Everything that is installed, and what the build itself is made with, comes in the pinned version.
INSTALL := $(PIP) install --quiet --constraint $(CONSTRAINTS) --build-constraint $(CONSTRAINTS)
# Extra arguments: make train ARGS="--steps 50", make test ARGS="-k denominator".
ARGS ?=
# Tests run in one process more than there are cores, as some wait for a browser or for ranks; a file's tests in one of
# them, in the order of tests/conftest.py. make test TESTERS= runs all in one.
TESTERS ?= --numprocesses=$(shell $(PYTHON) -c 'import os; print(min(8, 1 + (os.cpu_count() or 1)))') --dist=loadfile --no-loadscope-reorder

# Byte code is kept, also where the machine is told not to: each process of the tests would compile everything again.
unexport PYTHONDONTWRITEBYTECODE

# What is installed, as one stamp each: made again when the project file or a pinned version changes.
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev
BENCH := $(VENV)/.installed-bench
INTEGRATIONS := $(VENV)/.installed-integrations
DOCS := $(VENV)/.installed-docs
PACKAGE := $(VENV)/.installed-package

.PHONY: help train test test-integrations browser lint bench gpu docs package format clean

help: ## List the commands.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 32

train: $(RUNTIME) ## Set up, then train a small language model on real text.
	$(BIN)/microbatch train $(ARGS)

test: lint browser ## Set up, then lint, types, contracts between the rooms, and the whole suite.
	$(BIN)/python -m pytest $(TESTERS) --ignore=tests/integrations --ignore=src/microbatch/integrations $(ARGS)

test-integrations: $(INTEGRATIONS) ## Set up with the frameworks, then the adapters' types and tests.
	$(BIN)/pyright --warnings src/microbatch/integrations tests/integrations
	$(BIN)/python -m pytest $(TESTERS) tests/integrations $(ARGS)

browser: ## Install Chromium for the guide's tests, where that may be done; they say so and are skipped where not.
	@command -v chromium chromium-browser google-chrome >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && \
		DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends chromium >/dev/null; } || \
		echo "There is no Chromium, and it may not be installed here: the guide's browser tests are skipped."

lint: $(DEV) ## Only the first three of those.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --warnings
	$(BIN)/lint-imports

bench: $(BENCH) ## Set up with the peers, then measure against them.
	$(BIN)/python -m benchmarks $(ARGS)

# Nothing is set up: PyTorch with CUDA, numpy and pytest are enough, and there may be no network.
# The Python that is named, or else that of .venv, or else the first one.
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))
gpu: ## Prove and measure everything on this machine's GPU, in eight minutes; ARGS="--device cpu" is the dry run.
	@test -n "$(GPU_PYTHON)" || { echo "No Python 3.11 or newer was found: make gpu PYTHON=/path/to/python"; exit 1; }
	PYTHONPATH=src $(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

docs: $(DOCS) ## Set up, then build the documentation in build/docs; ARGS="-b linkcheck" asks the network about its links.
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet $(if $(findstring -b,$(ARGS)),,-b html) $(ARGS) -c docs . build/docs
	@echo "Open build/docs/index.html"

package: $(PACKAGE) ## Set up, then build the distribution in dist/, and check it as the package index does.
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(BIN)/pyroma --min=10 dist/*.tar.gz

format: $(DEV) ## Mend what can be mended, and format.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## Remove the virtual environment, caches and built files; runs/ stays.
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# pip rather than python stands for the environment: where `venv` fails half-way, python is there and pip is not.
$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found; say where one is: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml $(CONSTRAINTS) | $(BIN)/pip
	@echo "Setting up $(VENV); the first time, this downloads PyTorch."
	$(PIP) install --quiet --constraint $(CONSTRAINTS) pip
	$(INSTALL) --editable '.[jobs,guide]'
	@touch $@

$(DEV): $(RUNTIME)
	$(INSTALL) --group dev
	@touch $@

$(DOCS): $(RUNTIME)
	$(INSTALL) --group docs
	@touch $@

$(PACKAGE): $(RUNTIME)
	$(INSTALL) --group package
	@touch $@

$(BENCH): $(RUNTIME)
	$(INSTALL) --group bench
	@touch $@

$(INTEGRATIONS): $(DEV)
	$(INSTALL) --group integrations
	@touch $@
