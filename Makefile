# Everything starts here: `make book` and `make test` need Python 3.11 or newer and git, no more.
PYTHON ?= python3
VENV ?= .venv
# Versions that CI uses; `make CONSTRAINTS= ...` takes the newest ones instead.
CONSTRAINTS ?= constraints.txt
PORT ?= 8000
# Seconds that one notebook may take.
NOTEBOOK_TIMEOUT ?= 600
export NOTEBOOK_TIMEOUT
# Processes of the unit tests, at most 4, of one thread each; 0 runs them in one, in order.
UNIT_JOBS ?= logical
# Characters in a line of a notebook: what a page shows without scrolling.
NOTEBOOK_WIDTH := 86

# The browser that looks at the book; empty leaves its tests out, except in CI.
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

PY := $(VENV)/bin/python
READY := $(VENV)/.stamp

.DEFAULT_GOAL := help
.PHONY: help book test lint fmt unit notebooks render browser serve gpu pins clean distclean

help: ## list the targets
	@echo "usage: make TARGET"
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14 | sed 's/^/  /'

$(READY): pyproject.toml requirements-oracles.txt book/environment.py $(CONSTRAINTS)
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found; install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) book/environment.py $(VENV) $(CONSTRAINTS)

# Steps run one after the other, in this order, also under `make -j`.
book: $(READY) ## execute the notebooks that changed, render the book, say where it is
	@$(MAKE) --no-print-directory notebooks
	@$(MAKE) --no-print-directory render

test: $(READY) ## lint, types, unit tests, every notebook, the book, the book in a browser
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory book
	@$(MAKE) --no-print-directory browser

lint: $(READY) ## ruff (lint and format) and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check --exclude notebooks .
	@$(PY) -m ruff format --check --line-length $(NOTEBOOK_WIDTH) notebooks
	@$(PY) -m mypy

fmt: $(READY) ## put code and notebooks into the house format
	@$(PY) -m ruff format --exclude notebooks .
	@$(PY) -m ruff format --line-length $(NOTEBOOK_WIDTH) notebooks
	@$(PY) -m ruff check --fix .

unit: $(READY) ## unit tests
	@$(PY) -m pytest -q -n $(UNIT_JOBS) --maxprocesses 4 --dist loadfile

notebooks: $(READY) ## execute the notebooks that changed, against the built wheel
	@$(PY) book/execute.py

render: $(READY) ## render the book from the executed notebooks
	@$(PY) book/build.py

browser: $(READY) ## look at the rendered book in a headless Chromium
ifneq ($(CHROMIUM),)
	@CHROMIUM="$(CHROMIUM)" $(PY) -m pytest -q -m browser tests/test_book.py
else ifneq ($(filter 1 true,$(REGLIB_REQUIRE_BROWSER) $(CI)),)
	@echo "make: no Chromium was found, and CI (or REGLIB_REQUIRE_BROWSER=1) demands the browser tests" >&2; exit 1
else
	@echo "browser tests LEFT OUT: no Chromium on this machine (Debian: sudo apt-get install chromium)"
endif

serve: $(READY) ## serve the rendered book on this machine (PORT=8000)
	@test -f build/html/index.html || { echo "make: there is no book yet; run: make book" >&2; exit 1; }
	@$(PY) -m http.server $(PORT) --bind 127.0.0.1 --directory build/html

# A GPU machine may bring its own Python with torch, and no network to make .venv from.
gpu: ## run the next pending job of data_scripts/gpu_jobs
	@$(if $(wildcard $(PY)),$(PY),$(PYTHON)) data_scripts/gpu_queue.py

pins: $(READY) ## write constraints.txt from what .venv holds
	@$(PY) -m pip freeze --exclude-editable | grep -Eiv '^(nvidia|cuda|triton|digital|-e|#)|@' > constraints.part
	@(sed '/^[^#]/d' constraints.txt; cat constraints.part) > constraints.new
	@mv constraints.new constraints.txt; rm constraints.part

clean: ## remove everything built, keep .venv
	rm -rf build _build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find reglib tests book data_scripts -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)
