# One verb per thing a developer does. Every verb does its own set-up; none needs another.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# PyPI's build, which brings CUDA along and runs without a card too; TORCH names another version.
TORCH ?= torch==2.13.0
# These take half an hour and more, or need a model of yours; their docstrings say how to run them.
SLOW_BENCHES := $(addprefix bench/,tune_baselines.py studies.py reward_truthfulqa.py robust.py length_curve.py consumers.py card.py utilities.py processor.py temperatures.py llama_templates.py placement.py)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Where it is set, every process of a test session compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo compare test check format docs bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: install
	$(BIN)/dpa demo

compare: install
	$(BIN)/dpa compare

test: install
	$(BIN)/python -m pytest -n 4 --dist worksteal tests

check: install
	$(BIN)/ruff check src tests bench scripts
	$(BIN)/ruff format --check src tests bench scripts
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix src tests bench scripts
	$(BIN)/ruff format src tests bench scripts

docs: install
	$(BIN)/python scripts/make_docs.py

bench: install
	for file in $(filter-out $(SLOW_BENCHES),$(wildcard bench/*.py)); do $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(VENV) build src/*.egg-info  # runs/ holds what was trained
