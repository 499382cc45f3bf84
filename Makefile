# Two commands are all a newcomer needs: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
DEMO_RANKS ?= 2
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help docs setup demo test test-fast bench gpu-check gpu-bench lint chaos constraints parts format ui clean test-slurm wheel

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/installed  ## make .venv and install everything into it

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dist-obdsd needs Python 3.11 or newer; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup  ## pack the embedded data set, train OBD-SD on two processes, evaluate, log to MLflow
	test -f data/glyphs/manifest.json || $(BIN)/dist-obdsd pack glyphs --out data/glyphs
	$(BIN)/torchrun --standalone --nproc-per-node $(DEMO_RANKS) -m dist_obdsd train configs/glyphs.yaml --fresh
	@echo "run 'make ui' and open http://127.0.0.1:5000"

test: setup  ## the whole test suite, in up to four processes
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-fast: setup  ## what takes no training run and no launcher: under 90 seconds
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

bench: setup  ## time the objective and the training step, and compare the ratios with the committed ones
	$(BIN)/python -m benchmarks.objective --sizes 112,448 --worlds 1,2 --budget 60 --json bench-objective.json --baseline docs/bench/objective.json
	$(BIN)/python -m benchmarks.step --worlds 1,2 --json bench-step.json --baseline docs/bench/step.json

gpu-check:  ## check a GPU, without .venv: torch, torchvision, webdataset, pydantic, pyyaml, fsspec, filelock, pytest
	$(PYTHON) -m pytest -v -rs -m gpu tests/gpu $(OPTIONS)

GPU_STEP = $(PYTHON) -m benchmarks.step --worlds 1 --budget 24 precision=bf16
gpu-bench:  ## time training steps of ResNet-50 and ViT-S/16 (which needs timm) on a GPU, with the packages of gpu-check
	$(GPU_STEP) model.backbone=resnet50 --batch 112
	$(GPU_STEP) model.backbone=resnet50 --batch 448
	$(GPU_STEP) model.backbone=resnet50 --batch 448 --temperatures 0.05 model.compile=true
	$(GPU_STEP) model.backbone=timm/vit_small_patch16_224 --batch 112 --temperatures 0.005

chaos: setup  ## kill and stop runs at random moments, and print what became of them (about 20 minutes)
	$(BIN)/python -m tests.chaos

wheel:  ## build the wheel, and train and search with it in a fresh venv outside of the checkout
	PYTHON=$(PYTHON) tests/wheel.sh

test-slurm: setup  ## launch/* on a real SLURM, over ssh and between two hosts; installs Debian's packages, needs root (25 minutes)
	command -v slurmctld >/dev/null || { printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d; \
	  apt-get update -qq; apt-get install -y -qq --no-install-recommends slurm-wlm munge iproute2 openssh-server pdsh; rm /usr/sbin/policy-rc.d; }
	TEST_SLURM=1 $(BIN)/python -m pytest -s tests/launch/test_slurm.py tests/launch/test_hosts.py

lint: setup  ## ruff, mypy, and the reading order of the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

constraints:  ## pin what a fresh install takes today, in constraints.txt
	rm -rf .venv-constraints
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install --quiet --editable '.[dev]'
	.venv-constraints/bin/python -m pip freeze --exclude-editable > constraints.txt
	rm -rf .venv-constraints

parts: setup  ## write docs/parts.md and docs/reference.md anew, from the registry and the docstrings
	$(BIN)/python docs/make_parts.py

docs: setup  ## the pages of docs/ as a site, in site/
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: setup  ## let ruff format and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ui: setup  ## the MLflow UI over this folder's runs
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000

clean:  ## remove packed data, runs and the tracking database; keep .venv
	rm -rf data runs mlflow.db mlruns mlartifacts
