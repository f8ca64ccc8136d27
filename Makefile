# `make demo` paints with the model that ships; `make test` is what CI runs. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest

PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest
# One process for each of two cores, whole files at a time. Each computes with one thread: two that wait for each other's cores
# take many times as long. The seed of hashes is fixed so that both see the same tests.
PARALLEL := PYTHONHASHSEED=0 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(PYTEST) -n 2 --dist loadfile
# No torch is needed to ask for help, and a GPU machine may bring its own Python: only gpu-check runs without the environment.
GPU_PYTHON ?= $(if $(wildcard $(PY)),$(PY),$(PYTHON))
REQUIREMENTS := pyproject.toml constraints.txt
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
comma := ,

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_PROGRESS_BAR := off
export PIP_QUIET := 1
export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo app chromium test test-all test-oldest lint format gpu-check clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.stamp-demo ## install, then generate pictures with the shipped model
	$(VENV)/bin/arsd demo

app: $(VENV)/.stamp-app ## install what the app needs, then serve it on this machine
	$(VENV)/bin/arsd app

test: lint ## lint, types and the quick tests
	$(PARALLEL) -m "not slow" --timeout 600

test-all: lint chromium ## everything: slow tests, the app in a browser, and the oldest transformers too
	ARSD_BROWSER=required $(PYTEST) --timeout 3600
	$(MAKE) test-oldest

chromium: ## Debian's Chromium, for the tests of the app in a browser
	@command -v chromium >/dev/null || { $(SUDO) apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; }

test-oldest: $(VENV)/.stamp-test $(OLDEST)/.stamp ## the cache and decoding tests against transformers 5.17.0
	PYTHONPATH="$(abspath $(OLDEST))" $(PY) -c 'import transformers as t; assert t.__version__ == "5.17.0", t.__file__'
	PYTHONPATH="$(abspath $(OLDEST))" $(PARALLEL) -m "not slow" --timeout 600 \
	    tests/test_cache.py tests/test_decode.py tests/test_llamagen_files.py tests/test_text_encoders.py tests/test_vqgan.py \
	    tests/test_chameleon.py tests/test_chameleon_files.py tests/test_families.py tests/test_continuation.py \
	    tests/test_generate_fn.py tests/test_generate_fn_limits.py tests/test_llamagen_published.py tests/test_diffusers_manners.py \
	    tests/test_emu3.py tests/test_janus.py tests/test_janus_files.py tests/test_simplear.py tests/test_liquid.py \
	    tests/test_video_pipeline.py tests/test_clip_files.py tests/test_cosmos_files.py tests/test_mineworld.py \
	    tests/test_larp.py tests/test_larp_pipeline.py tests/test_ivideogpt.py \
	    tests/test_cosmos_tokenizer.py tests/test_glm_image.py tests/test_glm_acceleration.py tests/test_glm_painting.py \
	    tests/test_sparse_to_dense.py tests/test_selection.py tests/test_video_llm.py tests/test_layer_skip.py

lint: $(VENV)/.stamp-test ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.stamp-test ## apply ruff's fixes and formatting
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

gpu-check: ## the checks that need an accelerator
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu_check.py

clean: ## remove caches and builds (not the environment: it is 5.5 GB to fetch again)
	rm -rf build dist arsd.egg-info .pytest_cache .mypy_cache .ruff_cache "$(OLDEST)"
	find arsd pipelines tokenizers metrics app tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# An environment is made when it is absent or broken. torch and torchvision come from one index in one pip call: a torchvision
# built against another torch does not import (and takes transformers and diffusers down with it).
define environment
@$(PY) -c "" 2>/dev/null || { \
    $(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "constraints.txt needs Python 3.11: make PYTHON=python3.11 ...")' \
    && echo "creating $(VENV)" && $(PYTHON) -m venv --clear "$(VENV)"; }
@echo "installing into $(VENV)$(if $(1), with $(1)) (the first time fetches about 3 GB)"
$(PY) -m pip install -c constraints.txt torch torchvision -e ".$(1)"
endef

$(VENV)/.stamp-demo: $(REQUIREMENTS)
	$(call environment,)
	@touch $@

$(VENV)/.stamp-app: $(REQUIREMENTS)
	$(call environment,[app$(comma)video])
	@touch $(VENV)/.stamp-demo $@

$(VENV)/.stamp-test: $(REQUIREMENTS)
	$(call environment,[test])
	@touch $(VENV)/.stamp-demo $(VENV)/.stamp-app $@

$(OLDEST)/.stamp: constraints-oldest.txt constraints.txt | $(VENV)/.stamp-test
	rm -rf "$(OLDEST)"
	$(PY) -m pip install --no-deps --target "$(OLDEST)" -r constraints-oldest.txt
	@touch $@
