# `make demo` and `make test` set up everything they need in .venv; see `make help`.
TORCH ?= torch==2.13.0
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
export OMP_WAIT_POLICY := passive

.PHONY: help demo test lint bench train clean
help:
	@echo "make demo   sample digits with the shipped ensemble by every rule; writes a picture and figures"
	@echo "make test   run the tests"
	@echo "make lint   run ruff, pyright and clang-format"
	@echo "make bench  run the benchmarks"
	@echo "make train  train the demo's members again"
	@echo "TORCH='torch==2.12.0' or TORCH_INDEX=URL choose another torch"

.venv/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; pass PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@touch $@

.venv/dev: .venv/python pyproject.toml setup.py
	$(BIN)/python -m pip install -q -e ".[dev]"
	@touch $@

.venv/demo: .venv/python pyproject.toml setup.py
	$(BIN)/python -m pip install -q -e ".[demo]"
	@touch $@

demo: .venv/demo
	$(BIN)/fastens demo

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*' | xargs -r $(BIN)/clang-format --dry-run -Werror
	$(BIN)/pyright

bench: .venv/dev
	$(BIN)/fastens bench

train: .venv/demo
	$(BIN)/python -m fastens.demo.train

clean:
	rm -rf build dist *.egg-info fastens/_lib .venv
