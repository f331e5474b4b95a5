# `make help` lists the targets; `make` alone is `make run`.
# ARGS=... is passed on to run.sh, to models.get_smollm2, or to models.pretrain by the base targets.
# PYTHON=python3.12 chooses the interpreter for the virtual environment in .venv.

PYTHON ?= python3
ARGS ?=
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: run help refine test bench smollm2 base base-webshop base-neutral

run: .venv/run.done ## the closed loop on the embedded default
	./run.sh $(ARGS)

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-14s%s\n", $$1, $$2 }' Makefile

refine: .venv/run.done ## AgentRefine on its neutral base: synthesis, tuning, evaluation
	./run.sh refine

test: .venv/test.done ## the style checks, then the test suite on the CPU
	ruff check .
	ruff format --check .
	JAX_PLATFORMS=cpu python -m pytest -q -n 2 --dist loadfile -m "not slow" --durations=8

bench: .venv/test.done ## every claim against its peer, measured now (but bench.pretrained, which takes days)
	set -e; for script in $(filter-out bench/pretrained.py,$(wildcard bench/[a-z]*.py)); do echo "== $$script"; python -m bench.$$(basename $$script .py); done

smollm2: .venv/run.done ## download SmolLM2-135M-Instruct (93 MB) and make a base of it
	python -m models.get_smollm2 $(ARGS)

base: .venv/run.done ## train the tiny base model of ALFWorld again
	python -m models.pretrain $(ARGS)

base-webshop: .venv/run.done ## train the tiny base model of WebShop again
	python -m models.pretrain --env webshop --out models/tiny-webshop --vocabulary 6144 \
	  --width 192 --heads 4 2 64 --rope-theta 1e8 --generated 3000 --generated-share 0.5 --world-weight 0.1 --careless 0.45 --tokens 20000000 $(ARGS)

base-neutral: .venv/run.done ## train the tiny base model of AgentRefine again
	python -m models.pretrain --env neutral --out models/tiny-neutral --vocabulary 2048 \
	  --heads 4 2 64 --rope-theta 1e8 --actre-share 0 --world-weight 0.1 --tokens 4000000 $(ARGS)

# A stamp file is newer than its prerequisites, so nothing is installed twice.
.venv/run.done: requirements.txt install.sh
	PYTHON=$(PYTHON) ./install.sh requirements.txt
	touch $@

.venv/test.done: requirements/test.txt .venv/run.done
	PYTHON=$(PYTHON) ./install.sh requirements/test.txt
	touch $@
