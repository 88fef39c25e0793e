# The two commands: `make train` and `make test`. Each sets up what it needs, once.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
ARGS ?=
# Hundreds of processes are started: none computes on all cores, and what one has compiled the next need not.
TEST_ENV = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
INTERPRETER = $(TEST_ENV) TRITON_INTERPRET=1 $(PY) -m pytest -q -m interpreter $(ARGS)

.PHONY: help train test doctor setup setup-dev lint types unit interpreter interpreter-afterwards gpu clean

help: ## Shows this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

train: setup ## Tunes the kernels and trains the small model on biomedical text. ARGS="..." adds overrides.
	$(PY) scripts/train.py kernels=auto model=small $(ARGS)

test: setup-dev lint ## Everything that CI checks.
	@$(MAKE) --no-print-directory --jobs=3 types unit interpreter-afterwards

doctor: setup ## What to paste into a bug report, and what to do about what is wrong. ARGS=--full verifies all kernels.
	$(PY) -m llmmed.doctor $(ARGS)

setup: $(VENV)/.installed ## Creates .venv and installs the package.
setup-dev: $(VENV)/.installed-dev

# The interpreter of $(PYTHON) must be 3.11 or newer; pip says so itself if it is not.
$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/pip
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[biomed]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/pip
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[biomed,dev]'
	@touch $@ $(VENV)/.installed

lint: setup-dev ## ruff: style and formatting.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: setup-dev ## mypy, strict.
	$(VENV)/bin/mypy

# loadgroup deals out one test at a time, the long ones first.
unit: setup-dev ## CPU tests, among them the ahead-of-time compilation of every Triton kernel.
	$(TEST_ENV) $(PY) -m pytest -q -n 2 --dist loadgroup -m "not interpreter and not gpu" $(ARGS)

interpreter: setup-dev ## Triton kernels run on the CPU, in Triton's interpreter.
	$(INTERPRETER) -n 2

# Beside the unit tests, which wait for processes half of their time. What it prints comes in one piece.
interpreter-afterwards: setup-dev
	@$(INTERPRETER) -n 1 > $(VENV)/interpreter.log 2>&1; code=$$?; cat $(VENV)/interpreter.log; exit $$code

gpu: setup-dev ## Tests that need a CUDA GPU.
	$(PY) -m pytest -q -m gpu $(ARGS)

clean: ## Removes what was built; outputs/ stays.
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
