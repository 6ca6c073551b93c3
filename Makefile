# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-slow bench docs check format clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/advtune demo

test: setup
	$(BIN)/python -m pytest -m 'not slow' -n auto --dist worksteal

test-slow: setup
	$(BIN)/python -m pytest -m slow

# torchattacks is no dependency: it pins an old requests. It runs without one.
bench: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps torchattacks==3.5.1 scipy
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/performance_page.py

# site/index.html opens from disk; the first time it needs a package index.
docs: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs dist build site .pytest_cache .mypy_cache .ruff_cache
