# Two commands do everything: `make demo` and `make test`. Both create .venv on first use with plain pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-slow lint format clean help

help:
	@echo "make demo       install and run the whole story on a generated phantom (a CPU is enough, under 4 minutes)"
	@echo "make test       install and run the tests"
	@echo "make test-slow  the tests that take longer"
	@echo "make lint       ruff and mypy"
	@echo "make clean      remove .venv and caches"

demo: $(VENV)/installed
	$(BIN)/affmae demo --overwrite

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto -m "not slow"

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info

# torch goes first, so that the pinned build is taken and no later requirement pulls another.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable ".[dev]"
	@touch $@
