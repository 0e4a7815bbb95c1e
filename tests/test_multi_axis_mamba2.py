"""A checkpointed `Mamba2ForCausalLM`: the stock loss and gradients, and never the whole logits."""

import copy
import warnings

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from comparison import assert_same
from datasets_in_memory import RowsDataset
from double_precision import compute_in_double
from peft import LoraConfig, get_peft_model
from tiny import tiny_text_config
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Mamba2ForCausalLM, Trainer, TrainingArguments
from transformers.models.mamba2.modeling_mamba2 import Mamba2Block

from transformers_ma2mba import enable_multi_axis_checkpointing, loss_in_pieces
from transformers_ma2mba.multi_axis_checkpointing import disable_multi_axis_checkpointing
from transformers_ma2mba.recurrent_state import LayerState, write_state


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


def test_a_head_that_peft_trains_whole():
    inputs, results = batch(), []
    for enabled in (False, True):
        torch.manual_seed(1)
        config = LoraConfig(r=3, target_modules=["in_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = get_peft_model(causal_lm(tie_word_embeddings=False), config).double()
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


def centre(module, args, outputs):
    outputs.last_hidden_state = outputs.last_hidden_state - outputs.last_hidden_state.mean(1, keepdim=True)
    return outputs


def test_hooks_of_the_trunk_see_all_rows():
    results = []
    for enabled in (False, True):
        model = causal_lm()
        model.backbone.register_forward_hook(centre)
        if enabled:
            enable_multi_axis_checkpointing(model, 2, 4)
        results.append(step(model, **batch()))
    assert_same(*reversed(results))


class Mixing(torch.nn.Linear):
    """A head that does not treat each row by itself."""

    def forward(self, rows):
        return super().forward(rows - rows.mean(-2, keepdim=True))


def test_a_head_that_accelerate_moves_rows_to():
    plain = causal_lm(tie_word_embeddings=False)
    model = enable_multi_axis_checkpointing(copy.deepcopy(plain), 2, 4)
    add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu"))
    assert model(**batch()).logits is None
    assert_same(step(model, **batch()), step(plain, **batch()))


def test_a_head_of_another_class_gets_all_rows():
    results = []
    for enabled in (False, True):
        model = causal_lm(tie_word_embeddings=False)
        head = Mixing(32, 384, bias=False).double()
        head.weight = model.lm_head.weight
        model.lm_head = head
        if enabled:
            enable_multi_axis_checkpointing(model, 2, 4)
        results.append(step(model, **batch()))
    assert_same(*reversed(results))


@pytest.mark.parametrize("kind", ["module", "global"])
def test_hooks_of_the_embeddings_see_them_whole(kind):
    """A hook of the backward pass, and one that scales what every embedding gives."""
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


def test_a_mask_of_more_than_padding():
    plain, inputs = causal_lm(), batch()
    inputs["attention_mask"] = torch.ones(2, 23, dtype=torch.float64)
    inputs["attention_mask"][0, 5:9] = 0.5
    model = enable_multi_axis_checkpointing(copy.deepcopy(plain), 2, 4)
    assert_same(step(model, **inputs), step(plain, **inputs))


def test_what_sees_the_whole_sequence_is_refused():
    model = causal_lm()
    config = LoraConfig(r=3, target_modules=["in_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = enable_multi_axis_checkpointing(get_peft_model(model, config))
    with pytest.raises(ValueError, match="activated LoRA adapter, which counts positions"):
        model(**batch())


def test_layers_that_others_checkpoint_are_refused():
    model = causal_lm()
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Mamba2Block))
    enable_multi_axis_checkpointing(model, 2, 4)
    with pytest.raises(ValueError, match=r"layers\.0 is in PyTorch's checkpoint wrapper"):
        model(**batch())


def test_forward_mode_is_refused():
    model = enable_multi_axis_checkpointing(causal_lm().requires_grad_(False).backbone)
    rows = torch.randn(1, 9, 32, dtype=torch.float64)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        model(inputs_embeds=forward_ad.make_dual(rows, torch.ones_like(rows)))


def test_a_cache_of_some_layers_is_refused():
    model = causal_lm().backbone
    with torch.no_grad():
        cache = model(torch.arange(9)[None], use_cache=True).cache_params
    write_state(cache.layers[1], LayerState())
    with pytest.raises(ValueError, match="states of some layers and not of others"):
        enable_multi_axis_checkpointing(model)(torch.arange(9)[None], cache_params=cache)


def test_nothing_is_left_on_the_layers():
    model = enable_multi_axis_checkpointing(causal_lm(), 2, 4)
    step(model, **batch())
    assert not any("gradient_checkpointing" in vars(layer) for layer in model.backbone.layers)
