# Everything builds its own .venv from constraints.txt; a machine needs Python 3.11 or newer, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made-from
EXTRAS := docker,kubernetes,s3,gcs,azure,sftp,http,conda,postgres,celery,demo
AGENT_IMAGE ?= mlpipelines-agent:0.1.0
# Some machines forbid Python to write bytecode; an uncompiled Airflow is slow in every process.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo up down test lint format bench agent constraints clean

help: ## Show this
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: $(STAMP) ## Run the flights pipeline on a real Airflow, change two things, run it again
	$(BIN)/mlpipelines demo

up: $(STAMP) ## Start the demo's Airflow and keep it, with its UI
	$(BIN)/mlpipelines up

down: $(STAMP) ## Stop what `make up` started
	$(BIN)/mlpipelines down

test: $(STAMP) ## Run every test that this machine can run
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP) ## Check style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Put the code into its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Measure; each figure stands beside a baseline of the same run
	$(BIN)/python tests/benchmarks/run.py

agent: ## Build the image of the agent for Kubernetes computes, under the name AGENT_IMAGE
	docker build --file images/agent/Dockerfile --tag $(AGENT_IMAGE) .

$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode \
	  --constraint constraints.txt --editable '.[$(EXTRAS)]' --group dev
	@touch $(STAMP)

constraints: $(STAMP) ## Pin the newest versions anew
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --upgrade --no-annotate --no-header \
	  --no-emit-index-url --no-emit-find-links --all-extras --group dev \
	  pyproject.toml --output-file constraints.txt

clean: ## Remove what the commands above made
	rm -rf $(VENV) .airflow .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
