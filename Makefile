# make demo, make test: either does all the set-up itself. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_HOME ?= $(CURDIR)/.cache/dnd-home

.PHONY: install demo test check clients clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dnd needs Python 3.11 or newer; try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@# --no-compile: most of what gets installed is never imported, Python compiles the rest on first use
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install
	DND_TEST_HOME='$(TEST_HOME)' $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

# CLIENTS="openai-3 llm" runs these alone; uv installs several times faster than pip
clients: install
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv || true
	$(BIN)/python tests/clients/run.py $(CLIENTS)

check: install
	$(BIN)/ruff check .
	$(BIN)/mypy dnd_sdk cli integrations

clean:
	rm -rf build dist *.egg-info .dnd .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis $(STAMP)
