# make demo, make test: each sets up everything on a fresh machine (virtual environment, pinned packages, csrc) and then does its job.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN = $(VENV)/bin

.PHONY: demo test study wheel-test deepspeed docs lint bench gpu clean

demo: $(VENV)/ready
	$(BIN)/python -m graddrop_kernels.demo $(ARGS)

test: $(VENV)/ready
	$(BIN)/python -m pytest $(ARGS)

# The public part of the suite on a wheel, out of a source archive, where the source tree cannot be imported.
wheel-test: $(VENV)/ready
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/project/installed.py dist/*.whl $(ARGS)

# DeepSpeed beside the other packages, without which its tests are skipped. Its build asks the torch that is there.
deepspeed: $(VENV)/ready
	DS_BUILD_OPS=0 $(BIN)/pip install --no-build-isolation -c constraints.txt deepspeed

# Pictures, reference and pages, into site/.
docs: $(VENV)/ready
	$(BIN)/python docs/make_site.py

# The runs of benchmarks/xglue/studies/small.json from nothing, compared with the committed ones; STUDY=stand-ins takes
# another. One thread a run: sums in another order would give other bits.
STUDY ?= small
study: $(VENV)/ready
	$(BIN)/python -m benchmarks.xglue study $(STUDY) --workers $$(getconf _NPROCESSORS_ONLN) --threads 1 $(ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks.cpu.bandwidth
	$(BIN)/python -m benchmarks.cpu.step
	$(BIN)/python -m benchmarks.cpu.host_overhead
	$(BIN)/python -m benchmarks.cpu.memory
	$(BIN)/python -m benchmarks.cpu.modes
	$(BIN)/python -m benchmarks.cpu.skip_backward
	$(BIN)/python -m benchmarks.cpu.precision
	$(BIN)/python -m benchmarks.render.figures
	$(BIN)/python -m benchmarks.render.mask_pictures
	$(BIN)/python -m benchmarks.render

gpu: $(VENV)/ready
	$(BIN)/python -m benchmarks.gpu $(ARGS)

# torch first: an unpinned one would be the newest, with gigabytes of CUDA libraries.
$(VENV)/ready: setup.py pyproject.toml constraints.txt $(wildcard csrc/*.h csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info graddrop_kernels/_cpu.so graddrop_kernels/_cuda.so
