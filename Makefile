# make demo: install into .venv and answer a Kazakh prompt. make test: the suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# llama.cpp is built with the library alone: no tools, examples, servers or image models.
LLAMA_CMAKE := -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
               -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF
LLAMA := $(shell sed -n 's/^ *"\(llama-cpp-python[^"]*\)".*/\1/p' pyproject.toml)

.PHONY: demo test oracle lint reference nano

demo: $(VENV)/.runtime
	$(BIN)/trimix generate "Қазақстан Республикасының Үкіметі" --max-tokens 60 --seed 7

test: $(VENV)/.dev
	$(BIN)/python -m pytest

# The oracle tests need torch (about 1 GB of disk) and transformers.
oracle: $(VENV)/.oracle
	$(BIN)/python -m pytest tests/test_convert_oracle.py tests/test_convert_lora.py \
	  tests/test_convert_ids.py -rs

lint: $(VENV)/.dev
	$(BIN)/ruff format --check trimix_gguf convert tests benchmarks
	$(BIN)/ruff check trimix_gguf convert tests benchmarks
	$(BIN)/mypy

# The page of commands and options, from their --help; a test holds it to that.
reference: $(VENV)/.runtime
	$(BIN)/python -m trimix_gguf.cli.reference

# Raw text -> the shipped trio; `make -j2 nano` trains the small and the large chain side by side.
# DATA holds corpus/, parallel/ and eval/. A run that was stopped goes on where it was. For a trial
# of the whole way in minutes: make nano SCALE=0.01 WORK=trial OUT=trial.
DATA ?= ../shared/data
WORK ?= nano-work
OUT ?= trimix_gguf/nano
SCALE ?= 1
nano: $(WORK)/small_cpt/model.safetensors $(WORK)/large_ins/model.safetensors
	for role in small_base small_cpt large_ins; do \
	  $(BIN)/trimix convert hf $(WORK)/$$role -o $(OUT)/$$role.gguf --force || exit 1; \
	done

TRAIN = $(BIN)/python convert/nano/train.py --data $(DATA) --work $(WORK) --scale $(SCALE)
$(WORK)/tokenizer.json: | $(VENV)/.train
	$(TRAIN) tokenizer
$(WORK)/small_base/model.safetensors $(WORK)/large_base/model.safetensors: $(WORK)/tokenizer.json
$(WORK)/small_cpt/model.safetensors: $(WORK)/small_base/model.safetensors
$(WORK)/large_ins/model.safetensors: $(WORK)/large_base/model.safetensors
$(WORK)/%/model.safetensors:
	$(TRAIN) $*

# The build of llama.cpp takes minutes, once: show its steps, and keep the log where it fails.
$(VENV)/.runtime: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "Building llama.cpp (5-10 minutes the first time; pip keeps the result)"
	@set -e; log=$(VENV)/llama-build.log; \
	( CMAKE_ARGS="$(LLAMA_CMAKE)" $(BIN)/pip install -v '$(LLAMA)' 2>&1; echo "exit $$?" ) | tee $$log \
	  | awk '/^ *\[[0-9]+\/[0-9]+\]/ { printf "\r%s %s   ", $$1, "llama.cpp"; fflush() }'; echo; \
	tail -n 1 $$log | grep -qx 'exit 0' || { tail -n 30 $$log; exit 1; }
	$(BIN)/pip install -q -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@

$(VENV)/.oracle: $(VENV)/.dev
	$(BIN)/pip install -q -e '.[oracle]'
	@touch $@

$(VENV)/.train: $(VENV)/.runtime
	$(BIN)/pip install -q -e '.[train]'
	@touch $@
