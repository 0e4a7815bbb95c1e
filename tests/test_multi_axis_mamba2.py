"""A checkpointed `Mamba2ForCausalLM`: the stock loss and gradients, and never the whole logits."""

import copy
import warnings

import pytest
import torch
from datasets_in_memory import RowsDataset
from double_precision import compute_in_double
from peft import LoraConfig, get_peft_model
from tiny import tiny_text_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Mamba2ForCausalLM, Trainer, TrainingArguments

from transformers_ma2mba import enable_multi_axis_checkpointing, loss_in_pieces
from transformers_ma2mba.multi_axis_checkpointing import disable_multi_axis_checkpointing


@pytest.fixture(autouse=True)
def double(monkeypatch):
    compute_in_double(monkeypatch)


def causal_lm(**options) -> Mamba2ForCausalLM:
    torch.manual_seed(0)
    return Mamba2ForCausalLM(tiny_text_config(num_hidden_layers=3, **options)).double().train()


def batch(supervised="some") -> dict:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(2, 300, (2, 23), generator=generator)
    labels = input_ids.clone()
    if supervised == "some":
        labels[0, :9], labels[1, 15:] = -100, -100
    elif supervised == "none":
        labels[:] = -100
    return dict(input_ids=input_ids, labels=labels)


def step(model, **inputs) -> dict:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, tolerance=1e-10):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name] - tensor).norm() <= tolerance * tensor.norm(), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("supervised", ["all", "some"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items_in_batch": torch.tensor(11)},
        {"ignore_index": 7},
        {"attention_mask": torch.tensor([[0] * 5 + [1] * 18, [1] * 23])},
        {"output_hidden_states": True},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_loss_and_gradients_are_the_stock_ones(options, supervised, tied):
    plain = causal_lm(tie_word_embeddings=tied)
    model = enable_multi_axis_checkpointing(copy.deepcopy(plain), 2, 4)
    inputs = batch(supervised) | options
    if "ignore_index" in options:
        inputs["labels"] = inputs["labels"].clamp(min=0).masked_fill(inputs["labels"] < 0, 7)
    assert_same(step(model, **inputs), step(plain, **inputs))


def test_labels_that_are_shifted_already():
    plain = causal_lm()
    inputs = batch()
    inputs["shift_labels"] = inputs["labels"].roll(-2, 1)  # none of these would come of `labels`
    model = enable_multi_axis_checkpointing(copy.deepcopy(plain), 2, 4)
    assert_same(step(model, **inputs), step(plain, **inputs))


def test_nothing_to_learn():
    found = step(enable_multi_axis_checkpointing(causal_lm(), 2, 4), **batch("none"))
    assert found["loss"] == 0 and not any(tensor.any() for tensor in found.values())


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return results


def test_no_tensor_of_tokens_times_vocabulary(monkeypatch):
    model = enable_multi_axis_checkpointing(causal_lm(), 2, 100)
    inputs = dict(input_ids=torch.randint(2, 300, (1, 1000)))
    monkeypatch.setattr(loss_in_pieces, "_BYTES_OF_A_PIECE", 64 * 384 * 8)
    with LargestTensor() as made:
        step(model, **inputs, labels=inputs["input_ids"])
    assert made.numel < 100 * 384  # the head's weight has 384 x 32, all logits 1000 x 384
    with LargestTensor() as made:
        model(**inputs)
    assert made.numel == 1000 * 384


def test_where_there_are_logits():
    plain, inputs = causal_lm(), batch()
    model = enable_multi_axis_checkpointing(copy.deepcopy(plain), 2, 4)
    assert model(**inputs).logits is None
    assert len(model(**inputs, return_dict=False)) == 1
    for options in ({"labels": None}, {"logits_to_keep": 23}):
        torch.testing.assert_close(model(**inputs | options).logits, plain(**inputs | options).logits)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(model.eval()(**inputs).logits, plain.eval()(**inputs).logits)
    disable_multi_axis_checkpointing(model.train())
    assert torch.equal(model(**inputs).logits, plain.train()(**inputs).logits)
    assert type(model) is Mamba2ForCausalLM


def test_a_loss_of_the_users_gets_logits():
    model = enable_multi_axis_checkpointing(causal_lm(), 2, 4)
    seen = []
    model.loss_function = lambda logits, labels, **kwargs: seen.append(logits.shape) or logits.square().mean()
    step(model, **batch())
    assert seen == [(2, 23, 384)]


def test_under_peft():
    inputs, results = batch(), []
    for enabled in (False, True):
        torch.manual_seed(1)
        config = LoraConfig(r=3, target_modules=["in_proj", "lm_head"], init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks a stock model by a name that is about to go
            model = get_peft_model(causal_lm(), config).double()
        if enabled:
            enable_multi_axis_checkpointing(model, 2, 4)
            assert model(**inputs).logits is None
        results.append(step(model, **inputs))
    assert_same(*reversed(results))


def test_in_trainer(tmp_path):
    rows = RowsDataset([batch(), batch("all")])
    weights = []
    for enabled in (False, True):
        model = causal_lm()
        if enabled:
            enable_multi_axis_checkpointing(model, 2, 4)
        arguments = TrainingArguments(
            output_dir=tmp_path,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            max_steps=3,
            learning_rate=1e-3,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=rows.collate)
        trainer.train()
        weights.append(
            {name: p.detach() for name, p in model.named_parameters()}
            | {"evaluation": torch.tensor(trainer.evaluate()["eval_loss"])}
        )
    assert_same(*reversed(weights), tolerance=1e-7)
