# One virtual environment for everything; `make demo` and `make test` set it up and can be run again.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc synkern -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') CMakeLists.txt pyproject.toml constraints.txt

.PHONY: help demo test test-slow test-gpu benchmark-gpu lint types benchmark benchmark-smoke sanitize wheel wheel-cuda clean

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/'

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --editable ".[dev,demo]"
	touch $@

demo: $(VENV)/.installed ## Compare the methods on film reviews with noisy labels
	$(BIN)/synkern demo

test: $(VENV)/.installed ## The tests that need no GPU and no patience
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -q

test-slow: $(VENV)/.installed ## The long ones
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.installed ## Everything that a GPU backend is a parameter of, and what only a GPU can show; needs nvcc
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --no-deps -C cmake.define.SYNKERN_CUDA=ON --editable .
	$(BIN)/python -m pytest -m gpu -q

lint: $(VENV)/.installed ## ruff
	$(BIN)/ruff check .

types: $(VENV)/.installed ## mypy
	$(BIN)/mypy

benchmark: $(VENV)/.installed ## The table of benchmarks/results; a quiet machine, ten minutes
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.meta

benchmark-gpu: $(VENV)/.installed ## Losses, contraction and the scored step on a GPU
	$(BIN)/python -m benchmarks --device cuda
	$(BIN)/python -m benchmarks.meta --device cuda

benchmark-smoke: $(VENV)/.installed ## Does every benchmark run?
	$(BIN)/python -m benchmarks --smoke
	$(BIN)/python -m benchmarks.meta --smoke

sanitize: $(VENV)/.installed ## The CPU kernels under the address and undefined-behaviour sanitizers
	$(BIN)/python -m pytest -m slow tests/test_native.py

wheel: $(VENV)/.torch ## A wheel in dist/, for every torch from 2.11
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

wheel-cuda: $(VENV)/.torch ## The same with the CUDA kernels; needs nvcc, no GPU
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip wheel --no-deps -C cmake.define.SYNKERN_CUDA=ON --wheel-dir dist .

clean:
	rm -rf build dist $(VENV)
