# make serve: install, index this Python's documentation, serve it on http://127.0.0.1:8080
# make test, make lint: what continuous integration runs, with make results ARGS=--quick and make answers
# make bench: the measurements, with their goals
# make results: train and measure every system of the papers; resumable
# make train ARGS="DATA --encoder sentence-transformers/all-MiniLM-L6-v2 --out runs/mine": train on a folder in the BEIR layout
# make clean: remove the environment, builds and caches of tools; what was trained and indexed stays

PYTHON ?= python3
ARGS =
OUT = runs/study
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet
LINTED := service models loadtest tests

# On Linux, PyPI's torch brings CUDA along; without a GPU, this saves two gigabytes:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test

# A stamp for each set of extras, so that a second run installs nothing; pyproject.toml makes them old.
SERVING := $(VENV)/.serving
DEVELOPING := $(VENV)/.developing

.DELETE_ON_ERROR:
.PHONY: serve test lint bench results answers train clean redis

serve: $(SERVING)
	$(BIN)/rhumb demo $(ARGS)

test: $(DEVELOPING) redis
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

lint: $(DEVELOPING)
	$(BIN)/ruff check $(LINTED)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/yamllint --strict --config-file deploy/yamllint.yml docker-compose.yml deploy

bench: $(DEVELOPING)
	$(BIN)/rhumb bench trie
	$(BIN)/rhumb bench hamming
	bundle=$$($(BIN)/rhumb demo --prepare) && $(BIN)/rhumb bench search "$$bundle"

# The study of all systems: make results ARGS='--data DATA --encoder ENCODER', or ARGS=--quick for a tiny one.
results: $(DEVELOPING)
	$(BIN)/rhumb study --out $(OUT) $(ARGS)

# Ask every model of a quick study over HTTP: make answers OUT=...; of a whole one, those of a data set: ARGS=DATA/tldr
answers: $(DEVELOPING)
	$(BIN)/python -m tests.answer_over_http $(OUT) $(ARGS)

train: $(DEVELOPING)
	$(BIN)/rhumb train $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(LINTED) -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 15) or sys.exit("Rhumbline needs Python 3.11 to 3.14, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(SERVING): $(VENV)/.made pyproject.toml
	$(INSTALL) --editable '.[cpu]'
	touch $@

$(DEVELOPING): $(VENV)/.made pyproject.toml
	$(INSTALL) --editable '.[cpu,train,dev,load]'
	touch $(SERVING) $@

# The cache's tests want a real Redis; without one they are skipped and say so.
redis:
	@command -v redis-server >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& { apt-get update -qq; RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
		apt-get install -qq --yes --no-install-recommends redis-server >/dev/null; }; } \
		|| echo 'no redis-server: its tests will be skipped' >&2
