# make train     everything from nothing to a trained model     make test      lint and tests, minutes
# make ablation  a small ablation, and its report               make test-all  the slow checks too
# make setup     what all begin with: .venv                     make lock      resolve requirements.lock anew
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
IN_RANGE := sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
# The first of these that is 3.10 to 3.13; `make PYTHON=/path/to/python3.12 ...` overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys; $(IN_RANGE)' 2>/dev/null && echo $$p && break; done)
# On Linux without an NVIDIA GPU PyTorch's CPU build of the pinned version, a third of the size, where one of pip's indexes has it,
# or TORCH_INDEX: `make TORCH_INDEX=URL setup`.
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' requirements.lock)
CPU_TORCH := $(if $(filter Linux,$(shell uname -s)),$(if $(wildcard /proc/driver/nvidia/gpus/* /dev/nvidia0),,$(TORCH)+cpu))
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --require-virtualenv
# Four tests at a time, some of which wait, each with one thread: libraries that take all cores are slower beside each other.
TESTS := PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder
# What must not be inherited: a user's site-packages, another project's path, or that every process compiles its modules anew.
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup train ablation test test-all lint tests tests-all lock clean
.DELETE_ON_ERROR:

setup: $(VENV)/.installed

# torch first and by its pin, so that no other package pulls another build of it.
$(VENV)/.installed: pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "error: Python 3.10 to 3.13 is needed; none was found (make PYTHON=/path/to/python3.12)" >&2; exit 2; }
	@if $(BIN)/python -c 'import pip, sys; $(IN_RANGE)' 2> /dev/null; then \
		echo "setup: bringing $(VENV), of $$($(BIN)/python --version), up to date"; else \
		echo "setup: creating $(VENV) with $$($(PYTHON) --version) and installing the pinned dependencies (some minutes the first time)"; \
		$(PYTHON) -m venv --clear $(VENV) || { echo "error: $(PYTHON) cannot make a virtual environment (on Debian: apt install python3-venv)" >&2; exit 2; }; fi
	@{ test -n "$(CPU_TORCH)" && \
		$(PIP) install --retries 1 --timeout 20 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(CPU_TORCH)" 2>/dev/null; } || $(PIP) install "$(TORCH)"
	@$(PIP) install -c requirements.lock -e '.[train]'
	@$(BIN)/python -m launch.calm_launchers > /dev/null
	@touch $@

# A torch for CUDA brings the Triton that it was built with; one without takes the version that the lock names.
$(VENV)/.installed-test: $(VENV)/.installed
	@echo "setup: installing what the tests need"
	@$(BIN)/python -c 'import triton' 2>/dev/null || \
		$(PIP) install "$$(sed -n 's/^# \(triton==[0-9.]*\).*/\1/p' requirements.lock); platform_system == 'Linux'"
	@$(PIP) install -c requirements.lock -e '.[train,test]'
	@touch $@

train: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed train.py ffn=swiglu \
		optim=muon optim.lr=8e-3 tokens=4.96M run=nano

ablation: setup
	@$(BIN)/python -m ablation.run ablation=smoke yes=true jobs=2
	@$(BIN)/python -m ablation.report ablations/smoke

# The checker of types needs a minute of one core, which the tests leave free now and then.
test test-all: $(VENV)/.installed-test
	@$(MAKE) --no-print-directory --jobs=2 lint $(@:test%=tests%)

lint: $(VENV)/.installed-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/basedpyright

tests: $(VENV)/.installed-test
	@$(TESTS)

tests-all: $(VENV)/.installed-test
	@$(TESTS) -m ''

# Pins that stand in the lock stay (edit or delete a line to move it). CUDA libraries and Triton are left out: torch's own
# metadata pins them for the build of torch that is installed.
lock: setup
	@$(PIP) install uv
	@cp requirements.lock requirements.lock.new
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --no-annotate --no-header --all-extras \
		--no-emit-package flash-attn pyproject.toml -o requirements.lock.new
	@{ grep '^#' requirements.lock; grep -vE '^(#|nvidia-|cuda-|triton==|setuptools==)' requirements.lock.new; } > requirements.lock.tmp
	@rm requirements.lock.new && mv requirements.lock.tmp requirements.lock

clean:
	rm -rf $(VENV)
