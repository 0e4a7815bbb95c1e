"""The optimizer's groups of parameters: the vision tower's own learning rate, and parameters without decay."""

from torch import nn

# Mamba-2's own parameters without decay; the original implementation marks them `_no_weight_decay`.
_RECURRENCE = ("A_log", "D", "dt_bias")


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.0, vision_learning_rate: float | None = None
) -> list[dict]:
    """Sort a model's trained parameters into groups for an optimizer.

    The stock Trainer takes them as they are, in one process and in several (DDP, ZeRO, FSDP2):

        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        groups = parameter_groups(model, args.weight_decay, vision_learning_rate=4e-6)
        Trainer(model=model, args=args, optimizer_cls_and_kwargs=(optimizer, {**options, "params": groups}), ...)

    Args:
        model: freeze modules and add adapters before this call. Its parameters may be sharded by ZeRO-3.
        weight_decay: decay of weights. Norms, biases, and Mamba-2's `A_log`, `D` and `dt_bias` have none.
        vision_learning_rate: learning rate of the vision tower (paper, Table 6); None for the optimizer's own rate. A
            schedule multiplies both rates.

    Returns:
        Two to four groups, the language model's first. Each trained parameter is in one of them, frozen ones are in
        none, and no group is empty.

    Raises:
        ValueError: if nothing is trained, or `vision_learning_rate` is given and nothing of a vision tower is trained.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vision = vision_learning_rate is not None and "vision_tower" in name.split(".")
            groups.setdefault((vision, not _decays(model, name)), []).append(parameter)
    if not groups:
        raise ValueError("No parameter of the model is trained: each one has requires_grad=False.")
    if vision_learning_rate is not None and not any(vision for vision, _ in groups):
        raise ValueError(
            f"vision_learning_rate={vision_learning_rate} has no effect: no parameter of a vision tower is trained."
        )
    return [
        {
            "params": groups[key],
            "weight_decay": 0.0 if key[1] else weight_decay,
            **({"lr": vision_learning_rate} if key[0] else {}),
        }
        for key in sorted(groups)
    ]


def _decays(model: nn.Module, name: str) -> bool:
    """Whether a parameter's values decay. Its shape would not tell, because ZeRO-3 shards are flat."""
    owner, _, own_name = name.rpartition(".")
    is_norm = "norm" in type(model.get_submodule(owner)).__name__.lower()
    return not (is_norm or own_name.endswith("bias") or own_name in _RECURRENCE)
