# `make demo` and `make test` each set up everything they need in .venv, then run.
PYTHON ?= python3
BIN := .venv/bin

# The newest Python and JAX that pyproject.toml allows, and the lowest, each in a venv of its own, and the tests that
# depend on them most.
NEWEST := .venv-newest
NEWEST_PYTHON ?= python3.13
LOWEST := .venv-lowest
LOWEST_PYTHON ?= python3.11
VERSION_TESTS := tests/test_host.py tests/nn tests/checkpoints $(addprefix tests/training/test_,store.py train_step.py optimizer.py)

.PHONY: demo test test-thorough test-newest test-lowest test-optimized test-core lint types docs bench faults clean

demo: .venv/.demo
	$(BIN)/python -m experiments.lecture39.mini_ldm --run-dir runs/mini-ldm

# Compiled in the quick way (see tests/conftest.py), without the slow tests that tests/thorough.txt names.
test: .venv/.test lint
	$(BIN)/python -m pytest -n 2 -m "not thorough"

# Those.
test-thorough: .venv/.test
	$(BIN)/python -m pytest -n 2 -m thorough

# Without PyTorch, so that a release of JAX is never held up by it.
test-newest: $(NEWEST)/.test-core
	$(NEWEST)/bin/python -c "import sys, jax; print('Python', sys.version.split()[0], 'with JAX', jax.__version__)"
	$(NEWEST)/bin/python -m pytest -n 2 -m "not torch and not thorough" $(VERSION_TESTS)

test-lowest: $(LOWEST)/.test-core
	$(LOWEST)/bin/python -c "import sys, jax; print('Python', sys.version.split()[0], 'with JAX', jax.__version__)"
	$(LOWEST)/bin/python -m pytest -n 2 -m "not torch and not thorough" $(VERSION_TESTS)

# All of both, compiled as users run it: weekly, and before a release.
test-optimized: .venv/.test
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -n 2

# What needs no PyTorch.
test-core: .venv/.test-core
	$(BIN)/python -m pytest -n 2 -m "not torch and not thorough"

lint: .venv/.test-core
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: .venv/.test
	$(BIN)/python -m experiments.benchmarks.cpu

# Kills, damaged files, mistakes in command lines and in calls: about 12 minutes.
faults: .venv/.test
	$(BIN)/python -m experiments.faults

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e '.[demo]'
	touch $@

.venv/.test-core: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e '.[test-core]'
	touch $@ .venv/.demo

$(NEWEST)/.test-core: pyproject.toml
	$(NEWEST_PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install -e '.[test-core]'
	touch $@

$(LOWEST)/.test-core: pyproject.toml tests/lowest.txt
	$(LOWEST_PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -e '.[test-core]' -c tests/lowest.txt
	touch $@

# torch-fidelity and lpips ask for torchvision, which the tests do not need: see tests/models/torch_fidelity_reference.py
.venv/.test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e '.[test]'
	$(BIN)/python -m pip install --no-deps torch-fidelity==0.4.0 lpips==0.1.4
	touch $@ .venv/.test-core .venv/.demo

.venv/.docs: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e '.[docs]'
	touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@ .venv/.test .venv/.test-core .venv/.demo .venv/.docs

clean:
	rm -rf .venv $(NEWEST) $(LOWEST) build site *.egg-info
