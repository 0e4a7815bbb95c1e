"""Options of examples/train.py that train LoRA adapters, on a base model in full precision or in 4 bits."""

import os
import re
from dataclasses import dataclass, field

import torch
from transformers import BitsAndBytesConfig


@dataclass(kw_only=True)
class AdapterArguments:
    """Options for adapters."""

    lora: bool = field(default=False, metadata={"help": "Train LoRA adapters in place of the model's own weights."})
    lora_rank: int = field(default=16, metadata={"help": "The rank of the adapters."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "The factor of the adapters, times the rank (default: twice the rank)."}
    )
    lora_targets: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of layers with adapters, such as `in_proj out_proj` (default: all linear layers)."},
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Load the weights under the adapters in 4 bits (QLoRA), with bitsandbytes."}
    )


def loading_options(args: AdapterArguments, device: torch.device) -> dict:
    """Return the options of `from_pretrained`.

    Raises:
        ValueError: if weights in 4 bits would have to be trained.
    """
    if not args.load_in_4bit:
        return {}
    if not args.lora:
        raise ValueError("Weights in 4 bits cannot be trained: add --lora to --load_in_4bit.")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantization, "device_map": {"": str(device)}}


def add_adapters(model, args: AdapterArguments, frozen: list[str]):
    """Add the adapters that the options ask for.

    Modules named in `frozen` get none, and neither do layers whose output nothing uses.

    Returns:
        A `PeftModel`, or the model itself without `--lora`.

    Raises:
        ValueError: if the model has adapters already.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"{model.name_or_path} has adapters already: merge them into a checkpoint with `merge_and_unload`, and "
            f"start from that."
        )
    if not args.lora:
        return model
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training  # training needs PEFT only here

    if os.path.isdir(model.name_or_path):  # the adapters' folder names the checkpoint that they belong to
        model.name_or_path = os.path.abspath(model.name_or_path)
    if args.load_in_4bit:  # checkpointing is up to the Trainer
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    excluded = [*map(re.escape, model.unused_modules()), *(rf"(.*\.)?{re.escape(name)}(\..*)?" for name in frozen)]
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha,
        target_modules="all-linear" if args.lora_targets == ["all-linear"] else args.lora_targets,
        exclude_modules="|".join(excluded) or None,
    )
    return get_peft_model(model, config)
