SHELL := /bin/bash
PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LONG_SUITES := gpu or faults or learning

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-faults check format rollout trainer requirements clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Make .venv with the pinned packages (PYTHON=python3.12 picks another Python)

$(INSTALLED): deploy/requirements/cpu.txt
	@deploy/scripts/install.sh $(VENV) $(PYTHON) $(TORCH_INDEX)
	@touch $@

demo: $(INSTALLED) ## Train the demo policy on this machine (ARGS="--replicas 2 --chaos" adds faults)
	@$(BIN)/python -m examples.demo $(ARGS)

test: $(INSTALLED) ## Run the test suite, with the real engine (ARGS="-k sync" picks tests)
	@$(BIN)/python -m pytest -m "not ($(LONG_SUITES))" $(ARGS)

test-faults: $(INSTALLED) ## Kill, freeze, cut and fill what can be: the fault tests, minutes long
	@$(BIN)/python -m pytest -m faults $(ARGS)

check: $(INSTALLED) ## Lint, format check, types and import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## Format the code and fix what the linter can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

rollout: $(INSTALLED) ## Run one rollout service with the ROLLOUT_* settings of the environment
	@exec $(BIN)/python -m services.rollout

trainer: $(INSTALLED) ## Run the trainer service with the TRAINER_* settings of the environment
	@exec $(BIN)/python -m services.trainer

requirements: ## Resolve deploy/requirements/cpu.txt again (needs uv; UPGRADE=--upgrade moves versions)
	cd deploy/requirements && uv pip compile cpu.in --quiet $(UPGRADE) --output-file cpu.txt \
		--override overrides.txt --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
		--custom-compile-command "make requirements" --no-emit-index-url --no-emit-find-links

clean: ## Remove what the demo and the tools left here (.venv stays)
	rm -rf .demo .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
