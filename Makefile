# Two commands do all set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CATALOGUE ?= ../shared/data/grocery/products.parquet
RUN ?= runs/ladder-s0
TRIALS ?= 20
TEST_PROCESSES ?= 2
export RAY_ENABLE_AUTO_CONNECT := 0
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch-extensions

.PHONY: help demo demo-grocery test test-bench lint format bench bench-agcl bench-rar rar-depth record-trl ablation ladder ladder-grocery pieces ladder-sweep inference-cost serve bench-serve chaos clean

help: ## show this help
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13) and "Python 3.11 or 3.12 is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed ## two rounds on the synthetic catalogue: table, report (about 8 minutes on 2 cores)
	$(BIN)/python jobs/run_cit.py --config jobs/configs/demo.yaml

demo-grocery: $(VENV)/.installed ## the same on real photographs: make demo-grocery CATALOGUE=products.parquet
	$(BIN)/python jobs/run_cit.py --config jobs/configs/grocery.yaml catalogue.path=$(CATALOGUE)

test: $(VENV)/.installed ## the tests, except those marked slow
	$(BIN)/python -m pytest -m "not slow" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed ## ruff, mypy, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed ## BM25 timed beside rank_bm25, after an equality check
	$(BIN)/python -m jobs.benchmarks.bm25

# A separate environment: the package does not need the implementations that it is timed against.
.venv-bench/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt torch
	.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	touch $@

test-bench: .venv-bench/.installed ## the tests against stock sentence-transformers
	.venv-bench/bin/python -c 'import sentence_transformers'
	.venv-bench/bin/python -m pytest tests/models/test_sentence_transformers_export.py

bench-agcl: .venv-bench/.installed ## stage 1 timed beside sentence-transformers, faiss, bm25s (about 15 minutes)
	.venv-bench/bin/python -m jobs.benchmarks.agcl

bench-rar: .venv-bench/.installed ## stage 2 timed beside TRL, stock generation and plain loops (about 15 minutes)
	.venv-bench/bin/python -m jobs.benchmarks.rar

rar-depth: $(VENV)/.installed ## RAR with recall@1 to recall@100 as its reward, 3 seeds, two catalogues, resumable (hours on 2 cores)
	$(BIN)/python -m jobs.experiments.rar_depth --config jobs/configs/demo.yaml run.name=depth-demo
	$(BIN)/python -m jobs.experiments.rar_depth --config jobs/configs/grocery.yaml run.name=depth-grocery catalogue.path=$(CATALOGUE)

record-trl: .venv-bench/.installed ## record losses and gradients of TRL, for tests without TRL
	.venv-bench/bin/python -m jobs.benchmarks.record_trl_golden

ablation: $(VENV)/.installed ## variants of stage 1's loss on two datasets, 3 seeds, resumable (about 2 hours on 2 cores)
	$(BIN)/python -m jobs.experiments.loss_ablation --catalogue $(CATALOGUE)

ladder: $(VENV)/.installed ## the paper's table as an ablation study, 5 seeds, resumable (about 2 hours on 2 cores)
	$(BIN)/python -m jobs.experiments.ladder --config jobs/configs/ladder.yaml --seeds 0 1 2 3 4 --variants info-nce agcl \
	  distilled rl cit-2 oracle-input rl-queries rejection-sampling more-distillation

ladder-grocery: $(VENV)/.installed ## the same on real photographs, 3 seeds: make ladder-grocery CATALOGUE=products.parquet
	$(BIN)/python -m jobs.experiments.ladder --config jobs/configs/ladder-grocery.yaml --seeds 0 1 2 --variants dual-encoder \
	  dual-encoder-regions info-nce agcl distilled rl cit-2 cit-3 rl-queries oracle-input oracle -- catalogue.path=$(CATALOGUE)

pieces: $(VENV)/.installed ## the pieces of AGCL and their ceilings, in the ladder's runs, 3 seeds, resumable
	$(BIN)/python -m jobs.experiments.ladder --config jobs/configs/ladder.yaml --seeds 0 1 2 --variants info-nce printed-weights \
	  weights mask batches all-pieces true-weights true-mask true-batches all-true

ladder-sweep: $(VENV)/.installed ## the study with other settings of catalogue and batches, one seed, resumable (hours on 2 cores)
	$(BIN)/python -m jobs.experiments.ladder_sweep --config jobs/configs/ladder.yaml

inference-cost: $(VENV)/.installed ## hit@1 against ms per query, after make ladder: make inference-cost RUN=runs/ladder-s0
	$(BIN)/python -m jobs.experiments.inference_cost --run $(RUN)

serve: $(VENV)/.installed ## serve the last promoted round of the demo on this machine, page at http://127.0.0.1:8000 (after make demo)
	$(BIN)/python jobs/build_index.py --config jobs/configs/demo.yaml
	$(BIN)/serve run afmrl_ray.serving:app_builder run=runs/demo auth.anonymous_on_loopback=true

bench-serve: $(VENV)/.installed ## throughput, overload, kills and 10,000 hostile requests against a real Serve (about 40 minutes; needs wrk)
	$(BIN)/python -m jobs.benchmarks.serve

chaos: $(VENV)/.installed ## the tests marked slow or fuzz: each fault TRIALS times, 100,000 inputs for the parsers
	AFMRL_TRIALS=$(TRIALS) AFMRL_FUZZ=100000 $(BIN)/python -m pytest -m "slow or fuzz"

clean: ## remove the environment, caches and runs
	rm -rf $(VENV) .venv-bench runs .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache *.egg-info
