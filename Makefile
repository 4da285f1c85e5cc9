# One definition of each task, for a laptop and for CI alike.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
# More than cores of a small machine: the tests wait as long as they compute.
JOBS ?= 3
KILLS ?= 10000
SEED ?=
# Another interpreter for test-gpu, where torch for the GPU is installed elsewhere.
GPU_PYTHON ?= $(VENV)/bin/python

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
FRAMEWORKS := $(VENV)/.frameworks
DOCS := $(VENV)/.docs
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# A test that hangs ends its worker, and would be tried again in each new one.
PYTEST := $(BIN)/pytest --numprocesses $(JOBS) --max-worker-restart 2

.PHONY: help venv demo test test-slow test-frameworks docs everything-installed check lint types format \
	test-all-pythons test-gpu short-chaos chaos bench build clean

help: ## Show this
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

venv: $(INSTALLED) ## Make the development environment, .venv (done by the others when needed)

$(INSTALLED): pyproject.toml requirements-dev.txt requirements-test.txt
	@echo "Setting up $(VENV); the first time this fetches torch"
	test -x $(BIN)/python || "$$(scripts/find-python 3.11 3)" -m venv $(VENV)
	$(PIP) -r requirements-dev.txt -e .
	touch $@

$(FRAMEWORKS): $(INSTALLED) requirements-frameworks.txt requirements-orchard.txt
	@echo "Installing the frameworks that some tests drive"
	$(PIP) -r requirements-frameworks.txt
	$(PIP) --no-deps --upgrade --target $(VENV)/orchard-ml -r requirements-orchard.txt
	touch $@

$(DOCS): $(INSTALLED) requirements-docs.txt
	$(PIP) -r requirements-docs.txt
	touch $@

demo: $(INSTALLED) ## Train a small network on real images, protected
	$(BIN)/python examples/train_digits.py

test: $(INSTALLED) ## Run the tests, documentation included, with what is installed
	$(PYTEST) -m "not slow and not gpu and not chaos"

test-slow: $(INSTALLED) ## Run those that take more than some seconds: trainings, storms, benchmarks
	$(PYTEST) -m "slow and not gpu and not chaos"

test-frameworks: $(FRAMEWORKS) ## Install Lightning, Transformers, Ray ... and run the tests with them
	$(PYTEST) tests/frameworks

docs: $(DOCS) ## Build the documentation site into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

everything-installed: $(FRAMEWORKS) $(DOCS)

# Once all is installed, `test` leaves nothing out. Two minutes are chaos.
check: everything-installed lint types test test-slow docs short-chaos ## Everything that a change must pass

lint: $(INSTALLED) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## Check the types
	$(BIN)/mypy orchard_infra
	$(BIN)/mypy --allow-untyped-calls --no-strict-optional examples \
		$$(test -e $(FRAMEWORKS) || echo --exclude examples/frameworks)

format: $(INSTALLED) ## Put the code into the agreed form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-all-pythons: ## Test the built wheel under Python 3.10 to 3.13, without torch
	scripts/test-all-pythons --numprocesses $(JOBS)

test-gpu: $(INSTALLED) ## Run the tests that need a GPU
	$(GPU_PYTHON) -m pytest -m gpu

short-chaos: $(INSTALLED) ## Break runs at random for two minutes
	$(BIN)/pytest -m chaos tests/chaos

chaos: $(INSTALLED) ## Break runs at random for long: KILLS=10000, and SEED=n to play it again
	ORCHARD_CHAOS_KILLS=$(KILLS) ORCHARD_CHAOS_SEED=$(SEED) $(BIN)/pytest tests/chaos -m chaos --capture=no -o faulthandler_timeout=0

bench: $(INSTALLED) ## Run every benchmark
	for script in benchmarks/[!_]*.py; do echo "$$script"; $(BIN)/python "$$script"; done

build: $(INSTALLED) ## Build the distributions into dist/
	$(BIN)/python -m build

clean: ## Remove what was made here, except .venv
	rm -rf build dist runs site .venvs .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
