# `make race` and `make test` do all the set-up on a machine with Python >= 3.11, pip and make.
PYTHON ?= python3
VENV ?= $(if $(TORCH),.venv-torch-$(TORCH),.venv)
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: race test examples docs lint wheel bench peers clean

race: $(VENV)/installed-race
	$(BIN)/kfqn race

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

examples: $(VENV)/installed-examples
	$(BIN)/python -m pytest examples

docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx -q -W --keep-going -E -c docs . docs/_build/html
	@echo docs/_build/html/index.html

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

wheel: $(VENV)/installed-dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist

peers: $(VENV)/installed-peers

bench: $(VENV)/installed-peers
	$(BIN)/python -m benchmarks.cost.step_time
	$(BIN)/python -m benchmarks.cost.micro_benchmarks
	$(BIN)/python -m benchmarks.cost.calls

clean:
	rm -rf $(VENV) .venv-torch-* .mypy_cache .pytest_cache .ruff_cache docs/_build

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kfqn needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'

# `make test TORCH=2.14.1` runs the suite on that version of torch, in a virtual environment of its own.
$(VENV)/constraints.txt: constraints.txt | $(VENV)/bin/python
	sed '$(if $(TORCH),s/^torch==.*/torch==$(TORCH)/)' constraints.txt > $@

$(VENV)/installed-race: pyproject.toml $(VENV)/constraints.txt | $(VENV)/bin/python
	$(PIP) -c $(VENV)/constraints.txt -e '.[race]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed-peers
	$(PIP) -c $(VENV)/constraints.txt --group dev
	touch $@

$(VENV)/installed-peers: $(VENV)/installed-race
	$(PIP) -c $(VENV)/constraints.txt --no-deps --group peers
	touch $@

$(VENV)/installed-examples: $(VENV)/installed-dev
	$(PIP) -c $(VENV)/constraints.txt --group examples
	touch $@

$(VENV)/installed-docs: $(VENV)/installed-race
	$(PIP) -c $(VENV)/constraints.txt --group docs
	touch $@
