# Two commands on a fresh machine: `make run` does the main job, `make test` runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= out
FLOORS := .venv-floors
FLOOR_TESTS := tests/test_attribute_lora.py tests/test_console.py tests/test_data.py tests/test_kinds.py \
	tests/test_lora.py tests/test_models.py tests/test_places.py tests/test_recorded.py tests/test_text_to_image.py \
	tests/test_walk.py
# where no bytecode is written each of many processes compiles what it imports
TEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: help run test test-full floors lint compile smoke bench gpu tune clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 run"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable '.[trak]'
	@touch $(READY)

run: $(READY) ## set everything up and attribute the embedded digits
	$(BIN)/python -m dtrak.attribute --fused

test: $(READY) ## set everything up and run the fast lane of the tests, in minutes
	$(TEST)

test-full: $(READY) ## all tests: whole sweeps, slow and statistical proofs
	$(TEST) --full

# the oldest of everything that pyproject.toml allows, but for torch, which is as in constraints.txt
floors: pyproject.toml constraints.txt ## loaders, adapters and the command line on the floors of pyproject.toml
	$(PYTHON) -m venv $(FLOORS)
	$(PYTHON) .ci/floors.py > $(FLOORS)/floors.txt
	$(FLOORS)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(FLOORS)/bin/python -m pip install --quiet --constraint $(FLOORS)/floors.txt \
		pytest pytest-timeout pytest-xdist hypothesis --editable .
	$(FLOORS)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(FLOOR_TESTS)

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

compile: $(READY) ## compile every kernel for sm_80, sm_90, sm_100 and gfx942; no GPU needed
	$(BIN)/python tests/compile_all.py

smoke: $(READY) ## run every benchmark once on tiny sizes
	OMP_NUM_THREADS=1 $(TEST) benchmarks --smoke --benchmark-disable

bench: $(READY) ## time everything here, append rows to benchmarks/results, rewrite the report
	$(BIN)/python -m pytest benchmarks --benchmark-only --record --benchmark-columns=median,iqr,rounds
	$(BIN)/python benchmarks/report.py

# the environment if there is one, else the machine's own python with torch, triton and pytest
gpu: ## on a machine with a GPU, no network: every kernel checked and timed, results under OUT
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py --out $(OUT)

tune: ## on a machine with a GPU: launch configurations for its card, at most half an hour
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/tune.py --journal $(OUT)/tune.jsonl

clean: ## remove the environment and caches
	rm -rf $(VENV) $(FLOORS) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
