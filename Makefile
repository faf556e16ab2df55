# Every verb works as the first command after a clone: it sets up .venv by itself, and again when what it was made from
# changes. pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) are honoured. ARGS goes to the command behind a verb:
#   make train ARGS="--train.steps 200"
# On a machine whose Python brings torch for its GPU, `make gpu` uses that Python as it is and installs nothing.

PYTHON ?= python3
ARGS ?=
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE := CMakeLists.txt $(wildcard kernels/*/*.cpp kernels/*/*.cu kernels/lib/csrc/*)

.PHONY: help train test test-full check check-kernels bench gpu clean
help:
	@echo "make train          train the tiny preset on real text, then sample from it"
	@echo "make test           the test suite"
	@echo "make test-full      the test suite with the full product of kernel options"
	@echo "make check          formatting, lint and types"
	@echo "make check-kernels  compile every Triton kernel for three GPUs: registers, spills, budgets, forecast"
	@echo "make bench          tokens/s against the same model in plain PyTorch and against Hugging Face's GPT-2"
	@echo "make gpu            measure a GPU with \$$(PYTHON) as it is: no .venv, no network"
	@echo "make clean          remove builds and caches; .venv, runs and data stay"

$(INSTALLED): pyproject.toml setup.py constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info < (3, 11) and \
	  sys.exit(f"tritium needs Python 3.11 or later and {sys.executable} is {v}; use make PYTHON=/path/to/python3")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV)"
	@cmake=; command -v cmake > /dev/null || cmake=cmake; \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools $$cmake
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test,dev]'
	@if [ -e kernels/_native_missing.txt ]; then echo "no native kernels: $$(cat kernels/_native_missing.txt)" >&2; fi
	@touch $@

train: $(INSTALLED)
	@$(BIN)/tritium train tiny $(ARGS)

test: $(INSTALLED)
	@$(BIN)/python -P tests/lanes.py $(ARGS)

test-full: $(INSTALLED)
	@$(BIN)/python -P tests/lanes.py --full $(ARGS)

# mypy cannot see through an editable install's map of folders, so it gets the same names as links
check: $(INSTALLED)
	@mkdir -p build/names/tritium
	@for folder in engine kernels benchmarks; do ln -sfn ../../../$$folder build/names/tritium/$$folder; done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPYPATH=build/names $(BIN)/mypy -p tritium.kernels -p tritium.engine -p tritium.benchmarks

# the oldest Triton that is supported, in a folder put before .venv's packages, so that only Triton differs
OLDEST := 3.6.0
LANE := .venv-triton36
$(LANE)/.installed: | $(INSTALLED)
	@rm -rf $(LANE)
	@echo "installing triton $(OLDEST) into $(LANE)"
	@$(BIN)/python -m pip install --quiet --no-deps --target $(LANE) triton==$(OLDEST)
	@touch $@

check-kernels: $(INSTALLED) $(LANE)/.installed
	@env -u TRITON_INTERPRET $(BIN)/python -P -m tritium.kernels.aot --also $(LANE) $(ARGS)

bench: $(INSTALLED)
	@$(BIN)/tritium bench peers $(ARGS)

gpu:
	@$(PYTHON) -P benchmarks/gpu.py $(ARGS)

clean:
	rm -rf build dist *.egg-info kernels/_native.so kernels/_native_missing.txt $(INSTALLED)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)*' -prune -exec rm -rf {} +
