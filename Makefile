# Two commands are enough: `make demo` and `make test`. Each sets up what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH_VENV := .venv-bench
COMPILED_VENV := .venv-compiled
STAMP := $(VENV)/.ready
RUNS := $(VENV)/.runs
ARGS ?=
DSN ?=
SEEDS ?= 1000
SECONDS ?= 120
JOBS ?= 2

# Tests run in several processes, each with a PostgreSQL of its own.
IN_JOBS = --numprocesses $(JOBS) --dist worksteal

.PHONY: demo test test-postgres simulate crash check fmt bench bench-setup bench-tokens soak compiled test-compiled hashes setup clean help

help:
	@echo "make demo [ARGS=--once]   the whole thing, shown on this machine"
	@echo "make test [ARGS=...]      all tests, against a real PostgreSQL of their own; JOBS=N processes at a time"
	@echo "make test-postgres [DSN=...]  the store and acceptance tests on a given PostgreSQL, or on the distribution's, with JIT"
	@echo "make simulate [SEEDS=N]   the ledger against everything that goes wrong, N runs of it"
	@echo "make crash [SECONDS=N]    processes that are killed, stopped and cut off under load, for so long"
	@echo "make check                lint, types, house rules"
	@echo "make fmt                  format the code"
	@echo "make bench-setup bench    measure, beside nginx, HAProxy, Envoy and aiohttp"
	@echo "make bench-tokens         the estimates of texts, beside a tokenizer (after bench-setup)"
	@echo "make soak                 memory before hostile and slow peers; every mutant of every request"
	@echo "make compiled             the optional compiled build, in $(COMPILED_VENV) (needs a C compiler)"
	@echo "make hashes               the hashes of what the container installs, after a pin has changed"
	@echo "make test-compiled        the tests of what was compiled, against that build"

demo: $(RUNS)
	@$(BIN)/keyproxy demo $(ARGS)

test: setup
	$(BIN)/python -m pytest $(IN_JOBS) $(ARGS)

# With DSN: on that server, as its superuser `keyproxy`. Without: on the distribution's, which is started for the run.
test-postgres: export KEYPROXY_TEST_POSTGRES = $(DSN)
test-postgres: setup
	$(BIN)/python -m $(if $(DSN),pytest,tests.distribution) $(or $(ARGS),tests/store tests/acceptance)

simulate: setup
	$(BIN)/python -m tests.simulation --seeds $(SEEDS)

crash: setup
	KEYPROXY_TEST_CRASH_SECONDS=$(SECONDS) $(BIN)/python -m pytest -s tests/acceptance/test_crash.py

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

bench-tokens:
	$(BENCH_VENV)/bin/python -m bench.token_estimates $(ARGS)

soak: setup
	$(BIN)/python -m bench.soak $(ARGS)
	KEYPROXY_TEST_SHARE=1 $(BIN)/python -m pytest -q tests/wire/test_second_opinion.py

bench: setup
	$(BIN)/python -m bench $(ARGS)

# Made anew whenever anything of the package has changed: extensions are compiled together or not at all.
compiled: $(COMPILED_VENV)/.ready

$(COMPILED_VENV)/.ready: setup.py pyproject.toml requirements/dev.txt config.example.toml \
    $(shell find keyproxy -name '*.py' -o -name '*.sql')
	test -x $(COMPILED_VENV)/bin/python || $(PYTHON) -m venv $(COMPILED_VENV)
	$(COMPILED_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	rm -rf build
	KEYPROXY_COMPILE=1 $(COMPILED_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	    --no-build-isolation --no-deps --force-reinstall .
	@touch $@

# `bin/pytest`, not `python -m pytest`, and the package imported before pytest puts this directory on the path: otherwise
# the sources here would be found before what is installed.
test-compiled: compiled
	EXPECT_COMPILED=1 $(COMPILED_VENV)/bin/pytest -p keyproxy.gateway $(or $(ARGS),tests/ai tests/auth tests/http tests/limits tests/metrics tests/wire tests/store)

hashes: setup
	requirements/hash.sh

setup: $(STAMP)

# A stamp is newer than everything that says what the environment holds, or the environment is made anew. The demo needs a
# small part of what the tests need, and whoever tries it first is not to wait for the rest.
$(RUNS): pyproject.toml requirements/base.txt requirements/demo.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "keyproxy needs Python 3.11 or later; set PYTHON=/path/to/it" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	    || { echo "cannot make a virtual environment: install your system's venv package" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/demo.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(STAMP): $(RUNS) requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	@touch $@

clean:
	rm -rf $(VENV) $(BENCH_VENV) $(COMPILED_VENV) .bench build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
