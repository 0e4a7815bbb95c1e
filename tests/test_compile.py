"""`torch.compile` through each entry point: results stay the same, and few graphs serve all lengths.

A backend that runs graphs unchanged is used, because Inductor takes many seconds for each: one test uses Inductor.
"""

import collections
import copy
import shutil

import pytest
import torch
import torch._inductor.config
from datasets_in_memory import RowsDataset
from tiny import VOCABULARY, random_pixels, tiny_config, tiny_model, tiny_text_config
from torch.testing import assert_close
from transformers import Mamba2ForCausalLM, Trainer, TrainingArguments

from transformers_ma2mba import enable_multi_axis_checkpointing

CELLS = {"layer_interval": 1, "sequence_interval": 32}


class Graphs:
    """A backend that counts the graphs of each frame and the targets of their calls."""

    def __init__(self):
        self.compile = torch._dynamo.lookup_backend("aot_eager")
        self.frames, self.targets = collections.Counter(), collections.Counter()

    def __call__(self, graph_module, example_inputs, **options):
        self.frames[torch._guards.CompileContext.current_compile_id().frame_id] += 1
        for module in graph_module.modules():
            if isinstance(module, torch.fx.GraphModule):
                self.targets.update(str(node.target) for node in module.graph.nodes)
        return self.compile(graph_module, example_inputs, **options)

    def scans(self):
        return sum(count for target, count in self.targets.items() if "transformers_ma2mba.ssd_scan" in target)


