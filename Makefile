# reprise: `make` lists what there is. Every target builds the environment it needs first.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PAPER ?= vit
SCALE ?= small
SEEDS ?=
ARGS ?=
DIR ?= $(REPRISE_GOLDENS)
EXPERIMENT = experiment=$(PAPER)/$(SCALE)
export OMP_NUM_THREADS ?= 1

.PHONY: help setup reproduce sweep report parity plan papers data test test-fast test-dist lint type format bench new-paper clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "reprise needs Python >= 3.11; found $$($(PYTHON) --version). Next step: make PYTHON=python3.11 ..."; exit 1; }
	@echo "building $(VENV) with every pinned version (once; a few minutes, and some GB for torch)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -q -c constraints.txt -e '.[dev,slurm,ray,search,dashboard]'
	@touch $@

setup: $(STAMP)  ## build .venv with every pinned version

reproduce: $(STAMP)  ## PAPER=vit [SCALE=small|public|paper] [SEEDS=0,1,2,3,4] [ARGS="overrides"]: runs, verdict, report
	$(BIN)/reprise reproduce $(EXPERIMENT) $(if $(SEEDS),seed=$(SEEDS)) $(ARGS)

sweep: $(STAMP)  ## PAPER=detr ABLATION=eos_coef [ARGS=...]: one of the paper's ablations, or ARGS="experiment=... key=1,2"
	$(BIN)/reprise sweep $(if $(ABLATION),experiment=$(PAPER)/ablations/$(ABLATION)) $(ARGS)

report: $(STAMP)  ## rebuild every report.html and RESULTS.md from the run folders
	$(BIN)/reprise report --write

parity: $(STAMP)  ## DIR=folder of golden cases [ARGS="--paper detr"]: compare with the official code's numbers
	@test -n "$(DIR)" || { echo "DIR is not set. Next step: make parity DIR=<folder of golden cases>"; exit 1; }
	$(BIN)/reprise parity $(DIR) $(ARGS)

plan: $(STAMP)  ## PAPER=detr [SCALE=paper]: sizes, data, memory, hours
	$(BIN)/reprise plan experiment=$(PAPER)/$(if $(filter-out file,$(origin SCALE)),$(SCALE),paper) $(ARGS)

papers: $(STAMP)  ## a row a paper: scales, golden cases, sizes, verdicts
	@$(BIN)/reprise papers $(ARGS)

data: $(STAMP)  ## [ARGS="fetch cifar10"]: the data registry
	@$(BIN)/reprise data $(if $(ARGS),$(ARGS),list)

test: $(STAMP)  ## every test, a process a core
	$(BIN)/python -m pytest -n auto --dist loadgroup $(ARGS)

test-fast: $(STAMP)  ## the tests that take seconds
	$(BIN)/python -m pytest -m "not slow and not exhaustive" $(ARGS)

test-dist: $(STAMP)  ## every rank, resume and launcher test of every paper; its outcome goes into RECORDS.json and README
	$(BIN)/python -m pytest -m dist -n auto --dist loadgroup --write-records $(ARGS); code=$$?; \
	$(BIN)/python scripts/readme.py && exit $$code

lint: $(STAMP)  ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP)  ## static types
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## [ARGS=--write]: ratios of our speed against bare loops and peers (--write: into docs/bench.md)
	@for file in bench/*.py; do echo "== $$file"; $(BIN)/python $$file $(ARGS) || exit 1; done

new-paper: $(STAMP)  ## PAPER=<slug>: the files of a new paper
	$(BIN)/reprise new-paper $(PAPER)

clean:  ## remove the environment and caches; run folders stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
