# Two commands are enough: `make demo` and `make test`. Each sets up what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH_VENV := .venv-bench
STAMP := $(VENV)/.ready
ARGS ?=
SEEDS ?= 1000

.PHONY: demo test simulate check fmt bench bench-setup soak setup clean help

help:
	@echo "make demo [ARGS=--once]   the whole thing, shown on this machine"
	@echo "make test [ARGS=...]      all tests, against a real PostgreSQL of their own"
	@echo "make simulate [SEEDS=N]   the ledger against everything that goes wrong, N runs of it"
	@echo "make check                lint, types, house rules"
	@echo "make fmt                  format the code"
	@echo "make bench-setup bench    measure, beside nginx, HAProxy, Envoy and aiohttp"
	@echo "make soak                 memory before hostile and slow peers; every mutant of every request"

demo: setup
	@$(BIN)/keyproxy demo $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

simulate: setup
	$(BIN)/python -m tests.simulation --seeds $(SEEDS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house_rules.py

fmt: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-setup: setup
	bench/setup.sh $(BENCH_VENV)

soak: setup
	$(BIN)/python -m bench.soak $(ARGS)
	KEYPROXY_TEST_SHARE=1 $(BIN)/python -m pytest -q tests/wire/test_second_opinion.py

bench: setup
	$(BIN)/python -m bench $(ARGS)

setup: $(STAMP)

# The stamp is newer than everything that says what the environment holds, or the environment is made anew.
$(STAMP): pyproject.toml requirements/base.txt requirements/demo.txt requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "keyproxy needs Python 3.11 or later; set PYTHON=/path/to/it" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	    || { echo "cannot make a virtual environment: install your system's venv package" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

clean:
	rm -rf $(VENV) $(BENCH_VENV) .bench build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