@pytest.fixture(autouse=True)
def no_earlier_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(length, batch_size=1, num_frames=0, padding=0):
    """Make token ids with a supervised second half, padding in the first row, and as many frames in each row."""
    generator = torch.Generator().manual_seed(length)
    input_ids = torch.randint(2, VOCABULARY - 2, (batch_size, length), generator=generator)
    inputs = {"input_ids": input_ids, "labels": input_ids.clone()}
    inputs["labels"][:, : length // 2] = -100
    if num_frames:
        input_ids[:, 1 : 1 + 4 * num_frames] = VOCABULARY - 1
        inputs["labels"][:, : 1 + 4 * num_frames] = -100
        inputs["pixel_values_videos"] = random_pixels(batch_size * num_frames)
    if padding:
        inputs["attention_mask"] = torch.ones_like(input_ids)
        inputs["attention_mask"][0, :padding] = 0
        inputs["labels"][0, : padding + 1] = -100
    return inputs


def step(model, inputs, parameters):
    """Run one training step; return the loss, and the gradients of the parameters that have one."""
    for parameter in parameters.values():
        parameter.grad = None
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def assert_same_step(compiled, model, inputs, tolerance=2e-5):
    """Compare gradients with a tolerance relative to the largest value of each."""
    parameters = dict(model.named_parameters())
    loss, gradients = step(compiled, inputs, parameters)
    expected_loss, expected = step(model, inputs, parameters)
    assert_close(loss, expected_loss, rtol=tolerance, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        # The bias of attention's keys has no effect: its gradient consists of rounding errors around 1e-9.
        limit = tolerance * gradient.abs().max().item() + 1e-7
        assert_close(gradients[name], gradient, rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}")


def video_model():
    """Make a model as small as possible, because compilation time grows with the number of operations."""
    return tiny_model(tiny_config(text={"num_hidden_layers": 1}, vision={"num_hidden_layers": 2})).train()


def checkpointed_video_model():
    model = tiny_model(tiny_config(vision={"num_hidden_layers": 2})).train()
    model.gradient_checkpointing_enable(CELLS)
    return model


def checkpointed_stock_model():
    torch.manual_seed(0)
    return enable_multi_axis_checkpointing(Mamba2ForCausalLM(tiny_text_config()), **CELLS).train()


# Inference


def test_one_graph_serves_all_lengths(model):
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        # The lengths are below, at and above tiles of 64 tokens and spans of 512.
        for length in (12, 77, 300, 64, 512, 513, 1100):
            input_ids = batch(length)["input_ids"]
            assert_close(compiled(input_ids=input_ids).logits, model(input_ids=input_ids).logits)
    assert list(graphs.frames.values()) == [2]  # the first length, and all others
    assert graphs.scans() == 2 * model.config.text_config.num_hidden_layers


def test_generation(model):
    graphs, model = Graphs(), copy.deepcopy(model)
    prompts = [batch(9, 2, num_frames=1), batch(13, 2, padding=4), batch(15, 2, padding=2)]
    for prompt in prompts:
        del prompt["labels"]
    options = dict(max_new_tokens=5, do_sample=False)
    expected = [model.generate(**prompt, **options) for prompt in prompts]
    model.forward = torch.compile(model.forward, backend=graphs)
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert torch.equal(model.generate(**prompt, **options), tokens)
    assert graphs.scans() > 0 and max(graphs.frames.values()) <= 4  # video, padding, other lengths, one token


# Training


LENGTHS = [batch(12), batch(77), batch(300), batch(41, 3, padding=5)]
VIDEOS = [batch(30, num_frames=2), batch(77, 2, num_frames=10, padding=3)]


@pytest.mark.parametrize(
    "make_model, batches",
    [
        pytest.param(video_model, LENGTHS, id="text"),
        pytest.param(video_model, VIDEOS, id="video"),
        pytest.param(checkpointed_video_model, LENGTHS, id="text, MA-GC"),
        pytest.param(checkpointed_video_model, VIDEOS, id="video, MA-GC"),
        pytest.param(checkpointed_stock_model, LENGTHS, id="Mamba2ForCausalLM, MA-GC"),
    ],
)
def test_training_step(make_model, batches):
    model, graphs = make_model(), Graphs()
    compiled = torch.compile(model, backend=graphs)
    for inputs in batches:
        assert_same_step(compiled, model, inputs)
    assert max(graphs.frames.values()) <= 3  # the first, other lengths, a batch with padding
    # MA-GC's cells and the loss in pieces run outside graphs, and the vision encoder inside.
    checkpointed = make_model is not video_model
    assert (graphs.scans() == 0) == checkpointed
    assert any("linear" in target for target in graphs.targets) == (not checkpointed or batches is VIDEOS)
    if batches is VIDEOS:
        attentions = sum(count for target, count in graphs.targets.items() if "dot_product_attention" in target)
        assert attentions == 2 * 2  # layers times sizes of pieces: two frames, and three for longer videos
        assert any("checkpoint" in target for target in graphs.targets) == checkpointed


def test_float64():
    model = video_model().double()
    assert_same_step(torch.compile(model, backend="aot_eager"), model, batch(77))


def test_autocast():
    model = video_model()
    with torch.autocast("cpu", torch.bfloat16):
        # Another order of the same operations may round differently to bfloat16.
        assert_same_step(torch.compile(model, backend="aot_eager"), model, batch(77), tolerance=5e-3)


def test_copy_that_was_never_called():
    """Its graph has `ssd_scan`, too."""
    model, graphs = copy.deepcopy(video_model()), Graphs()
    with torch.no_grad():
        torch.compile(model, backend=graphs)(input_ids=torch.arange(12).view(1, 12))
    assert graphs.scans() == model.config.text_config.num_hidden_layers


@pytest.mark.parametrize(
    "backend, checkpointed, num_frames",
    [
        pytest.param("aot_eager", False, 3, id="video"),
        pytest.param("aot_eager", True, 3, id="video, MA-GC"),
        pytest.param(
            "inductor",
            False,
            0,
            marks=pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler, such as g++"),
            id="text, Inductor",
        ),
    ],
)
# Compile in this process, because each worker process would import PyTorch first.
@torch._inductor.config.patch(compile_threads=1)
def test_trainer(tmp_path, backend, checkpointed, num_frames):
    trained = {}
    for compiled in (False, True):
        model = video_model()
        arguments = TrainingArguments(
            output_dir=tmp_path,
            max_steps=2,
            per_device_train_batch_size=1,
            learning_rate=0.05,
            optim="sgd",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            activation_checkpointing=checkpointed,
            activation_checkpointing_kwargs=CELLS if checkpointed else None,
            **({"torch_compile": True, "torch_compile_backend": backend} if compiled else {}),
        )
        inputs = batch(77, num_frames=num_frames)
        rows = RowsDataset([inputs, inputs])
        Trainer(model, arguments, train_dataset=rows, data_collator=rows.collate).train()
        trained[compiled] = model.state_dict()
    untrained = video_model().state_dict()
    assert not torch.equal(untrained["lm_head.weight"], trained[True]["lm_head.weight"])
    for name, weight in trained[False].items():
        assert_close(trained[True][name], weight, rtol=0, atol=1e-5)
