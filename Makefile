# Targets for developers. Every target first sets up its requirements; nothing is done twice.

SHELL := /bin/bash
# Otherwise each of hundreds of processes would compile the package again.
unexport PYTHONDONTWRITEBYTECODE
.DEFAULT_GOAL := help
BIN := .venv/bin
ARGS ?=
FUZZ_SECONDS ?= 60
# Tests run on all cores; those that share machines stay together (tests/conftest.py). PARALLEL=0 runs them one by one.
PARALLEL ?= $(shell nproc)
# `make test` skips repetition; `make test-all` runs it, with more hypothesis examples.
CHOSEN ?= -m "not thorough"
PYTEST = $(BIN)/python -m pytest -n $(PARALLEL) --dist loadfile --no-loadscope-reorder $(CHOSEN)

STAGES := lint types imports unit programs contract plugin integration

.PHONY: help setup demo test test-all test-kvm images bench soak fuzz $(STAGES)

help: ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: ## install missing programs, make .venv with all extras
	@ci/setup.sh

demo: setup ## run the example suite, a fresh microVM for every test
	@$(BIN)/pytest-microvm image build python
	@$(BIN)/python -m pytest --microvm examples

test: $(STAGES) ## the whole check

test-all: ## the same with all repetition: more hostile branches, image builds, examples of hypothesis
	@$(MAKE) --no-print-directory test CHOSEN= HYPOTHESIS_PROFILE=thorough

test-kvm: images ## what KVM matters for: here, or where KVM does not work, in a machine with an emulated one
	@$(BIN)/python tests/kvm/run.py $(ARGS)

lint: setup ## ruff
	@printf '\n### %s\n' "$@"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: setup ## mypy, strict
	@printf '\n### %s\n' "$@"
	@$(BIN)/mypy

imports: setup ## the layers of CONTRIBUTING.md
	@printf '\n### %s\n' "$@"
	@$(BIN)/lint-imports --no-logo

unit: setup ## tests without a hypervisor, in seconds
	@printf '\n### %s\n' "$@"
	@$(PYTEST) --dist worksteal tests/unit $(ARGS)

programs: setup ## tests with git, pip, npm, tox and pytest as real programs; no hypervisor either
	@printf '\n### %s\n' "$@"
	@$(PYTEST) --dist worksteal tests/programs $(ARGS)

contract: images ## what every hypervisor must do
	@printf '\n### %s\n' "$@"
	@$(PYTEST) tests/contract $(ARGS)

plugin: images ## the plug-in's options, fixtures and reports
	@printf '\n### %s\n' "$@"
	@$(PYTEST) --dist worksteal tests/plugin tests/attacks/test_suites.py $(ARGS)

integration: images ## everything together, and every command and snippet of the documentation
	@printf '\n### %s\n' "$@"
	@$(PYTEST) tests/integration/test_docs.py tests/integration tests/faults tests/attacks \
		--ignore=tests/attacks/test_suites.py $(ARGS)

images: setup
	@printf '\n### %s\n' "$@"
	@$(BIN)/pytest-microvm image build base
	@$(BIN)/pytest-microvm image build python
	@$(BIN)/pytest-microvm image build agent

fuzz: setup ## fuzz what takes a guest's bytes, for FUZZ_SECONDS (60) in all
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --group fuzz || \
		echo 'atheris cannot be installed here: hypothesis makes up the inputs instead'
	@$(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS)

bench: images ## measure, and compare with the promises
	@$(BIN)/python benchmarks/run.py $(ARGS)

soak: images ## 1,000 machines through one pytest process, 300 through two workers, 300 fixtures: what grows?
	@$(BIN)/python benchmarks/soak.py
	@$(BIN)/python benchmarks/soak.py --count 300 --workers 2
	@$(BIN)/python benchmarks/soak.py --count 300 --fixture
