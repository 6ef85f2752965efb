# One command each: every target sets up what it needs in .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test torture lint

demo: .venv/reshard  ## make a small DeepSeek-V3 checkpoint, convert it for 4 ranks, verify it
	$(BIN)/reshard demo

test: .venv/test  ## all tests
	$(BIN)/python -m pytest -n auto $(PYTEST_OPTIONS)

torture: .venv/reshard  ## kill conversions at 200 random moments; nothing may be lost
	$(BIN)/python tests/torture.py $(TORTURE_OPTIONS)

lint: .venv/test  ## ruff and mypy, as CI runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/reshard: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	touch $@

# torch first and alone: asked for by another package, pip would take the build with several GB of CUDA libraries.
.venv/test: .venv/reshard
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[test,lint]'
	touch $@
