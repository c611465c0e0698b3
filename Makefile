# Everything a person needs, by name. `make` alone lists it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Ray would otherwise write a token into the home folder
export RAY_AUTH_MODE ?= token

.DEFAULT_GOAL := help

help: ## Show what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("nst needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); PyTorch is large, this takes minutes the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.installed ## Create the environment in .venv

demo: install ## The whole chain on real images, on this machine (about 3 minutes)
	$(BIN)/nst demo

test: install ## All tests (real Ray, S3 and MLflow servers)
	$(BIN)/python -m pytest -m "not faults" --durations=12

test-faults: install ## Series of failures, and what compiles for long (about an hour)
	$(BIN)/python -m pytest -m faults --durations=12

fault-matrix: install ## One training for each fault; writes the table of outcomes into the README
	$(BIN)/python -m tests.fault_table

test-fast: install ## Only the tests that take seconds
	$(BIN)/python -m pytest -m "not slow and not faults and not gpu"

bench-speed: install ## Speed beside pix2pix, CycleGAN, MicroAST and AdaIN (an hour, on a quiet machine)
	$(BIN)/python -m benchmarks.training_speed --rounds 5
	$(BIN)/python -m benchmarks.inference_speed --rounds 7

bench-corpora: install ## Sharding, loading and planning beside other tools, on PICTURES=folder (an hour)
	@test -n "$(PICTURES)" || { echo 'bench-corpora: give PICTURES=folder with JPEGs below it'; exit 2; }
	$(BIN)/python -m benchmarks.sharding_speed --pictures "$(PICTURES)" --rounds 5
	$(BIN)/python -m benchmarks.loading_speed --pictures "$(PICTURES)" --rounds 5
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.sampler_scale

check: install ## Formatting, lints, types, layers, YAML
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/yamllint --strict --config-file infra/deploy/yamllint.yaml ray_cluster.yaml infra/deploy

OUT ?= trial/builtin
builtin: install ## Train the model in the box on PICTURES=folder (LABELS.csv, content/, style/) with VGG=file
	@test -n "$(PICTURES)" -a -n "$(VGG)" || { echo 'builtin: give PICTURES=folder and VGG=safetensors'; exit 2; }
	$(BIN)/python -m benchmarks.split_corpus "$(PICTURES)" $(OUT)/split
	for role in content style; do \
	  $(BIN)/nst shard "$(PICTURES)/$$role" $(OUT)/$$role --role $$role --labels $(OUT)/split/$$role.csv --keep-bytes || exit; \
	done
	NST_VGG19="$(VGG)" $(BIN)/python -m nst.train --content $(OUT)/content --style $(OUT)/style \
	  --preset perceptual --out $(OUT)/training $(TRAIN)
	$(BIN)/python -m benchmarks.export_builtin $(OUT)/training/checkpoint micro

ablation: install ## What each part of the method is worth, on PICTURES=folder (about an hour)
	@test -n "$(PICTURES)" || { echo 'ablation: give PICTURES=folder, one with LABELS.csv, content/ and style/'; exit 2; }
	$(BIN)/python -m benchmarks.ablation --pictures "$(PICTURES)" $(if $(VGG),--vgg "$(VGG)")

format: install ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and what demo and tests left
	rm -rf $(VENV) .venv-s3 .nst nst-demo build *.egg-info

.PHONY: help install demo test test-fast test-faults fault-matrix bench-speed bench-corpora check builtin ablation format clean
