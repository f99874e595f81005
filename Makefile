# What a newcomer types; `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Name or path of the interpreter that .venv is made with; empty searches for a Python 3.11 or 3.12.
PYTHON ?=
# Processes of the demo.
RANKS ?= 2
# Test files that run at once.
JOBS ?= 2
# SMOKE=1 shortens the demo; its student is too short in training to be good.
SMOKE ?=

# BASE=train pretrains the demo's base student (minutes more); otherwise it starts from the one in configs/toy/base/.
BASE ?=

DEMO_NAME := $(if $(SMOKE),smoke,toy)-afd$(if $(filter train,$(BASE)),-own-base)
DEMO_CONFIG := --config configs/toy/$(if $(SMOKE),smoke/)afd.yaml name=$(DEMO_NAME) \
  $(if $(filter train,$(BASE)),requires=$(CURDIR)/configs/toy/base.yaml student.weights=runs/toy-base)
DEMO_RUN := runs/$(DEMO_NAME)
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

.PHONY: help install demo test lint format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

install: $(STAMP)  ## make .venv and install the package, CPU is enough (1-10 minutes, 2.5 GB; a second call does nothing)

$(STAMP): setup.py constraints/cpu.txt
	@python=""; \
	for name in $(or $(PYTHON),python3.11 python3.12 python3 python); do \
	  for candidate in $$(type -ap "$$name" || true); do \
	    if "$$candidate" -c "$(SUITABLE)" >/dev/null 2>&1; then python="$$candidate"; break 2; fi; \
	  done; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "PYTHON ($(or $(PYTHON),not given)) must be Python 3.11 or 3.12 with venv: none found on PATH; name one: make install PYTHON=/path/to/python3.11" >&2; \
	  exit 2; \
	fi; \
	if ! $(BIN)/python -c "$(SUITABLE)" >/dev/null 2>&1; then "$$python" -m venv --clear $(VENV); fi
	@echo "It takes 1-10 minutes and about 2.5 GB; pip writes to $(VENV)/install.log."; \
	if ! $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	    --constraint constraints/cpu.txt --editable '.[dev]' >$(VENV)/install.log 2>&1; then \
	  tail -n 40 $(VENV)/install.log >&2; \
	  echo "pip failed: its last lines are above, all of them in $(VENV)/install.log" >&2; \
	  exit 1; \
	fi
	@touch $(STAMP)
	@echo "Installed. Next: make demo, or make test."

demo: install  ## adapt a toy student to a teacher seen as videos only, 2 processes (minutes; SMOKE=1 for a short look, BASE=train to pretrain its base too)
	@port=$$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'); \
	set -x; $(BIN)/deepspeed --num_accelerators $(RANKS) --master_port $$port launch/train.py $(DEMO_CONFIG)
	@echo "Done. Report: $(DEMO_RUN)/report.html   figures: $(DEMO_RUN)/summary.json   videos: $(DEMO_RUN)/samples/"

# Tests that start processes race with a busy machine: those that fail are run once more, alone and in a new process.
test: install lint  ## lint, types and all tests; a summary says how many ran
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile || { [ $$? = 1 ] && \
	  echo "Again, alone and in a new process, those that failed:" && \
	  $(BIN)/python -m pytest --last-failed --last-failed-no-failures none --maxfail 10; }

lint: install  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install  ## rewrite the code in ruff's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove caches and build outputs; .venv and runs/ stay
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(STAMP)
