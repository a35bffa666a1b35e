# `make demo` and `make test` work on a bare machine: they install all that they need into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := out/demo

.PHONY: install demo test lint bench sanitize neon clean

install: $(STAMP)

# The multimodal part of llama.cpp is not used here, and takes a third of its build time.
$(STAMP): pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	CMAKE_ARGS="-DMTMD_BUILD=OFF" $(BIN)/python -m pip install --quiet --group dev
	CMAKE_ARGS="-DMTMD_BUILD=OFF" $(BIN)/python -m pip install --quiet --editable .
	touch $@

demo: install
	$(BIN)/rs-export run --out $(DEMO)

test: lint
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*

bench: install
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build out
