# `make demo` and `make test` do their own set-up: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
BIN := .venv/bin
CORPUS ?=
CONSTRAINTS ?= constraints.txt

.PHONY: install demo bench gpu-check test lint clean

# What says that the versions of this very file are installed.
INSTALLED := .venv/installed-$(notdir $(CONSTRAINTS))

install: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	rm -f .venv/installed*
	touch $@

demo: install
	$(BIN)/python launch/demo.py $(if $(CORPUS),--corpus '$(CORPUS)')

# The figures of docs/benchmarks.md: a training step of ours and of its peers by length, 5 minutes for each at each at
# most; and what it takes in memory, by length and by depth, 10 minutes for each at each at most. Then the pipeline's.
bench: install
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[bench]'
	$(BIN)/python launch/benchmark.py model --seq-len 1024 4096 16384 65536 262144 1048576 --budget-s 300 \
		--json benchmarks/model-cpu.json
	$(BIN)/python launch/benchmark_plot.py benchmarks/model-cpu.json --output docs/model-cpu.png
	$(BIN)/python launch/benchmark.py memory --json benchmarks/memory-cpu.json --plot docs/memory-cpu.png
	$(BIN)/python launch/benchmark.py pipeline --json benchmarks/pipeline-cpu.json $(if $(CORPUS),--corpus '$(CORPUS)')

# On a machine with a GPU, with whatever Python has a CUDA build of torch there. Nothing is installed: launch/gpu_check.py
# says what it needs.
gpu-check:
	PYTHONPATH=$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH} $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) launch/gpu_check.py

# Four files at a time on two cores: much of their time the tests wait, for clusters and for launchers. A file is one
# worker's, which makes what its tests share once.
test: lint
	OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR=$(CURDIR)/.venv/torch_extensions $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
