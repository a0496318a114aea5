# Each command sets up what it needs in .venv:
#   make demo   answers on pictures, then a small fine-tune
#   make test   lint, documentation, all tests on all backends, notebooks
#   make docs   the documentation site, into build/site
#   make dist   source distribution and wheel, into dist, checked
PYTHON ?= python3
RUN := .venv/bin/python
INSTALL := $(RUN) tools/install.py
# What a process compiled must reach the next one: containers often forbid it, and
# each of the many processes of the tests would take 15 s more to start.
unexport PYTHONDONTWRITEBYTECODE
export TF_CPP_MIN_LOG_LEVEL ?= 3
# The TPU's compiler is installed for plans; nothing looks for a TPU.
test: export JAX_PLATFORMS ?= cpu

.PHONY: demo test docs dist backends notebooks lint

demo: .venv/for-demo
	$(RUN) -m keras_paligemma.demo

test: lint docs dist backends notebooks

lint: .venv/for-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(RUN) -m pyright --pythonpath $(RUN)

docs: .venv/for-docs
	$(RUN) tools/docs/build.py

dist: .venv/for-test
	rm -rf dist
	$(RUN) -m hatchling build
	$(RUN) -m twine check --strict dist/*

# The first run covers everything but the servers and graphs that TensorFlow
# alone writes; the others what a backend can change. Tests are many small models,
# so two processes of one thread each are fastest, and most of their time is
# compiling: without LLVM's optimizations it is half as long, without XLA's newer
# emitters of fusions and what it does for many threads another third less, and
# what one process compiled the others read from a cache, as the next run does.
# Each process takes neighbouring tests, which share fixtures and compiled
# functions. Demo and benchmarks run with the optimizations.
backends notebooks: export XLA_FLAGS ?= --xla_backend_optimization_level=0 \
	--xla_llvm_disable_expensive_passes=true \
	--xla_cpu_use_fusion_emitters=false \
	--xla_cpu_parallel_codegen_split_count=1 \
	--xla_cpu_enable_concurrency_optimized_scheduler=false
backends notebooks: export JAX_COMPILATION_CACHE_DIR ?= \
	$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/keras_paligemma/compiled
backends notebooks: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
backends notebooks: export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal
BY_BACKEND := tests/layers tests/generation tests/models tests/quantization \
	tests/tuning \
	tests/preprocessing/test_inputs.py \
	tests/preprocessing/test_preprocessor.py \
	tests/checkpoints/test_formats.py tests/data/test_fit.py \
	tests/data/test_batches.py tests/test_turns.py
SERVED := tests/export/test_browser.py tests/export/test_checkpoint.py \
	tests/export/test_dtypes.py tests/export/test_pictures.py \
	tests/export/test_server.py

backends: .venv/for-test
	KERAS_BACKEND=jax $(PYTEST) $(SERVED:%=--ignore=%)
	KERAS_BACKEND=torch $(PYTEST) $(BY_BACKEND) -m "not any_backend"
	KERAS_BACKEND=tensorflow $(PYTEST) $(BY_BACKEND) $(SERVED) \
		tests/training/test_checkpoint.py -m "not any_backend"
	KERAS_BACKEND=tensorflow TF_ENABLE_ONEDNN_OPTS=0 $(PYTEST) -n 0 \
		tests/tuning/test_losses.py -k gradients

notebooks: .venv/for-test
	KERAS_BACKEND=jax $(RUN) -m pytest -n 2 --nbmake -W default notebooks

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/for-demo: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) jax
	touch $@

# Names and docstrings are read, not imported: no backend is needed.
.venv/for-docs: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) docs
	touch $@

EXTRAS := jax,torch,export,targets,train,data,plan,eval,metrics,hf,serve,ray,regex
.venv/for-test: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) $(EXTRAS),notebooks,dev
	touch $@
