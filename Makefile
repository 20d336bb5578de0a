# `make demo` and `make test` set up everything they need in .venv; see `make help`.
TORCH ?= torch==2.13.0
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY := passive
# Bytecode is kept, whatever the environment says: without it every process compiles torch and diffusers anew, seconds each.
export PYTHONDONTWRITEBYTECODE :=

# A CPU build of torch names no Triton; this is the one that goes with it.
TRITON_OF := $(if $(filter torch==2.13.0,$(TORCH)),"triton<3.8; platform_system == 'Linux'")

# Bytecode is compiled when a module is first imported; most of what pip would compile is never.
PIP := python -m pip install -q --no-compile

NATIVE_TESTS := $(wildcard tests/ops/test_run_program*.py) tests/ops/test_conv_native.py tests/ops/test_reductions.py \
  tests/ops/test_aggregate.py tests/ops/test_dropout.py tests/ops/test_draw_members.py tests/ops/test_forest_predict.py \
  tests/tabular/test_forest.py tests/tabular/test_packed.py tests/fold/test_plan_arithmetic.py tests/test_native.py
SOURCES := $(shell find csrc -type f) fastens/_build.py

.PHONY: help demo docs test test-diffusers test-full test-interpreted test-sanitizers test-aarch64 fuzz atlas test-gpu-sample test-gpu-build test-gpu-code lint bench train wheel test-wheel test-newest clean
help:
	@echo "make demo   sample digits with the shipped ensemble by every rule; writes a picture and figures"
	@echo "make test   run the tests; make test-gpu-sample those that compile a sample of the GPU kernels"
	@echo "            make test-full all combinations of parameters of which make test runs a covering sample"
	@echo "            make test-interpreted kernels in further dtypes, interpreted; make test-sanitizers the native"
	@echo "            library under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "            make test-aarch64 the C++ kernels for aarch64, emulated, and by clang++ here: needs"
	@echo "            g++-aarch64-linux-gnu and qemu-user"
	@echo "            make test-gpu-build compiles every GPU kernel for every target, and"
	@echo "            make test-gpu-code reads the machine code of every kernel that the score networks launch"
	@echo "make test-diffusers  run diffusers' own tests of models on ensembles; SOURCE=FOLDER is a checkout of it"
	@echo "make fuzz   hold 10000 random networks under random calls against the loop; NETWORKS=1000 SEED=0 JOBS=2"
	@echo "make atlas  hold public networks against the loop; writes docs/atlas.md"
	@echo "make docs   build the site into build/site, every link checked"
	@echo "make lint   run ruff, pyright and clang-format"
	@echo "make bench  run the benchmarks"
	@echo "make wheel  build the wheel with its native libraries into dist/; make test-wheel installs and tries it;"
	@echo "            make test-newest does so with the newest torch, and runs a sample of the tests there (several GB)"
	@echo "make train  train the demo's members again"
	@echo "TORCH='torch==2.12.0' or TORCH_INDEX=URL choose another torch, VENV=FOLDER another environment"

$(VENV)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; pass PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@$(BIN)/$(PIP) ninja
	@touch $@

$(VENV)/dev: $(VENV)/python pyproject.toml demo/pyproject.toml setup.py tests/interop/requirements.txt
	$(BIN)/$(PIP) -e demo -e ".[dev]" $(TRITON_OF)
	$(BIN)/$(PIP) --no-deps -r tests/interop/requirements.txt
	@touch $@

$(VENV)/demo: $(VENV)/python pyproject.toml demo/pyproject.toml setup.py
	@$(BIN)/$(PIP) -e demo -e ".[demo]"
	@touch $@

# Follows the sources. Exit status 3: nothing to build with here, so the reference kernels serve.
build/native: $(SOURCES) | $(VENV)/python
	@mkdir -p build
	@$(BIN)/python fastens/_build.py fastens/_lib build/cpu > build/native.log 2>&1 && touch $@ \
	  || { status=$$?; tail -n 30 build/native.log; test $$status -eq 3; }

demo: $(VENV)/demo build/native
	@$(BIN)/fastens demo

SELECTED := not gpu_compiler and not interpreted and not full
test: $(VENV)/dev build/native
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 4 -m "$(SELECTED)" tests

# The combinations of parameters that `make test` samples.
test-full: $(VENV)/dev build/native
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "full and not interpreted" tests

# Kernels in Triton's interpreter in the dtypes that `make test` leaves out.
test-interpreted: $(VENV)/dev build/native
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m interpreted tests/ops tests/fold

