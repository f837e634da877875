# Every target prints what it does. `make` alone lists them.
SHELL := /bin/bash
BIN := .venv/bin
STAMP := .venv/.ready

# The tested sets, by the version of Python.
CONSTRAINTS_3.11 := constraints/python3.11.txt
CONSTRAINTS_3.12 := constraints/python3.12.txt
CONSTRAINTS_3.13 := $(CONSTRAINTS_3.12)
NEWEST := $(CONSTRAINTS_3.13)

# .venv holds the version that it was made with. It is made anew only for a PYTHON that is asked for by name.
VERSION = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ifdef PYTHON
ifneq ($(VERSION),$(shell cat $(STAMP) 2>/dev/null))
$(STAMP): another-python
endif
endif
PYTHON ?= python3
CONSTRAINTS = $(or $(CONSTRAINTS_$(VERSION)),$(NEWEST))
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: another-python help setup quickstart test test-slow check bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the package and its tested dependencies
	@echo "setup: ready ($(BIN)/mplug2 --help)"

# editable_mode=compat: type checkers outside the checkout follow a path file, not an import hook.
$(STAMP): pyproject.toml $(wildcard constraints/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "setup: mplug2 needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	       "name one with: make setup PYTHON=python3.11" >&2; exit 1; }
	@echo "setup: making .venv with $$($(PYTHON) --version) and installing $(CONSTRAINTS) (about a minute)"
	@$(if $(CONSTRAINTS_$(VERSION)),,echo "setup: no set is tested on Python $(VERSION); this is that of the newest that is")
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --config-settings editable_mode=compat -e '.[dev]'
	@echo $(VERSION) > $@

# Huge pages: XLA on CPU takes its step buffers from malloc and page-faults them anew at each step.
quickstart bench: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

quickstart: setup ## evaluate the shipped modules, train from scratch, write quickstart/report.html
	@echo "quickstart: training and evaluating on this machine, within 10 minutes on two cores"
	@$(BIN)/mplug2 quickstart

# What XLA compiles may use no newer instructions than those: AVX2, SSE4_2.
test test-slow: export XLA_FLAGS := $(XLA_FLAGS) $(if $(ISA),--xla_cpu_max_isa=$(ISA))

test: setup ## run the tests (more: make test TEST_ARGS='-k network -x', on a lesser CPU: ISA=AVX2)
	@echo "test: running the tests, the slow ones left out"
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

test-slow: setup ## run the slow tests
	@echo "test-slow: running the slow tests"
	@$(BIN)/python -m pytest -m slow $(TEST_ARGS)

check: setup ## ruff (rules and format) and pyright
	@echo "check: ruff check, ruff format, pyright"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

bench: setup ## time a train step on this machine
	@echo "bench: timing a train step of vision + universal + decoder at base size"
	@$(BIN)/mplug2 bench step

clean: ## remove .venv, build outputs and caches; runs and reports stay
	@echo "clean: removing .venv, build outputs and caches"
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
