# make demo, make test: each sets up what it needs on a fresh machine (virtual environment, pinned packages, csrc) and
# then does its job.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
unexport PYTHONDONTWRITEBYTECODE # pytest keeps what it has rewritten, which halves the time to collect the tests
BIN = $(VENV)/bin

.PHONY: demo test test-all test-ptx study wheel-test deepspeed docs lint bench gpu gpu-pack clean

demo: $(VENV)/demo-ready
	@echo "== The demo: it trains for 1 to 3 minutes on two cores and writes demo-output/demo.png"
	$(BIN)/python -m graddrop_kernels.demo $(ARGS)

# A sample of the suite, another one every run, on two cores; a file's tests stay together, as they share what is slow to
# make. The whole suite: make test-all.
WORKERS ?= 2
# In the order of the folders: the default begins with the files of most cases, and ends with one long case on one core.
SUITE = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
test: $(VENV)/ready
	$(SUITE) --sample 1 $(ARGS)

test-all: $(VENV)/ready
	$(SUITE) $(ARGS)

# The whole table of verify on what Triton and nvcc compile, run on the CPU; a sample of it is in the others. Shorter
# once .ptx-cache has the compiled code.
test-ptx: $(VENV)/ready
	GRADDROP_PTX=all $(BIN)/python -m pytest -n $(WORKERS) tests/backends/test_ptx_cases.py $(ARGS)

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
	$(BIN)/python -m benchmarks.cpu.training
	$(BIN)/python -m benchmarks.cpu.sampled_blocks
	$(BIN)/python -m benchmarks.cpu.growing_costs
	$(BIN)/python -m benchmarks.cpu.trained_rows
	$(BIN)/python -m benchmarks.cpu.attached_mask
	$(BIN)/python -m benchmarks.cpu.precision
	$(BIN)/python -m benchmarks.render.figures
	$(BIN)/python -m benchmarks.render.mask_pictures
	$(BIN)/python -m benchmarks.render

gpu: $(VENV)/ready
	$(BIN)/python -m benchmarks.gpu $(ARGS)

# What a run on a GPU machine would compile, compiled here without a GPU, into gpu-pack/.
gpu-pack: $(VENV)/ready
	$(BIN)/python -m benchmarks.gpu.pack $(ARGS)

# What the demo needs. The C++ library is compiled while pip fetches and unpacks; --no-compile leaves the thousands of
# modules that nothing imports uncompiled. Constraints pin torch: the newest would come with gigabytes of CUDA libraries.
INSTALL = GRADDROP_NO_EXT=1 $(BIN)/pip install --no-compile --prefer-binary -c constraints.txt
SOURCES = setup.py pyproject.toml constraints.txt $(wildcard csrc/*.h csrc/*/*)

$(VENV)/demo-ready: $(SOURCES)
	@echo "== Setting up $(VENV): packages for the demo, and the C++ library beside; 1 to 2 minutes on two cores"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt setuptools
	$(BIN)/python setup.py build_ext --inplace & \
	$(INSTALL) --no-build-isolation -e '.[demo]'; installed=$$?; wait $$! && exit $$installed
	touch $@

# What everything else needs besides, and CUDA code for the tests, which read it and run it on the host: 80 and 90.
$(VENV)/ready: $(VENV)/demo-ready
	@echo "== Setting up $(VENV): packages for the tests, and CUDA code where there is nvcc; 2 minutes on two cores"
	GRADDROP_CUDA_ARCHS="native;80;90" $(BIN)/python setup.py build_ext --inplace & \
	$(INSTALL) -e '.[test]'; installed=$$?; wait $$! && exit $$installed
	touch $@

clean:
	rm -rf $(VENV) .ptx-cache build dist *.egg-info graddrop_kernels/_cpu.so graddrop_kernels/_cuda.so
