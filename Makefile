# The two commands of the README are `make quickstart` and `make test`; the rest is for developers.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help quickstart test lint types format soak benchmarks ladder clean

help:
	@echo "make quickstart   install, train a small EVA-CLIP on handwritten digits, score it, write a report"
	@echo "make test         install what the tests need, then lint, type-check and run them"
	@echo "make soak         the long tests, those of the search page in a chromium among them"
	@echo "make benchmarks   every benchmark of this machine, results to benchmarks/results/"
	@echo "make ladder       CLIP teaches EVA, EVA starts CLIP, twice, on CIFAR-10 with three seeds; goes on when stopped"

# One line for each thing that is missing, before pip says it in fifty.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "missing: $(PYTHON) (3.11 or newer); on Debian or Ubuntu: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "too old: $(PYTHON) is $$($(PYTHON) -V), evaclip needs 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "missing: the venv module; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@command -v g++ >/dev/null || { echo "missing: g++; on Debian or Ubuntu: apt-get install g++" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/installed-test: pyproject.toml $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

$(VENV)/installed-soak: pyproject.toml $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,soak]'
	@touch $@

quickstart: $(VENV)/installed
	$(BIN)/evaclip quickstart

test: $(VENV)/installed-test lint types
	$(BIN)/python -m pytest -m "not soak and not gpu"

lint: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/installed-test
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

soak: $(VENV)/installed-soak
	$(BIN)/python -m pytest -m "soak"

benchmarks: $(VENV)/installed-test
	@for script in $(filter-out benchmarks/ladder.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

ladder: $(VENV)/installed
	$(BIN)/python benchmarks/ladder.py

clean:
	rm -rf $(VENV) runs dist build
