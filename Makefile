# The two commands: `make demo` trains a small model, `make test` runs the tests.
# Both make the environment first; nothing that is done already is done again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where there is an NVIDIA GPU, torch's default build; elsewhere the CPU build that is pinned.
PACKAGES := $(shell nvidia-smi -L >/dev/null 2>&1 && echo '-e .[dev,demo,surveys,remote,hub,plots,tensorboard,energy]' || echo '-r requirements-cpu.txt')

# Make the demo from real images instead: make demo DATA=FOLDER
DATA ?=
DEMO := demo/$(if $(DATA),real-$(firstword $(shell printf '%s' '$(abspath $(DATA))' | cksum)),simulated)
STAMPS := demo/stamps
RANKS ?= 2

export DS_BUILD_OPS := 0

.PHONY: venv demo test lint bench clean

venv: $(VENV)/ready

$(VENV)/ready: pyproject.toml requirements-cpu.txt
	@echo "Setting up $(VENV): about two minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(PACKAGES)
	touch $@

demo: $(DEMO)/run/complete
	@cat $<

$(STAMPS)/catalogue.csv: | venv
	@echo "Simulating 4,000 galaxies: about a minute"
	$(BIN)/python tools/simulate_galaxies.py --output $(STAMPS) --count 4000 --side 96

ifeq ($(DATA),)
$(DEMO)/shards/manifest.json: $(STAMPS)/catalogue.csv
	$(BIN)/python tools/make_shards.py --images $(STAMPS) --catalogue $(STAMPS)/catalogue.csv \
	    --output $(DEMO)/shards --val-fraction 0.05 --test-fraction 0.05
else
$(DEMO)/shards/manifest.json: | venv
	$(BIN)/python tools/make_shards.py --images '$(DATA)' --min-side 96 \
	    --output $(DEMO)/shards --val-fraction 0.05 --test-fraction 0.05
endif

$(DEMO)/run/complete: $(DEMO)/shards/manifest.json
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m astropt_ds.train \
	    --config demo data.path=$(DEMO)/shards run.dir=$(DEMO)/run

$(VENV)/oracle: tests/requirements-oracle.txt tests/requirements-s3.txt | venv
	$(BIN)/pip install --quiet --no-deps -r tests/requirements-oracle.txt
	$(BIN)/pip install --quiet -r tests/requirements-s3.txt
	touch $@

test: venv $(VENV)/oracle
	$(BIN)/python -m pytest tests

# Real stamps beside the synthetic ones: make bench STAMPS_512=FOLDER
STAMPS_512 ?=

bench: venv $(VENV)/oracle
	OMP_NUM_THREADS=1 $(BIN)/python tools/benchmark.py all --against astropt --json bench.json \
	    $(if $(STAMPS_512),--images '$(STAMPS_512)')
	OMP_NUM_THREADS=1 $(BIN)/python tools/benchmark.py table --json bench-table.json

lint: venv
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf demo build *.egg-info .pytest_cache .ruff_cache .mypy_cache
