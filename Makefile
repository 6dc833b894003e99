# Every target builds .venv itself; nothing but Python 3.11 or newer is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A folder of your own captioned clips for `make demo CLIPS=folder`.
CLIPS ?= demo/clips
# Flags for pip, such as an index with CPU or other CUDA builds of torch.
PIP_FLAGS ?=

.PHONY: demo test test-all lint check format clean

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "crepatrain needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(VENV)/installed
	@rm -rf demo/checkpoint demo/cache demo/run; test "$(CLIPS)" != demo/clips || rm -rf demo/clips
	$(BIN)/crepatrain make-random wan demo/checkpoint
	@test "$(CLIPS)" != demo/clips || $(BIN)/crepatrain make-clips demo/clips
	$(BIN)/crepatrain fit configs/demo.json --train_data "$(CLIPS)"
	@echo "Next: make demo CLIPS=folder-of-your-clips, or start from configs/wan2.1-1.3b-t2v.json for a real model."

# The quick tests: at most eight minutes on two cores.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2

# Every test once.
test-all: test
	$(BIN)/python -m pytest -m slow --numprocesses 2

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

check: lint test

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .import_linter_cache
