# make demo: install into .venv and show what a mix is. make test: the suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test portable oracle lint reference nano

demo: $(VENV)/.runtime
	$(BIN)/trimix demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

# A llama-cpp-python wheel in dist/ that runs on every processor of this kind.
portable:
	$(PYTHON) trimix_gguf/machine/build.py wheel dist --portable

# The oracle tests need torch (about 1 GB of disk), transformers and lm-eval.
oracle: $(VENV)/.oracle
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/test_convert_oracle.py \
	  tests/test_convert_lora.py tests/test_convert_ids.py tests/test_imatrix_oracle.py \
	  tests/test_harness.py tests/test_harness_chat.py tests/test_harness_requests.py \
	  tests/test_lm_eval_command.py -rs

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
	[ $(OUT) != trimix_gguf/nano ] || TRIMIX_SELF_TEST=0 $(BIN)/python convert/nano/ship.py

TRAIN = $(BIN)/python convert/nano/train.py --data $(DATA) --work $(WORK) --scale $(SCALE)
$(WORK)/tokenizer.json: | $(VENV)/.train
	$(TRAIN) tokenizer
$(WORK)/small_base/model.safetensors $(WORK)/large_base/model.safetensors: $(WORK)/tokenizer.json
$(WORK)/small_cpt/model.safetensors: $(WORK)/small_base/model.safetensors
$(WORK)/large_ins/model.safetensors: $(WORK)/large_base/model.safetensors
$(WORK)/%/model.safetensors:
	$(TRAIN) $*

# build.py knows llama.cpp's flags; doctor sees that what was built runs here.
$(VENV)/.runtime: pyproject.toml
	@$(PYTHON) trimix_gguf/machine/build.py check
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python trimix_gguf/machine/build.py install
	$(BIN)/pip install -q -e .
	@$(BIN)/trimix doctor --mend >/dev/null
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
