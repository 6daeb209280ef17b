# `make demo` and `make test` work from a fresh clone: each creates .venv on its first run.
PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
ARGS        ?=

BIN       := $(VENV)/bin
PIP       := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
REQUIRES  := settings.ini setup.py pyproject.toml $(CONSTRAINTS)
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help demo test experiments docs lab readme sync constraints clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: $(RUN_STAMP) ## classify bundled networks, look some up, train a few here, and write a report
	@$(BIN)/lps demo $(ARGS)

test: $(DEV_STAMP) ## run ruff and all tests, notebooks included, in two processes (ARGS goes to pytest)
	@$(BIN)/ruff check --quiet
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup $(ARGS)

experiments: $(DEV_STAMP) ## run every experiment on one model set (ARGS goes to scripts/experiments.py)
	@$(BIN)/python scripts/experiments.py $(ARGS)

docs: $(DEV_STAMP) ## build the documentation site into _docs/
	@$(BIN)/python scripts/docs.py site

lab: $(DEV_STAMP) ## open JupyterLab on nbs/
	@$(BIN)/jupyter lab --notebook-dir=nbs $(ARGS)

sync: $(DEV_STAMP) ## write lps/, the sidebar and README.md from the notebooks, and clean the notebooks
	@$(BIN)/nbdev-export && $(BIN)/nbdev-clean && $(BIN)/python scripts/docs.py sidebar && $(BIN)/python scripts/docs.py readme

readme: $(DEV_STAMP) ## write README.md from nbs/index.ipynb
	@$(BIN)/python scripts/docs.py readme

constraints: $(DEV_STAMP) ## write the installed versions to constraints.txt
	@$(BIN)/python scripts/constraints.py > constraints.tmp && mv constraints.tmp constraints.txt

clean: ## delete the products of all targets but .venv
	@rm -rf _docs _proc build dist *.egg-info .pytest_cache .ruff_cache .hypothesis && find lps nbs tests scripts -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## delete .venv too
	@rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) scripts/python_floor.py
	@echo "Making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(RUN_STAMP): $(REQUIRES) | $(BIN)/python
	@echo "Installing lps and its requirements into $(VENV), which takes some minutes"
	@$(PIP) --editable .
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@echo "Installing the development tools into $(VENV)"
	@$(PIP) --editable '.[dev]'
	@touch $@
