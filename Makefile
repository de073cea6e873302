# Each target sets up what it needs. `make help` lists them.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# With this variable no process keeps compiled modules: importing Megatron takes 20 s instead of 6.
unexport PYTHONDONTWRITEBYTECODE
# One thread per process: a run is several processes, and on CPU they share the cores.
export OMP_NUM_THREADS ?= 1

VENV := .venv
PYTHON_BIN := $(VENV)/bin/python
# Two workers: most of a test file's time is imports and waiting for processes.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
ON_CPU := not gpu1 and not gpu2 and not gpu4 and not runs and not cluster and not trust and not sglang
ON_GPU := gpu1 or gpu2 or gpu4 or trainer or sglang
# Where `make test-trust` writes its figures.
TRUST_OUT ?= $(CURDIR)/runs/trust
UV := $(shell command -v uv || echo $(VENV)/bin/uv)
COMPILE := $(UV) pip compile pyproject.toml --python-version 3.12 --quiet --no-emit-index-url \
	--no-annotate --custom-compile-command "make lock" --extra dev

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/\1|\2/' \
	  | while IFS='|' read -r name text; do printf '  %-16s %s\n' "$$name" "$$text"; done

.PHONY: setup
setup: ## make .venv from requirements/cpu.lock
	@bash scripts/setup.sh cpu

.PHONY: setup-gpu
setup-gpu: ## make .venv from requirements/gpu.lock, with SGLang
	@bash scripts/setup.sh gpu

.PHONY: setup-sglang-cpu
setup-sglang-cpu: setup ## put the stock SGLang server, as it runs on a CPU, into .sglang-cpu
	@bash scripts/setup_sglang_cpu.sh

.PHONY: quickstart
quickstart: setup ## learn the middle-letter task: SFT, then GRPO, on two CPU cores
	@env -u PYTHON bash examples/quickstart/run.sh # PYTHON may name the interpreter for setup

# Cards are hidden: Megatron would use them, and these tests are about the CPU.
.PHONY: test
test: setup ## all tests that need no GPU
	CUDA_VISIBLE_DEVICES= $(PYTHON_BIN) -m pytest -m "$(ON_CPU)" $(PYTEST_ARGS)

.PHONY: test-runs
test-runs: setup ## whole runs of examples, plugins, resumes, disks and engines of others, deaths of engines, on a CPU
	CUDA_VISIBLE_DEVICES= $(PYTHON_BIN) -m pytest -m runs $(PYTEST_ARGS) tests/contracts tests/integration

.PHONY: test-sglang
test-sglang: setup-sglang-cpu ## the engine protocol and train.py on the stock SGLang server, on a CPU
	CUDA_VISIBLE_DEVICES= $(PYTHON_BIN) -m pytest -m sglang tests/contracts tests/integration

.PHONY: test-cluster
test-cluster: setup ## train.py on a Ray cluster that runs already, as a Ray job, and on two nodes
	$(PYTHON_BIN) -m pytest -m cluster tests/integration

.PHONY: test-trust
test-trust: setup ## kill runs and engines at random moments; results go to $(TRUST_OUT)
	mkdir -p $(TRUST_OUT)
	SLIME_TRUST_OUT=$(TRUST_OUT) $(PYTHON_BIN) -m pytest -m trust -v tests/trust

.PHONY: test-gpu
test-gpu: setup-gpu ## the tests for GPUs, and the trainer's own on them; those that need more than there are skip
	SLIME_TEST_DEVICE=cuda $(PYTHON_BIN) -m pytest -m "$(ON_GPU)"

.PHONY: check
check: setup ## format, lint, types, and the floors of docs/architecture.md
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

.PHONY: format
format: setup ## rewrite files in the house style, with the fixes ruff is sure of
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

.PHONY: lock
lock: ## resolve requirements/*.lock anew: cpu within gpu, so shared versions agree
	$(COMPILE) --upgrade --extra gpu -o requirements/gpu.lock
	$(COMPILE) --upgrade --universal -c requirements/gpu.lock -o requirements/cpu.lock
	@# The names of sglang-cpu.lock are chosen by hand; their versions are those of gpu.lock.
	awk -F== 'NR == FNR { line[$$1] = $$0; next } /^#/ || !($$1 in line) { print; next } { print line[$$1] }' \
	  requirements/gpu.lock requirements/sglang-cpu.lock >requirements/sglang-cpu.lock.new
	mv requirements/sglang-cpu.lock.new requirements/sglang-cpu.lock
	wc -l requirements/*.lock

.PHONY: docs
docs: setup ## write docs/flags.md and docs/metrics.md from the code
	$(PYTHON_BIN) scripts/write_docs.py

NO_BENCH := benchmarks/race_trl.py benchmarks/fully_async.py benchmarks/workload.py benchmarks/shapes.py benchmarks/sglang_client.py
.PHONY: bench
bench: setup ## run benchmarks/*.py but the long ones, which compare whole runs; each prints JSON
	@for script in $(filter-out $(NO_BENCH),$(wildcard benchmarks/*.py)); do echo "== $$script"; $(PYTHON_BIN) "$$script"; done

.PHONY: clean
clean: ## remove caches and build output; .venv and runs/ stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache ./*.egg-info
	find . -path ./$(VENV) -prune -o -path ./runs -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
