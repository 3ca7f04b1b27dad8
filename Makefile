# Everything a person or CI needs. `make` alone lists it. Nothing has to be set up before but git, make and Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-quick check lint types contracts ansible-lint molecule lab bench soak faults schema reference format clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

demo: $(VENV)/.installed ## Set up, then show the main job on a make-believe fleet (no root, no sshd)
	@$(BIN)/python -m reconciler.demo demo

test: test-quick ## Set up, then run all tests (those on real nodes need root and Debian, and say so)
	@$(BIN)/python -m pytest -m nodes

test-quick: $(VENV)/.installed-dev ## The tests that need no nodes, two at a time
	@$(BIN)/python -m pytest -m "not nodes" -n 2 --dist loadfile

check: lint types contracts ansible-lint test ## Everything CI checks but molecule

lint: $(VENV)/.installed-dev ## Formatter and linter
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/yamllint --strict .

types: $(VENV)/.installed-dev ## Strict types
	@$(BIN)/mypy

contracts: $(VENV)/.installed-dev ## Layers and doors
	@$(BIN)/lint-imports

ansible-lint: $(VENV)/.installed-dev ## Playbooks and roles, profile production
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/ansible-lint --offline

molecule: $(VENV)/.installed-dev ## Every role's scenario on real nodes (root on Debian)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/molecule test --all

lab: $(VENV)/.installed-dev ## The repository's own desired state on lab nodes (root on Debian)
	@$(BIN)/python -m tests.lab.fleet

bench: $(VENV)/.installed-bench ## What a pass, a proxied call and a round of heartbeats cost beside the alternatives (root on Debian)
	@$(BIN)/python -m tests.bench reconciler
	@$(BIN)/python -m tests.bench sidecar
	@$(BIN)/python -m tests.bench heartbeat

soak: $(VENV)/.installed-dev ## 500 passes in one process: memory, open files and directories stay flat
	@$(BIN)/python -m tests.bench soak

faults: $(VENV)/.installed-dev ## 50 passes ended at random moments on real nodes (root on Debian)
	@RECONCILER_ROUNDS=50 $(BIN)/python -m pytest tests/nodes/test_kills.py -k random

reference: $(VENV)/.installed ## Write docs/reference.md from the commands themselves
	@$(BIN)/python -m reconciler.cli.reference > docs/reference.md

schema: $(VENV)/.installed ## Write the JSON Schema that is shipped
	@$(BIN)/reconcile schema > reconciler/desired_state.schema.json

format: $(VENV)/.installed-dev ## Format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## Remove what the targets above made
	@rm -rf $(VENV) demo dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .ansible

# Debian's Python lacks the venv module until its package is installed; everywhere else the first line does.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else 0'
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || ( rm -rf $(VENV); \
	  echo "Python has no venv module yet; installing the package python3-venv"; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq python3-venv; \
	  else sudo apt-get update -qq && sudo apt-get install -y -qq python3-venv; fi >/dev/null && $(PYTHON) -m venv $(VENV) ) \
	  || { rm -rf $(VENV); echo "error: no virtual environment could be made; on Debian: sudo apt install python3-venv"; exit 1; }

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	@echo "Setting up ($(VENV)) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . && touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml
	@echo "Setting up for tests ($(VENV)) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]" && touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,bench]" && touch $@
