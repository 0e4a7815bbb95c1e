# make demo          install, write films, train on them, print the accuracy, answer questions about one film
# make day           after `make demo`: train its model on films of up to 24 hours, and print the accuracy
# make stages        after `make demo`: the paper's three stages in small, and without stage 1.5
# make test          install, run the tests
# make test-kernels  run mamba-ssm's kernels too, in Triton's interpreter: no GPU is needed
# make quality       check style and lint; `make style` corrects them where it can

PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
STAGES ?= stages
SEED ?= 0
BIN := $(VENV)/bin

.PHONY: demo day stages test test-kernels quality style default-checkpoint

# One process with one thread for each core: models this small lose more than they gain by sharing an operation among
# threads. `--multi_gpu` is accelerate's name for several processes, on CPUs too.
LAUNCH = OMP_NUM_THREADS=1 $(BIN)/accelerate launch --multi_gpu --num_processes 2 --num_machines 1 \
	--mixed_precision no --dynamo_backend no

$(VENV)/.installed: setup.py setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

# One process for each core, each with whole files of tests, whose fixtures they share.
test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# mamba-ssm and causal-conv1d without their compiled parts. They lie outside the environment, because Transformers uses
# their kernels wherever it can import them. pip must not cache the wheels, or a later installation would use them.
$(VENV)/kernels/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet einops packaging setuptools triton wheel
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE \
		$(BIN)/python -m pip install --quiet --no-cache-dir --no-deps --no-build-isolation \
		--no-binary causal-conv1d,mamba-ssm --upgrade --target $(VENV)/kernels causal-conv1d==1.7.0 mamba-ssm==2.3.2.post1
	touch $@

test-kernels: $(VENV)/kernels/.installed
	TRITON_INTERPRET=1 MAMBA_DETERMINISTIC=1 OMP_NUM_THREADS=1 \
		PYTHONPATH=$(CURDIR)/tests/gradient_checkpointing/interpreted_kernels/stand_ins:$(abspath $(VENV))/kernels \
		$(BIN)/python -m pytest tests/gradient_checkpointing/interpreted_kernels

quality: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(VENV)/.installed
	$(BIN)/python examples/make_videos.py --output_dir $(DEMO)/data --seed $(SEED)
	$(BIN)/python examples/make_tiny_model.py --train_file $(DEMO)/data/train.json --output_dir $(DEMO)/untrained \
		--seed $(SEED)
	$(LAUNCH) examples/train.py examples/recipes/demo_clips.yaml --seed $(SEED) \
		--model_name_or_path $(DEMO)/untrained --output_dir $(DEMO)/clips \
		--train_file $(DEMO)/data/train.json --validation_file $(DEMO)/data/validation.json
	$(LAUNCH) examples/train.py examples/recipes/demo_minutes.yaml --seed $(SEED) \
		--model_name_or_path $(DEMO)/clips --output_dir $(DEMO)/minutes \
		--train_file $(DEMO)/data/train_minutes.json --keep_features $(DEMO)/features
	rm -rf $(DEMO)/day/model  # `make day` would go on with what an earlier model has learned
	$(LAUNCH) examples/train.py examples/recipes/demo_hours.yaml --seed $(SEED) \
		--model_name_or_path $(DEMO)/minutes --output_dir $(DEMO)/model \
		--train_file $(DEMO)/data/train_hours.json --keep_features $(DEMO)/features
	OMP_NUM_THREADS=1 $(BIN)/python examples/evaluate.py --model $(DEMO)/model --output_file $(DEMO)/accuracy.json \
		$(DEMO)/data/validation.json $(DEMO)/data/long.json $(DEMO)/data/hours.json
	$(BIN)/python examples/ask.py --model $(DEMO)/model $(DEMO)/data/validation/00000.mp4 \
		"Which shape appears?" "Which way does the ball move?" "Which colour is the flash?"

day: $(VENV)/.installed
	$(BIN)/python examples/make_videos.py --output_dir $(DEMO)/day --seed $(SEED) --max_hours_seconds 86400 \
		--num_train 0 --num_train_minutes 0 --num_train_hours 500 --num_validation 0 --num_long 0 --num_hours 8
	$(LAUNCH) examples/train.py examples/recipes/demo_day.yaml --seed $(SEED) \
		--model_name_or_path $(DEMO)/model --output_dir $(DEMO)/day/model --resume_from_checkpoint last \
		--train_file $(DEMO)/day/train_hours.json --keep_features $(DEMO)/day/features
	OMP_NUM_THREADS=1 $(BIN)/python examples/evaluate.py --model $(DEMO)/day/model --output_file $(DEMO)/day/accuracy.json \
		$(DEMO)/data/validation.json $(DEMO)/data/long.json $(DEMO)/data/hours.json $(DEMO)/day/hours.json

# A language model and a vision encoder that have learned from clips, in the layouts of published ones, with a new
# projector between them. Each training starts from the model of the one before.
STAGE = $(LAUNCH) examples/train.py examples/recipes/tiny_$(1).yaml --seed $(SEED) \
	--model_name_or_path $(STAGES)/$(2) --train_file $(STAGES)/data/$(3) --output_dir $(STAGES)/$(4)

stages: $(VENV)/.installed
	$(BIN)/python examples/make_stages.py --output_dir $(STAGES)/data --seed $(SEED)
	$(BIN)/transformers-ma2mba export $(DEMO)/clips --output $(STAGES)/mamba2 --layout original
	$(BIN)/transformers-ma2mba export $(DEMO)/clips --output $(STAGES)/encoder --layout vision
	$(BIN)/transformers-ma2mba build --language_model $(STAGES)/mamba2 --vision_model $(STAGES)/encoder \
		--output $(STAGES)/built
	$(call STAGE,stage1,built,stage1.json,stage1)
	$(call STAGE,stage1_5,stage1,stage1_5/segments.jsonl,stage1_5)
	$(call STAGE,stage2,stage1_5,stage2,stage2)
	$(call STAGE,stage2,stage1,stage2,without_stage1_5)
	for model in stage2 without_stage1_5; do \
		OMP_NUM_THREADS=1 $(BIN)/python examples/evaluate.py --model $(STAGES)/$$model \
			--output_file $(STAGES)/$$model.json $(STAGES)/data/validation.json $(STAGES)/data/test.json || exit 1; \
	done

# The model of `make demo` as the one that the task loads by default.
default-checkpoint:
	$(BIN)/python examples/ship_model.py --model $(DEMO)/model --accuracy $(DEMO)/accuracy.json \
		--output_dir transformers_ma2mba/default_checkpoint