# The native library under AddressSanitizer and UndefinedBehaviorSanitizer, and the tests that run it.
SANITIZED := build/sanitized
SANITIZERS = $(shell $${CXX:-c++} -print-file-name=libasan.so) $(shell $${CXX:-c++} -print-file-name=libubsan.so)
$(SANITIZED)/library: $(SOURCES) | $(VENV)/python
	FASTENS_SANITIZE=1 $(BIN)/python fastens/_build.py $(SANITIZED) $(SANITIZED)/objects > build/sanitized.log 2>&1 \
	  || { tail -n 30 build/sanitized.log; false; }
	@touch $@

test-sanitizers: $(VENV)/dev $(SANITIZED)/library
	FASTENS_LIB=$(SANITIZED) LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 \
	  $(BIN)/python -m pytest -q -p no:faulthandler $(NATIVE_TESTS) -k "not triton"

# The C++ kernels without torch, for aarch64 under qemu-user (packages g++-aarch64-linux-gnu and qemu-user of Debian), and
# for this machine by clang++ where there is one, against the references.
test-aarch64: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/isa/on_machines.py

# The CUDA library little optimised, and a sample of the Triton kernels for every GPU; needs no GPU.
test-gpu-sample: $(VENV)/dev
	$(BIN)/python -m pytest -q -m gpu_compiler tests/kernels

# diffusers' own tests of models on ensembles: SOURCE is a checkout of diffusers, whose wheel has no tests.
SOURCE ?= ../diffusers
test-diffusers: $(VENV)/dev
	$(BIN)/$(PIP) accelerate
	DIFFUSERS_SOURCE=$(abspath $(SOURCE)) $(BIN)/python -m pytest -q tests/interop/test_diffusers_mixins.py

# Prints shares folded, looped and planned, why not, and every fault with its seed and a small case that shows it.
NETWORKS ?= 10000
SEED ?= 0
JOBS ?= 2
fuzz: $(VENV)/dev build/native
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --networks $(NETWORKS) --seed $(SEED) --samplers 3 --jobs $(JOBS)

# Minutes: every network of others against the loop, and the table of docs/atlas.md; `make test` compares a sample.
atlas: $(VENV)/dev build/native
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/atlas/every_network.py
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.atlas

# Minutes: every Triton kernel and the CUDA library, compiled in full for every GPU; needs no GPU.
test-gpu-build: $(VENV)/dev
	$(BIN)/python -m pytest -q tests/kernels/every_target.py

# An hour: what plans of the score networks launch at B = 1, 16 and 256, compiled for sm_90a and read, and the list of what
# was, which the wheel carries. Another Triton than the one in $(VENV): TRITON=FOLDER, where its wheel is unpacked.
test-gpu-code: $(VENV)/dev
	PYTHONPATH=$(TRITON) $(BIN)/python -m pytest -q tests/kernels/code_of_plans.py
	PYTHONPATH=$(TRITON) $(BIN)/python -m bench.gpu_proven $(foreach b,1 16 256,songunet:$(b) ddpmpp:$(b) ffhq256:$(b))

# Static: what it documents is parsed, not imported.
docs: $(VENV)/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site: build/site/index.html"

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*' | xargs -r $(BIN)/clang-format --dry-run -Werror
	$(BIN)/pyright

bench: $(VENV)/dev build/native
	$(BIN)/fastens bench

train: $(VENV)/demo
	$(BIN)/python -m fastens.demo.train

wheel: $(VENV)/python
	rm -rf dist
	$(BIN)/python -m pip wheel -q --no-deps -w dist . ./demo
	@ls dist

build/wheel-venv/python: $(VENV)/python
	$(BIN)/python -m venv build/wheel-venv
	build/wheel-venv/bin/$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@touch $@

test-wheel: wheel build/wheel-venv/python
	build/wheel-venv/bin/$(PIP) --force-reinstall --no-deps dist/fastens-*.whl
	build/wheel-venv/bin/$(PIP) dist/fastens-*.whl
	build/wheel-venv/bin/python -I tests/wheel_smoke.py
	build/wheel-venv/bin/fastens info

# The wheel and a sample of the tests with the newest torch that they know, whatever $(TORCH) is: a CUDA build, several GB.
NEWEST ?= torch==2.14.1
NEWEST_TESTS := tests/test_native.py tests/ops/test_aggregate.py tests/fold/test_contract_layers.py
build/newest/python: $(VENV)/python
	$(BIN)/python -m venv build/newest
	build/newest/bin/$(PIP) "$(NEWEST)" pytest expecttest diffusers safetensors tqdm scikit-learn
	@touch $@

test-newest: wheel build/newest/python
	build/newest/bin/$(PIP) --force-reinstall --no-deps dist/fastens-*.whl
	build/newest/bin/$(PIP) dist/fastens-*.whl
	build/newest/bin/python -I tests/wheel_smoke.py
	OMP_NUM_THREADS=1 build/newest/bin/python -m pytest -q $(NEWEST_TESTS)

clean:
	rm -rf build dist *.egg-info fastens/_lib $(VENV)
