"""The optimizer's groups: who is in which, and what the stock Trainer does with them."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from short_training import rows_about, short_trainer
from tiny import tiny_config, tiny_model
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback

from transformers_ma2mba import parameter_groups


def names_of(model, groups) -> list[set[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [{names[parameter] for parameter in group["params"]} for group in groups]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_norms_biases_and_the_recurrence_do_not_decay(kind):
    model = tiny_model(tiny_config(kind))
    groups = parameter_groups(model, 0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    decaying, others = names_of(model, groups)
    assert {name.rpartition(".")[2] for name in others} == {"weight", "bias", "A_log", "D", "dt_bias"}
    assert all("norm" in name or "layrnorm" in name for name in others if name.endswith("weight"))
    assert "model.language_model.norm_f.weight" in others  # the Trainer's own rule misses this name
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    assert all(shapes[name] == 1 for name in others)
    assert {name for name in decaying if shapes[name] < 2} <= {"model.vision_tower.embeddings.class_embedding"}


def test_each_trained_parameter_is_in_one_group():
    model = tiny_model(tiny_config())
    model.model.multi_modal_projector.requires_grad_(False)
    groups = parameter_groups(model, 0.05, vision_learning_rate=4e-6)
    assert [group.get("lr") for group in groups] == [None, None, 4e-6, 4e-6]
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0, 0.05, 0.0]
    names = names_of(model, groups)
    assert all(("vision_tower" in name) == (i >= 2) for i, group in enumerate(names) for name in group)
    assert sum(map(len, names)) == len(set().union(*names))
    assert set().union(*names) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_adapters_are_in_the_group_of_their_part():
    config = LoraConfig(target_modules=["in_proj", "q_proj"], modules_to_save=["multi_modal_projector"])
    model = get_peft_model(tiny_model(tiny_config()), config)
    text, biases, vision = names_of(model, parameter_groups(model, 0.05, vision_learning_rate=4e-6))
    assert all("in_proj.lora_" in name or "projector.modules_to_save" in name for name in text)
    assert biases and all(name.endswith("bias") for name in biases)
    assert vision and all("q_proj.lora_" in name for name in vision)


def test_settings_without_effect_are_errors():
    model = tiny_model(tiny_config())
    model.model.vision_tower.requires_grad_(False)
    with pytest.raises(ValueError, match="vision_learning_rate=4e-06 has no effect: no parameter of a vision tower"):
        parameter_groups(model, vision_learning_rate=4e-6)
    with pytest.raises(ValueError, match="No parameter of the model is trained"):
        parameter_groups(model.requires_grad_(False))


class Steps(TrainerCallback):
    """Keeps each parameter's change in each step, and the change that its rate and decay make of its gradient."""

    def __init__(self, rate, vision_rate, decay):
        self.rates, self.decay, self.schedule = {False: rate, True: vision_rate}, decay, []
        self.before, self.expected = {}, {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        step = state.global_step + 1
        # One step of warm-up, then a cosine over the remaining three.
        factor = 0.0 if step == 1 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 3))
        self.schedule.append(factor)
        undecayed = ("bias", "A_log", ".D")
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                decay = 0 if name.endswith(undecayed) or "norm" in name else self.decay
                rate = factor * self.rates["vision_tower" in name]
                self.before[name] = parameter.detach().clone()
                self.expected[name] = parameter.detach() - rate * (parameter.grad + decay * parameter.detach())

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert len(self.expected) > 60
        for name, parameter in model.named_parameters():
            if name in self.expected:
                assert_close(
                    parameter.detach(), self.expected[name], rtol=3e-7, atol=1e-7, msg=lambda m, n=name: n + m
                )
                changed = not torch.equal(parameter, self.before[name])
                assert changed == (self.schedule[-1] > 0 and bool(parameter.grad.any())), name


def test_the_trainer_gives_each_part_its_rate_in_each_step(tmp_path, film):
    """The schedule multiplies both rates."""
    model, steps = tiny_model(tiny_config()).train(), Steps(0.1, 0.02, 0.3)
    options = dict(weight_decay=0.3, lr_scheduler_type="cosine", warmup_steps=1, max_grad_norm=0)
    groups = parameter_groups(model, 0.3, vision_learning_rate=0.02)
    optimizer = (torch.optim.SGD, {"lr": 0.1, "params": groups})
    rows = rows_about(film)[:3] * 2
    arguments = {"optimizer_cls_and_kwargs": optimizer, "callbacks": [steps]}
    trainer = short_trainer(tmp_path, rows, model, arguments, **options)
    trainer.train()
    assert len(steps.schedule) == 4 and isinstance(trainer, Trainer)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([0.1 * factor for factor in steps.schedule])
