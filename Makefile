# `make demo` and `make test` each set up everything they need in .venv, then run.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench clean

demo: .venv/.demo
	$(BIN)/python experiments/lecture39/mini_ldm.py --run-dir runs/mini-ldm

test: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2

bench: .venv/.test
	$(BIN)/python experiments/benchmarks/cpu.py

lint: .venv/.test
	$(BIN)/ruff check .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e '.[mnist]'
	touch $@

.venv/.test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e '.[test]'
	touch $@ .venv/.demo

clean:
	rm -rf .venv build *.egg-info
