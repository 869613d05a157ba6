# Every target installs what it needs first. `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The address of another wheel index to take torch and torchvision from: PyTorch's CPU-only one,
# for instance, where it can be reached, saves several GB.
TORCH_INDEX ?=
# make demo: an ImageFolder instead of the generated pictures, and further options of the command.
IMAGES ?=
ARGS ?=
# make bench-gpu: cuda or cpu; make gpu-pack: CIFAR-10 as folders train/ and test/ too.
DEVICE ?= cuda
CIFAR ?=

.PHONY: setup demo test test-full check bench bench-gpu gpu-pack study docker image image-test docs package help

setup: $(INSTALLED) ## Create .venv with fastprune, ffcv and DALI (TORCH_INDEX=URL: torch from there)

$(INSTALLED): pyproject.toml constraints.txt tools/system-packages.sh
	PYTHON=$(PYTHON) tools/system-packages.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "fastprune needs Python >= 3.11, but $(PYTHON) is older. Name another: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(if $(TORCH_INDEX),$(BIN)/pip install --quiet --constraint constraints.txt \
	    --extra-index-url $(TORCH_INDEX) torch torchvision)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	@touch $@

demo: setup ## The whole way on small images (IMAGES=folder: on yours; ARGS='--epochs 8': options)
	$(BIN)/fastprune demo $(if $(IMAGES),--images '$(IMAGES)') $(ARGS)

test: setup ## Run the tests
	FASTPRUNE_REQUIRE=ffcv,dali,timm,ray,accelerate,lightning,torchdistill OMP_NUM_THREADS=1 \
	    $(BIN)/pytest -n 2 --dist worksteal $(ARGS)

test-full: setup ## Run the tests with the long fault injection and fuzzing
	FASTPRUNE_REQUIRE=ffcv,dali,timm,ray,accelerate,lightning,torchdistill OMP_NUM_THREADS=1 \
	    $(BIN)/pytest -n 2 --dist worksteal -m '' $(ARGS)

check: setup ## Format, lint, types, import floors, docs, Dockerfile, known vulnerabilities
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/hadolint Dockerfile
	$(BIN)/python tools/audit.py

bench: setup ## Run every CPU benchmark (IMAGES=folder of JPEGs, required); JSON in benchmarks/results
	@test -n '$(IMAGES)' || { echo "name a folder of JPEG files: make bench IMAGES=folder" >&2; exit 2; }
	for script in $(filter-out benchmarks/wallclock.py benchmarks/gpu.py,$(wildcard benchmarks/[!_]*.py)); do \
	    $(BIN)/python "$$script" --images '$(IMAGES)' || exit 1; done

study: setup ## Distil on all rows, halves and more, over seeds (IMAGES=folder with train/ and test/)
	@test -n '$(IMAGES)' || { echo "name a folder that holds train/ and test/: make study IMAGES=folder" >&2; exit 2; }
	$(BIN)/python benchmarks/wallclock.py --images '$(IMAGES)' $(ARGS)
	$(BIN)/python tools/measured.py
	$(BIN)/fastprune report build/wallclock-cifar10/runs -o build/wallclock-cifar10/report.html

bench-gpu: ## Run the tests and benchmarks for a GPU, in .venv or else by PYTHON (DEVICE=cpu: a small rehearsal)
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py run --device $(DEVICE) $(ARGS)

gpu-pack: setup ## Pack what bench-gpu needs on a machine without a network (IMAGES=folder of JPEGs, CIFAR=folder)
	@test -n '$(IMAGES)' || { echo "name a folder of JPEG files: make gpu-pack IMAGES=folder" >&2; exit 2; }
	$(BIN)/python benchmarks/gpu.py pack --images '$(IMAGES)' $(if $(CIFAR),--cifar '$(CIFAR)')

docker: ## Build the image fastprune:latest by Docker (BASE_IMAGE=... for another base)
	docker build $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) -t fastprune:latest .

image: ## Build the image without a Docker engine, on a minimal Debian (as root, by buildah)
	BASE_IMAGE=$(BASE_IMAGE) TORCH_INDEX=$(TORCH_INDEX) tools/image.sh build

image-test: ## Run what `make image` built: doctor, demo, read-only, as an ordinary user
	tools/image.sh test

docs: setup ## Build the pages into build/site
	$(BIN)/mkdocs build --strict

package: setup ## Build the wheel and the source distribution into dist
	$(BIN)/python -m build --no-isolation

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)
