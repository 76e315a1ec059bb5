# make demo: the main job on generated images.  make test: all tests but those of half a minute or more; make test-all: these too, as CI does;
# make test-long: the few that take minutes each.  Each makes .venv first.
PY := .venv/bin/python
STAMP := .venv/.allograft-setup
ROOMS := base shards encoders engine analysis finetune pretrain cluster
JOBS ?= 2

# Without compiled modules every worker of every run compiles some 900 files again: 5 s a process.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo demo-chaos test test-all test-long lint lock format

setup: $(STAMP)

$(STAMP): requirements-dev.lock pyproject.toml
	@test -x $(PY) || python3.11 -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check uv
	@$(PY) -m uv pip sync --quiet --require-hashes --python $(PY) requirements-dev.lock
	@$(PY) -m uv pip install --quiet --no-deps --no-build-isolation --python $(PY) --editable .
	@touch $@

demo: setup
	@.venv/bin/allograft run studies/demo.yaml

demo-chaos: setup
	@$(PY) benchmarks/chaos_demo.py

test: setup
	@$(PY) -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow and not long"

test-all: setup
	@$(PY) -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not long"

test-long: setup
	@$(PY) -m pytest tests -m long

lint: setup
	@.venv/bin/ruff check $(ROOMS) tests benchmarks
	@.venv/bin/ruff format --check --quiet $(ROOMS) tests benchmarks
	@.venv/bin/mypy

format: setup
	@.venv/bin/ruff check --fix $(ROOMS) tests benchmarks
	@.venv/bin/ruff format $(ROOMS) tests benchmarks

# Both locks come from one pyproject: the second keeps every version of the first.
lock:
	@test -x $(PY) || python3.11 -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check uv
	@$(PY) -m uv pip compile --quiet --extra dev --generate-hashes --no-header --no-annotate --no-emit-index-url --python-version 3.11 pyproject.toml -o requirements-dev.lock
	@$(PY) -m uv pip compile --quiet --constraint requirements-dev.lock --generate-hashes --no-header --no-annotate --no-emit-index-url --python-version 3.11 pyproject.toml -o requirements.lock
