"""A checkpointed `Mamba2ForCausalLM`: the stock loss and gradients, without the logits of all positions at once."""

import copy
from functools import partial

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from comparison import LargestTensor, assert_same
from datasets_in_memory import RowsDataset
from tiny import WIDTH, lora, random_embeddings, tiny_mamba2
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.modules.module import register_module_forward_hook
from transformers import Mamba2ForCausalLM, Trainer, TrainingArguments
from transformers.models.mamba2.modeling_mamba2 import Mamba2Block

from transformers_ma2mba import enable_multi_axis_checkpointing
from transformers_ma2mba.gradient_checkpointing import loss_in_pieces
from transformers_ma2mba.gradient_checkpointing.multi_axis import disable_multi_axis_checkpointing
from transformers_ma2mba.mamba2.recurrent_state import LayerState, write_state

pytestmark = pytest.mark.usefixtures("in_double")
causal_lm = partial(tiny_mamba2, Mamba2ForCausalLM, num_hidden_layers=3)


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


def checkpointed(model):
    """A copy of the model with MA-GC in several cells."""
    return enable_multi_axis_checkpointing(copy.deepcopy(model), 2, 4)


def assert_stock_step(plain, **inputs):
    """Assert that checkpointing does not change loss and gradients."""
    assert_same(step(checkpointed(plain), **inputs), step(plain, **inputs))


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
def test_loss_and_gradients_equal_the_stock_ones(options, supervised, tied):
    inputs = batch(supervised) | options
    if "ignore_index" in options:
        inputs["labels"] = inputs["labels"].clamp(min=0).masked_fill(inputs["labels"] < 0, 7)
    assert_stock_step(causal_lm(tie_word_embeddings=tied), **inputs)


def test_shift_labels_replace_labels():
    inputs = batch()
    inputs["shift_labels"] = inputs["labels"].roll(-2, 1)  # by 2, while the model shifts `labels` by 1
    assert_stock_step(causal_lm(), **inputs)


def test_batch_without_supervised_tokens_has_zero_loss_and_gradients():
    found = step(checkpointed(causal_lm()), **batch("none"))
    assert found["loss"] == 0 and not any(tensor.any() for tensor in found.values())


def test_training_makes_no_tensor_of_tokens_times_vocabulary(monkeypatch):
    model = enable_multi_axis_checkpointing(causal_lm(), 2, 100)
    inputs = dict(input_ids=torch.randint(2, 300, (1, 1000)))
    monkeypatch.setattr(loss_in_pieces, "_BYTES_OF_A_PIECE", 64 * 384 * 8)
    with LargestTensor() as made:
        step(model, **inputs, labels=inputs["input_ids"])
    assert made.numel < 100 * 384  # the head's weight has 384 x 32 elements, all logits have 1000 x 384
    with LargestTensor() as made:
        model(**inputs)
    assert made.numel == 1000 * 384


def test_logits_are_computed_except_in_a_training_step():
    plain, inputs = causal_lm(), batch()
    model = checkpointed(plain)
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


def test_custom_loss_function_gets_logits():
    model = checkpointed(causal_lm())
    seen = []
    model.loss_function = lambda logits, labels, **kwargs: seen.append(logits.shape) or logits.square().mean()
    step(model, **batch())
    assert seen == [(2, 23, 384)]


@pytest.mark.parametrize(
    "tied, options",
    [(True, {"target_modules": ["in_proj", "lm_head"]}), (False, {"modules_to_save": ["lm_head"]})],
    ids=["adapter of the head", "trained head"],
)
def test_peft_model_gives_the_stock_step(tied, options):
    model = lora(causal_lm(tie_word_embeddings=tied), **options)
    assert checkpointed(model)(**batch()).logits is None
    assert_stock_step(model, **batch())


def test_trainer_gives_the_stock_weights(tmp_path):
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


def centre(module, args, outputs):
    """A hook that subtracts the mean over all positions."""
    outputs.last_hidden_state = outputs.last_hidden_state - outputs.last_hidden_state.mean(1, keepdim=True)
    return outputs


def test_hooks_of_the_backbone_get_all_rows():
    model = causal_lm()
    model.backbone.register_forward_hook(centre)
    assert_stock_step(model, **batch())


class Mixing(torch.nn.Linear):
    """A head whose rows depend on each other."""

    def forward(self, rows):
        return super().forward(rows - rows.mean(-2, keepdim=True))


def test_head_with_an_accelerate_hook_takes_pieces():
    plain = causal_lm(tie_word_embeddings=False)
    model = checkpointed(plain)
    add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu"))
    assert model(**batch()).logits is None
    assert_same(step(model, **batch()), step(plain, **batch()))


def test_head_of_another_class_gets_all_rows():
    model = causal_lm(tie_word_embeddings=False)
    head = Mixing(WIDTH, 384, bias=False).double()
    head.weight = model.lm_head.weight
    model.lm_head = head
    assert_stock_step(model, **batch())


@pytest.mark.parametrize("kind", ["module", "global"])
def test_hooks_on_embeddings_get_the_whole_sequence(kind):
    """The module's hook scales the gradient of its output; the global hook scales its output."""
    results = []
    for enabled in (False, True):
        model = causal_lm()
        if enabled:
            enable_multi_axis_checkpointing(model, 2, 4)
        embeddings = model.backbone.embeddings
        if kind == "module":
            handle = embeddings.register_full_backward_pre_hook(lambda module, grads: (3 * grads[0],))
        else:
            handle = register_module_forward_hook(
                lambda module, args, rows, embeddings=embeddings: 2 * rows if module is embeddings else None
            )
        try:
            results.append(step(model, **batch()))
        finally:
            handle.remove()
    assert_same(*reversed(results))


def test_fractional_masks_give_the_stock_step():
    inputs = batch()
    inputs["attention_mask"] = torch.ones(2, 23, dtype=torch.float64)
    inputs["attention_mask"][0, 5:9] = 0.5
    assert_stock_step(causal_lm(), **inputs)


def test_adapters_that_count_positions_are_refused():
    model = lora(causal_lm(), alora_invocation_tokens=[5], task_type="CAUSAL_LM", init_lora_weights=True)
    enable_multi_axis_checkpointing(model)
    with pytest.raises(ValueError, match="activated LoRA adapter, which counts positions"):
        model(**batch())


def test_layers_in_a_checkpoint_wrapper_are_refused():
    model = causal_lm()
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Mamba2Block))
    enable_multi_axis_checkpointing(model, 2, 4)
    with pytest.raises(ValueError, match=r"layers\.0 is in PyTorch's checkpoint wrapper"):
        model(**batch())


def test_forward_mode_derivatives_are_refused():
    model = enable_multi_axis_checkpointing(causal_lm().requires_grad_(False).backbone)
    rows = random_embeddings(9)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        model(inputs_embeds=forward_ad.make_dual(rows, torch.ones_like(rows)))


def test_cache_with_states_of_some_layers_is_refused():
    model = causal_lm().backbone
    with torch.no_grad():
        cache = model(torch.arange(9)[None], use_cache=True).cache_params
    write_state(cache.layers[1], LayerState())
    with pytest.raises(ValueError, match="states of some layers and not of others"):
        enable_multi_axis_checkpointing(model)(torch.arange(9)[None], cache_params=cache)


def test_step_leaves_no_attributes_on_the_layers():
    model = checkpointed(causal_lm())
    step(model, **batch())
    assert not any("gradient_checkpointing" in vars(layer) for layer in model.backbone.layers)
