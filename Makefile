# Every target does its own set-up: it needs Python 3.11 or 3.12 with venv, and makes .venv itself.
# Nothing is compiled: a C++ compiler is optional (README.md), and tests that need one are skipped where there is none.
# PYTHON=/path/to/python chooses the interpreter; CONSTRAINTS= installs the newest versions in place of the tested ones.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
CONSTRAINTS ?= constraints.txt
# Quiet but for errors. Files are compiled when they are first imported; compiling all of them takes a minute more.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input --no-compile \
	$(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# Where this is set, as in many container images, every process would compile what it imports anew: 7 of 10 seconds.
unexport PYTHONDONTWRITEBYTECODE
# Options of tools/quickstart.py and pytest, as in: make quickstart ARGS=--fresh, make test ARGS="-m 'not slow'"
ARGS ?=
# Tests run on every core, a file at a time; where ARGS names files or folders of them, in one process: it starts sooner.
WORKERS ?= $(if $(findstring tests/,$(ARGS)),0,logical)
SPREAD := --maxprocesses 8 --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(SPREAD)

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-scenarios coverage test-grid torture check bench bare clean

help:
	@echo "make quickstart  the whole line on a small corpus: data, training, evaluation, export, report (10 minutes)"
	@echo "make test        every behaviour (9 minutes on 2 cores)"
	@echo "make test-scenarios  what takes many programs: a SLURM cluster, kills, the whole line, layouts (8 minutes)"
	@echo "make coverage    both, with the lines and branches that they reach"
	@echo "make test-grid   every parallel layout against one process; writes docs/parity.md (45 minutes)"
	@echo "make torture     kill runs and damage checkpoints, write docs/reliability.md (30 minutes)"
	@echo "make check       ruff, its formatter, mypy"
	@echo "make bench       small ratios against stored ones: branch, peers, decoding, data (10 minutes); exit code 1: one is slower"
	@echo "make bare        as root, with debootstrap: make test on a Debian 12 with only what README.md asks for; EXTRA=..., TARGET=..."
	@echo "make clean       remove .venv, caches and quickstart/"
	@echo "Each makes .venv by itself. PYTHON=python3.12 chooses the interpreter, ARGS=... adds options to the command."

quickstart: $(VENV)/.installed
	@$(BIN)/python tools/quickstart.py $(ARGS)

test-grid: $(VENV)/.installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m grid
	@OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.parity_grid --output docs/parity.md $(ARGS)

# Kills hundreds of processes and takes half an hour on an idle machine; the tests hold a short version.
torture: $(VENV)/.installed
	@OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.torture --output docs/reliability.md $(ARGS)

test: $(VENV)/.installed
	@$(PYTEST) $(ARGS)

test-scenarios: $(VENV)/.installed
	@$(PYTEST) -m scenario $(if $(findstring tests/,$(ARGS)),,tests/scenarios) $(ARGS)

# Of every process that they start, too.
coverage: $(VENV)/.installed
	@rm -f .coverage .coverage.*
	@OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest -n logical $(SPREAD) -q -m 'not grid' $(ARGS)
	@$(BIN)/python -m coverage combine -q && $(BIN)/python -m coverage report --skip-covered --sort=cover

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	@OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/guard.py $(ARGS)

# ARGS, EXTRA and TARGET of the command line are in its environment.
bare:
	@tests/bare.sh

clean:
	rm -rf $(VENV) .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info quickstart

# DeepSpeed is built from source and looks at torch and setuptools while it is: they come first, and builds use them.
$(VENV)/.installed: setup.py pyproject.toml $(CONSTRAINTS)
	@python=; for candidate in $(or $(PYTHON),python3.11 python3.12 python3); do \
		if $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; \
		then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "error: Python 3.11 or 3.12 is needed; missing or another version: $(or $(PYTHON),python3.11 python3.12 python3)." \
			"On Debian 12 and Ubuntu 24.04: apt install git make python3-venv; elsewhere make PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	if ! $$python -c 'import venv, ensurepip' 2>/dev/null; then \
		echo "error: $$python cannot make virtual environments. On Debian and Ubuntu: apt install $${python##*/}-venv" >&2; exit 1; \
	fi; \
	echo "installing into $(VENV) (2 to 4 minutes; again only when setup.py or constraints.txt change)"; \
	$$python -m venv $(VENV)
	@echo "  torch"; $(PIP) torch setuptools wheel numpy
	@echo "  deepspeed, transformers and the rest"; $(PIP) --no-build-isolation -e ".[dev]"
	@touch $@
