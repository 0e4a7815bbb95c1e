"""Whether steps take what their plans expect.

A plan is to be told what must be free when a step begins. So what is compared is, in bytes of CPU tensors, the peak of
forward, loss and backward above what is there before: the model and, where gradients are accumulated over several
steps, the gradients. It is to be 0.85 to 1.05 times the plan's `device_bytes` and, where they are not there yet, the
gradients of all that is trained.

Of a step that starts without gradients, layer-major's peak may come when backward has reached only the highest group
of layers. The plan counts the other gradients, as other steps have them; so the lower bound is lower by them.
"""

import random
from typing import NamedTuple

import pytest
import torch
from live_memory import peak_bytes
from peft import LoraConfig, inject_adapter_in_model
from tiny import tiny_text_config
from torch import nn
from transformers import Mamba2Model

from transformers_ma2mba import enable_multi_axis_checkpointing, plan_checkpoints
from transformers_ma2mba.checkpoint_plan import CheckpointPlan
from transformers_ma2mba.memory_model import TrainedSizes, trained_sizes

MiB = 2**20
TRAINED = ("everything", "layers", "adapters", "nothing")  # of the language model; then its input has a gradient


class Case(NamedTuple):
    """A model, a batch and what is asked of its plan."""

    shape: dict
    dtype: torch.dtype = torch.float32
    trained: str = "everything"
    from_ids: bool = True
    batch_size: int = 1
    sequence_length: int = 2000
    whole_output: bool = False
    accumulating: bool = False
    settings: dict = {}

    def __str__(self):
        words = [f"{key}={value}" for key, value in {**self.shape, **self.settings}.items()]
        words += [str(value) for value in self[1:-1]]
        return " ".join(words)


def model_of(case: Case) -> Mamba2Model:
    torch.manual_seed(0)
    model = Mamba2Model(tiny_text_config(**case.shape)).to(case.dtype).train()
    model.embeddings.requires_grad_(case.trained == "everything")
    if case.trained in ("adapters", "nothing"):
        model.requires_grad_(False)
    if case.trained == "adapters":
        inject_adapter_in_model(LoraConfig(r=4, target_modules=["in_proj", "out_proj"]), model.layers)
    return enable_multi_axis_checkpointing(model)


def plan_of(case: Case, trained: TrainedSizes | None) -> CheckpointPlan:
    return plan_checkpoints(
        tiny_text_config(**case.shape),
        case.sequence_length,
        batch_size=case.batch_size,
        dtype=case.dtype,
        from_ids=case.from_ids,
        trained=trained,
        whole_output=case.whole_output,
        accumulating=case.accumulating,
        device="cpu",
        **case.settings,
    )


def check_plan(case: Case):
    """Compares bytes beyond the model and the gradients that are there before; see the top of this file."""
    model = model_of(case)
    plan = plan_of(case, trained_sizes(model.layers, model.embeddings))
    model._multi_axis_checkpointing.plan = lambda *args, **kwargs: plan
    if case.accumulating:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    ids = torch.randint(0, model.config.vocab_size, (case.batch_size, case.sequence_length))
    wanted = torch.zeros(ids.shape, dtype=torch.bool)
    wanted[:, -8:] = True

    def step():
        inputs = {"input_ids": ids}
        if not case.from_ids:
            rows = torch.randn(*ids.shape, model.config.hidden_size, dtype=case.dtype)
            inputs = {"inputs_embeds": rows.requires_grad_()}
            del rows
        if case.whole_output:
            rows = model(**inputs).last_hidden_state[:, -8:]
        else:
            rows = model(**inputs, positions_to_keep=wanted).last_hidden_state
        loss = rows.float().square().mean()
        del rows
        loss.backward()

    measured = peak_bytes(step)
    expected, to_come = plan.device_bytes, 0
    if not case.accumulating:
        gradients = trained_bytes(model)
        expected += gradients
        if plan.order == "layer-major" and plan.num_layer_groups > 1:
            highest = plan.layer_interval * (plan.num_layer_groups - 1)
            to_come = gradients - trained_bytes(model.layers[highest:]) - trained_bytes(model.norm_f)
    assert 0.85 * expected - to_come <= measured <= 1.05 * expected, f"{measured / expected:.3f} of {case}"


def trained_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)


def drawn(seed: int) -> Case:
    """A case whose plan expects more than 64 MiB, and whose step takes a second or so."""
    draw = random.Random(seed)
    while True:
        width, head_dim = draw.choice([64, 96, 128, 192, 256]), draw.choice([16, 32, 64])
        num_heads, remainder = divmod(2 * width, head_dim)
        num_layers = draw.randint(2, 8)
        trained = draw.choice(TRAINED)
        settings = {"order": draw.choice(["layer-major", "sequence-major"])}
        if draw.random() < 0.4:
            settings["layer_interval"] = draw.choice([n for n in range(1, num_layers + 1) if num_layers % n == 0])
        if draw.random() < 0.4:
            settings["sequence_interval"] = draw.choice([200, 256, 400, 512, 1000])
        if draw.random() < 0.25:
            settings["memory_budget"] = "minimal"  # or else states are kept at every border
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
            dtype=draw.choice([torch.float32, torch.bfloat16]),
            trained=trained,
            from_ids=draw.random() < 0.5 and trained != "nothing",
            batch_size=draw.choice([1, 1, 2, 4]),
            sequence_length=draw.randint(500, 2500),
            whole_output=draw.random() < 0.5,
            accumulating=draw.random() < 0.5,
            settings=settings,
        )
        if remainder or num_heads % case.shape["n_groups"]:
            continue
        plan = plan_of(case, None)
        tokens = case.batch_size * case.sequence_length
        work = tokens * num_layers * width * (width + 200) * (2 + plan.extra_compute)
        cells = plan.num_segments * plan.num_layer_groups
        if plan.device_bytes > 70 * MiB and work < 2.5e9 and cells <= 24:
            return case


def test_the_peak_is_that_of_tensors_made_by_the_step():
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


def test_the_peak_knows_what_autograd_keeps():
    inputs = torch.randn(64, 100, requires_grad=True)

    def step():
        inputs.exp().exp().sum().backward()  # both results are kept, and the second's gradient comes on top

    # The sum, its gradient, and two more rows: of four that are made, one is the result, and one is given up.
    rows = 64 * 100 * 4
    assert 3 * rows <= peak_bytes(step) < 3 * rows + 100


@pytest.mark.parametrize("seed", range(24))
def test_a_step_takes_what_its_plan_expects(seed):
    check_plan(drawn(seed))


@pytest.mark.parametrize("accumulating", [False, True], ids=["first", "accumulating"])
@pytest.mark.parametrize("order", ["layer-major", "sequence-major"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_vocabulary_that_is_trained(dtype, order, accumulating):
    shape = dict(hidden_size=64, num_heads=4, head_dim=32, num_hidden_layers=4, vocab_size=100_000, chunk_size=64)
    settings = {"order": order, "sequence_interval": 256, "layer_interval": 2}
    check_plan(Case(shape, dtype, sequence_length=3000, accumulating=accumulating, settings=settings))
