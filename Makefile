# The two main commands are `make demo` and `make test`. Each sets up what it needs.

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
JOBS ?= 4
ROWS ?=

# Otherwise each of the many processes would compile every module again.
unexport PYTHONDONTWRITEBYTECODE

# Tests run in several processes, each with a PostgreSQL of its own.
IN_JOBS = --numprocesses $(JOBS) --dist worksteal

.PHONY: demo test test-client test-postgres simulate crash check fmt bench bench-setup bench-tokens soak compiled test-compiled hashes setup clean help

help:
	@echo "make demo [ARGS=--once]   run a complete demo on this machine"
	@echo "make test [ARGS=...]      run all tests against a PostgreSQL of their own, in JOBS=N processes"
	@echo "make test-client [ROWS=dj52-3.13] [ARGS=...]  run the tests of keyproxy-client in environments of their own"
	@echo "make test-postgres [DSN=...]  run the store and acceptance tests on a given PostgreSQL, or on the distribution's, with JIT"
	@echo "make simulate [SEEDS=N]   simulate the ledger with faults, N runs"
	@echo "make crash [SECONDS=N]    kill, stop and cut off processes under load, for N seconds"
	@echo "make check                check lint, types and house rules"
	@echo "make fmt                  format the code"
	@echo "make bench-setup bench    measure keyproxy beside nginx, HAProxy, Envoy and aiohttp"
	@echo "make bench-tokens         compare the estimates of texts with a tokenizer (after bench-setup)"
	@echo "make soak                 measure memory with hostile and slow peers; test every mutant of every request"
	@echo "make compiled             make the optional compiled build in $(COMPILED_VENV) (needs a C compiler)"
	@echo "make hashes               update the hashes of the container's requirements after a pin has changed"
	@echo "make test-compiled        run the tests of the compiled modules against that build"

demo: $(RUNS)
	@$(BIN)/keyproxy demo $(ARGS)

# All of the two distributions, or with ARGS a part of the first. A failure in one does not keep the other from running.
test: setup
	@status=0; $(if $(ARGS),,$(BIN)/python -m client.tests.environments || status=1;) \
	    $(BIN)/python -m pytest $(IN_JOBS) $(ARGS) || status=1; exit $$status

# Environments with several versions of Python and of the frameworks, in .venv-client. See client/tests/environments.py.
test-client: setup
	$(BIN)/python -m client.tests.environments $(ROWS) -- $(ARGS)

# With DSN: on that server, as its superuser `keyproxy`. Without: on the distribution's PostgreSQL, started for the run.
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

# Rebuilt whenever anything in the package has changed: extensions are compiled together or not at all.
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
# the sources here would be found before the installed package.
test-compiled: compiled
	EXPECT_COMPILED=1 $(COMPILED_VENV)/bin/pytest -p keyproxy.gateway $(or $(ARGS),tests/ai tests/auth tests/http tests/limits tests/metrics tests/wire tests/store)

hashes: setup
	requirements/hash.sh

setup: $(STAMP)

# If a stamp is older than a file that determines the environment, the environment is updated. The demo needs only a small
# part of what the tests need, so it starts without the rest.
$(RUNS): pyproject.toml requirements/base.txt requirements/demo.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "keyproxy needs Python 3.11 or later; set PYTHON=/path/to/it" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	    || { echo "cannot create a virtual environment: install your system's venv package" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/demo.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(STAMP): $(RUNS) requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	@touch $@

clean:
	rm -rf $(VENV) $(BENCH_VENV) $(COMPILED_VENV) .venv-client .bench build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
