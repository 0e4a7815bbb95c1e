"""The memory of steps, compared with their plans.

A plan states how much memory must be free when a step begins. The tests measure the peak of forward, loss and backward
in bytes of CPU tensors, beyond the model and, where gradients are accumulated over several steps, the gradients. The
peak must be 0.85 to 1.05 times the plan's `device_bytes` plus the gradients of all trained parameters that do not
exist yet.

In a step that starts without gradients, layer-major may reach its peak when backward has passed only the highest group
of layers. The plan counts the other gradients too, because they exist in other steps. The lower bound leaves them out.
"""

import random
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from live_memory import peak_bytes
from peft import LoraConfig, inject_adapter_in_model
from tiny import tiny_text_config
from torch import nn
from transformers import Mamba2Model

from transformers_ma2mba import enable_multi_axis_checkpointing
from transformers_ma2mba.gradient_checkpointing.memory_model import TrainingStep, trained_sizes
from transformers_ma2mba.gradient_checkpointing.plan import MultiAxisOptions, plan_step

MiB = 2**20
TRAINED = ("everything", "layers", "adapters", "nothing")  # with nothing trained, only the input has a gradient


class Case(NamedTuple):
    """A model, its trained parts, a training step and the options of its plan."""

    shape: dict
    trained: str
    step: TrainingStep
    options: MultiAxisOptions


def model_of(case: Case) -> Mamba2Model:
    torch.manual_seed(0)
    model = Mamba2Model(tiny_text_config(**case.shape)).to(case.step.dtype).train()
    model.embeddings.requires_grad_(case.trained == "everything")
    if case.trained in ("adapters", "nothing"):
        model.requires_grad_(False)
    if case.trained == "adapters":
        inject_adapter_in_model(LoraConfig(r=4, target_modules=["in_proj", "out_proj"]), model.layers)
    return enable_multi_axis_checkpointing(model)


def check_plan(case: Case):
    """Compare the measured peak with the plan, as the top of this file explains."""
    model, step = model_of(case), case.step
    step = replace(step, trained=trained_sizes(model.layers, model.embeddings))
    plan = plan_step(model.config, step, case.options)
    model._multi_axis_checkpointing.plan = lambda *args, **kwargs: plan
    if step.accumulating:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    ids = torch.randint(0, model.config.vocab_size, (step.batch_size, step.sequence_length))
    wanted = torch.zeros(ids.shape, dtype=torch.bool)
    wanted[:, -8:] = True

    def run():
        inputs = {"input_ids": ids}
        if not step.from_ids:
            rows = torch.randn(*ids.shape, model.config.hidden_size, dtype=step.dtype)
            inputs = {"inputs_embeds": rows.requires_grad_()}
            del rows
        if step.whole_output:
            rows = model(**inputs).last_hidden_state[:, -8:]
        else:
            rows = model(**inputs, positions_to_keep=wanted).last_hidden_state
        loss = rows.float().square().mean()
        del rows
        loss.backward()

    measured = peak_bytes(run)
    expected, to_come = plan.device_bytes, 0
    if not step.accumulating:
        gradients = trained_bytes(model)
        expected += gradients
        if plan.order == "layer-major" and plan.num_layer_groups > 1:
            highest = plan.layer_interval * (plan.num_layer_groups - 1)
            to_come = gradients - trained_bytes(model.layers[highest:]) - trained_bytes(model.norm_f)
    assert 0.85 * expected - to_come <= measured <= 1.05 * expected, f"{measured / expected:.3f} of {case}"


def trained_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)


def drawn(seed: int) -> Case:
    """Draw a case whose plan expects more than 64 MiB, and whose step takes about a second."""
    draw = random.Random(seed)
    while True:
        width, head_dim = draw.choice([64, 96, 128, 192, 256]), draw.choice([16, 32, 64])
        num_heads, remainder = divmod(2 * width, head_dim)
        num_layers = draw.randint(2, 8)
        trained = draw.choice(TRAINED)
        options = {"order": draw.choice(["layer-major", "sequence-major"])}
        if draw.random() < 0.4:
            options["layer_interval"] = draw.choice([n for n in range(1, num_layers + 1) if num_layers % n == 0])
        if draw.random() < 0.4:
            options["sequence_interval"] = draw.choice([200, 256, 400, 512, 1000])
        if draw.random() < 0.25:
            options["memory_budget"] = "minimal"  # without a budget, states are kept at every border
        case = Case(
            shape=dict(
                hidden_size=width,
                head_dim=head_dim,
                num_heads=num_heads,
                state_size=draw.choice([16, 32, 64, 128]),
                n_groups=draw.choice([1, 1, 2, 4]),
                num_hidden_layers=num_layers,
                chunk_size=draw.choice([64, 128, 256]),
                residual_in_fp32=draw.random() < 0.5,
                use_bias=draw.random() < 0.2,
                vocab_size=64 if trained == "everything" else 20_000,
            ),
            trained=trained,
            step=TrainingStep(
                dtype=draw.choice([torch.float32, torch.bfloat16]),
                from_ids=draw.random() < 0.5 and trained != "nothing",
                batch_size=draw.choice([1, 1, 2, 4]),
                sequence_length=draw.randint(500, 2500),
                whole_output=draw.random() < 0.5,
                accumulating=draw.random() < 0.5,
                device="cpu",
            ),
            options=MultiAxisOptions(**options),
        )
        if remainder or num_heads % case.shape["n_groups"]:
            continue
        plan = plan_step(tiny_text_config(**case.shape), case.step, case.options)
        tokens = case.step.batch_size * case.step.sequence_length
        work = tokens * num_layers * width * (width + 200) * (2 + plan.extra_compute)
        cells = plan.num_segments * plan.num_layer_groups
        if plan.device_bytes > 70 * MiB and work < 2.5e9 and cells <= 24:
            return case


def test_the_peak_counts_tensors_created_by_the_step():
    before = torch.zeros(10_000, dtype=torch.uint8)

    def step():
        nonlocal before
        first = torch.zeros(1000, dtype=torch.uint8)
        second = torch.zeros(5000, dtype=torch.uint8)
        del first, before
        third = torch.zeros(300, dtype=torch.uint8)
        del second
        return torch.cat([third] * 10)

    assert peak_bytes(step) == 6000


def test_the_peak_counts_tensors_kept_by_autograd():
    inputs = torch.randn(64, 100, requires_grad=True)

    def step():
        inputs.exp().exp().sum().backward()  # autograd keeps both results, and the second one's gradient is added

    # Besides the sum and its gradient, three tensors of the input's size exist at the peak.
    tensor_bytes = 64 * 100 * 4
    assert 3 * tensor_bytes <= peak_bytes(step) < 3 * tensor_bytes + 100


@pytest.mark.parametrize("seed", range(24))
def test_a_step_takes_its_plan_s_memory(seed):
    check_plan(drawn(seed))


@pytest.mark.parametrize("accumulating", [False, True], ids=["first", "accumulating"])
@pytest.mark.parametrize("order", ["layer-major", "sequence-major"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_with_a_large_trained_vocabulary(dtype, order, accumulating):
    shape = dict(hidden_size=64, num_heads=4, head_dim=32, num_hidden_layers=4, vocab_size=100_000, chunk_size=64)
    step = TrainingStep(3000, dtype=dtype, from_ids=True, accumulating=accumulating, device="cpu")
    options = MultiAxisOptions(layer_interval=2, sequence_interval=256, order=order)
    check_plan(Case(shape, "everything", step, options))
