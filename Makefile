PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint clean

demo: $(STAMP)
	$(BIN)/rectified-spaattn demo --out demo-output

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not gpu"

lint: $(STAMP)
	$(BIN)/ruff check src studies tests benchmarks examples
	$(BIN)/ruff format --check src studies tests benchmarks examples
	$(BIN)/mypy

# torch comes first and pinned: a range would pull a newer build than the one the project is tested with
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	touch $@

clean:
	rm -rf $(VENV) demo-output build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
