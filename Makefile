# Every target does its own set-up: a fresh clone needs nothing but python3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
# Two busy-waiting OpenMP threads fight over a shared core; sleeping ones do not.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test test-slow test-docs test-gpu check docs format bench clean

quickstart: $(READY)
	$(BIN)/opdkit quickstart

test: $(READY)
	$(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow --timeout 1200

# Every command of docs/ and the README, in a copy of the repository; those of more than DOCS_MINUTES are left out.
test-docs: $(READY)
	$(BIN)/python -m pytest -m docs -n 0 -rs -s tests/docs

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu -n 0

check: $(READY) docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/opdkit check $$(find recipes -name "*.toml")

# The site, in site/. A link that leads nowhere, and a page that the menu lacks, stop it.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/loss_memory.py

clean:
	rm -rf $(VENV) runs site build dist *.egg-info

# torch first and pinned: an open range would draw gigabytes of CUDA packages onto a CPU machine.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,tensorboard]'
	touch $@

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@
