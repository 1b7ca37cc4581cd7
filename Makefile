PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

PYTEST := OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest
# the method, the operator, its ways to be called, and one pipeline
QUICK := stages layout orders tokens config errors operator metamorphic arrange plan rules tree diffusers

# A machine with a GPU brings its own Python with torch and the packages of [demo] and [dev]: nothing is installed.
# Compiled kernels are shared by all workers.
GPU_PYTHON ?= python
GPU_WORKERS ?= 8
GPU_TESTS ?= tests
GPU_PYTEST := PYTHONPATH=src:tests OMP_NUM_THREADS=1 TRITON_CACHE_DIR=$(CURDIR)/build/triton \
	TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor TORCHINDUCTOR_COMPILE_THREADS=1 $(GPU_PYTHON) -m pytest

.PHONY: demo docs test quick slow-test gpu-test gpu2-test upstream-test engines-test browser-test lint clean

demo: $(STAMP)
	$(BIN)/rectified-spaattn demo --out demo-output

# worksteal: neighbours stay in one worker, and with them what a file makes once
test: $(STAMP) lint
	$(PYTEST) -n auto --dist worksteal -m "not gpu and not slow"

# under 40 seconds: what to run while working
quick: $(STAMP) lint
	$(PYTEST) -n auto -m "not gpu" -k "not triton" $(QUICK:%=tests/test_%.py)

# thousands of random calls; FUZZ_FIRST=1200 goes on from there
slow-test: $(STAMP)
	$(PYTEST) -n auto -m "slow and not gpu" tests

# GPU_PYTHON=python3.12 make gpu-test; the large tests have the GPU to themselves
gpu-test:
	$(GPU_PYTEST) -n $(GPU_WORKERS) --dist loadgroup -m "gpu and not large" $(GPU_TESTS)
	$(GPU_PYTEST) -n 0 -s -m "gpu and large" tests/test_gpu_kernels.py

# GPU_PYTHON=python3.12 make gpu2-test; one process a GPU over NCCL: GPUS=4 for four, RANK_OPTIONS="-k compiled" for some
GPUS ?= 2
gpu2-test:
	$(GPU_PYTEST:pytest=torch.distributed.run) --standalone --nproc-per-node $(GPUS) -m pytest -o addopts= -q \
		-p no:cacheprovider -p rank_group --noconftest $(RANK_OPTIONS) \
		tests/rank_layer_tests.py tests/rank_tests.py

# diffusers' own tests with every model enabled: make upstream-test DIFFUSERS=checkout
upstream-test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/upstream.py $(DIFFUSERS) -n auto

# real engines, in the pythons that run them: make engines-test COMFYUI=checkout COMFYUI_PYTHON=python SGLANG_PYTHON=python
COMFYUI_PYTHON ?= python
engines-test:
	$(if $(COMFYUI)$(SGLANG_PYTHON),,$(error say COMFYUI=checkout, or SGLANG_PYTHON=python, or both))
	$(if $(COMFYUI),PYTHONPATH=src $(COMFYUI_PYTHON) tests/engine_comfyui.py $(COMFYUI))
	$(if $(SGLANG_PYTHON),PYTHONPATH=src $(SGLANG_PYTHON) tests/engine_sglang.py)
	$(if $(SGLANG_PYTHON),PYTHONPATH=src $(SGLANG_PYTHON) tests/engine_sglang_generate.py)

# the app in a Chromium that is there (apt-get install chromium); everything else goes into build/browser
BROWSER ?= chromium
browser-test:
	$(PYTHON) -m venv build/browser
	build/browser/bin/python -m pip install --quiet --disable-pip-version-check \
		"torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	grep -v '^pillow==' constraints.txt > build/browser/constraints.txt  # gradio asks for an older one
	build/browser/bin/python -m pip install --quiet --disable-pip-version-check -c build/browser/constraints.txt \
		-e ".[app]" playwright
	build/browser/bin/python tests/browser_app.py build/browser/pictures --browser "$$(command -v $(BROWSER))"

# pages with the API reference, to build/site; a warning is an error
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: $(STAMP)
	$(BIN)/ruff check src studies tests benchmarks examples comfyui
	$(BIN)/ruff format --check src studies tests benchmarks examples comfyui
	$(BIN)/mypy

# torch comes first and pinned: a range would pull a newer build than the one the project is tested with
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	touch $@

clean:
	rm -rf $(VENV) demo-output build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
