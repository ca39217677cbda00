# Two commands do all the set-up on a fresh machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
# several processes share the cores: one thread each, and no GPU start-up where there is none
export OMP_NUM_THREADS ?= 1
export DS_ACCELERATOR ?= $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help demo test cluster-test test-all faults fuzz lint bench image image-check manifests lock clean

help:
	@echo "make demo    the whole pipeline on synthetic faces, with its own S3 server and Ray (about 6 minutes on 2 cores)"
	@echo "make test    every test that needs neither a GPU nor much time"
	@echo "make faults  the fault suite at full length: workers, nodes, drivers and servers killed, secrets searched (about 35 minutes on 2 cores)"
	@echo "make cluster-test  many real Ray nodes on this machine: lost, drained, added, slow, cut off; jobs over HTTP, stopped, their head killed"
	@echo "make fuzz    100,000 broken files through every reader (FUZZ='--cases N --seed S' for others)"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make bench   the benchmarks, side by side with their peers, into benchmarks/out"
	@echo "make image   the container image (IMAGE=name:tag BASE=image ENGINE=docker)"
	@echo "make image-check  the image's build steps in a clean environment, without a container engine: 8 GB of downloads"
	@echo "make manifests  what is rendered of infra/kubernetes, and the quick start in docs/cluster.md"
	@echo "make lock    resolve the dependencies again into constraints.txt"

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing the locked dependencies into $(VENV): 8 GB with the CUDA libraries, 2 to 5 minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes -r constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)
	$(BIN)/facemae demo

# two processes, a file in one: most tests wait for a server or for Ray. Those of `make faults` measure time and run alone
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not scale and not nodes"

# beside the fault suite, the files that have cases too long for `make test`
LONG = tests/cluster/test_index_build.py tests/cluster/test_index_large.py tests/cluster/test_leakage.py tests/cluster/test_pretrain.py \
    tests/cluster/test_protect.py tests/cluster/test_train.py \
    tests/facemae/test_verification.py \
    tests/facemae/recognizer/test_export_onnx.py tests/jobs/test_compare.py tests/jobs/test_leakage_job.py \
    tests/jobs/test_rekey.py tests/jobs/test_repair.py tests/jobs/test_secrets.py
faults: $(READY)
	$(BIN)/python -m pytest -m "not scale" tests/faults tests/infra $(LONG) --kills 24 --faults-report faults.json

cluster-test: $(READY)
	$(BIN)/python -m pytest tests/nodes tests/infra/test_monitoring.py tests/cluster/kubernetes/test_start.py -m nodes -v

test-all: $(READY)
	$(BIN)/python -m pytest

FUZZ ?= --cases 100000 --seed 0
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz $(FUZZ)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python -m benchmarks

manifests: $(READY)
	$(BIN)/python -m infra.kubernetes.render

lock: $(READY)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --extra dev \
	    pyproject.toml -o constraints.txt
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --constraint constraints.txt \
	    pyproject.toml -o infra/image/requirements.txt

IMAGE ?= facemae:0.1.0
ENGINE ?= docker
image:
	$(ENGINE) build -f infra/image/Dockerfile $(if $(BASE),--build-arg BASE=$(BASE)) --build-arg REVISION=$$(git rev-parse HEAD) -t $(IMAGE) .

# FACEMAE_IMAGE_PYTHON=/path/to/python3.12 tries the image's own version
image-check: $(READY)
	$(BIN)/python -m pytest tests/infra/test_image_build.py -s

clean:
	rm -rf $(VENV) build *.egg-info facemae-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
