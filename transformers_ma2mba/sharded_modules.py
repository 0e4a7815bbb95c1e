"""Modules whose parameters are spread over processes: FSDP2's `fully_shard` and DeepSpeed's ZeRO-3.

Hooks around a module's call gather its parameters and, once its gradients are complete, scatter those. Each is a
collective operation, so all processes must make the same calls in the same order, however long their sequences are.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn

try:
    from torch.distributed.fsdp import FSDPModule
except ImportError:  # PyTorch built without torch.distributed
    FSDPModule = ()


def is_sharded(module: nn.Module) -> bool:
    """Whether calls of this very module gather parameters from other processes."""
    return isinstance(module, FSDPModule) or "ds_id" in vars(module)  # by which ZeRO-3 knows a module


def plain_forward(module: nn.Module) -> Callable:
    """What to call for a module inside `call_through_hooks`: where it is sharded, its hooks run around the whole."""
    return module.forward if is_sharded(module) else module


def gather_at_once(modules: list[nn.Module]):
    """Has ZeRO-3 gather all parameters of each module around its call, as FSDP2 does, and none of its sub-modules'.

    Raises:
        RuntimeError: if DeepSpeed has hung its hooks on the sub-modules already.
    """
    for module in modules:
        if is_sharded(module) and not isinstance(module, FSDPModule) and not getattr(module, "_z3_leaf", False):
            raise RuntimeError(
                "DeepSpeed ZeRO-3 gathers the parameters of this model linear layer by linear layer, where multi-axis "
                "gradient checkpointing needs a whole block: enable it before deepspeed.initialize, as Trainer does."
            )
        module._z3_leaf = True  # what deepspeed.utils.set_z3_leaf_module does; without DeepSpeed, nobody asks


def call_through_hooks(modules: list[nn.Module], function: Callable, hidden_states: torch.Tensor, *args):
    """Calls a function inside one call of each module that is sharded: their hooks gather the parameters before it and
    in its backward, and scatter the gradients once they are complete, as for a call of the module itself.

    Raises:
        RuntimeError: under the first version of FSDP, which hides the parameters that gradients are to be found for.
    """
    # Both versions mark what they manage; the first leaves plain tensors where parameters were.
    if any(getattr(module, "_is_fsdp_managed_module", False) and not [*module.parameters()] for module in modules):
        raise RuntimeError(
            "Multi-axis gradient checkpointing cannot see the parameters that the first version of FSDP has "
            "flattened: use the second, fully_shard, which is fsdp_version: 2 in Accelerate's configuration."
        )
    sharded = [module for module in modules if is_sharded(module)]
    trained = any(parameter.requires_grad for module in sharded for parameter in module.parameters())
    if trained and torch.is_grad_enabled() and not hidden_states.requires_grad:
        # The hook that scatters gradients waits for that of the input; ZeRO-3 would not wait at all.
        hidden_states = hidden_states.detach().requires_grad_()
    for module in reversed(sharded):
        function = functools.partial(_call_in_place_of_forward, module, function)
    return function(hidden_states, *args)


def _call_in_place_of_forward(module, function, *args):
    forward = vars(module).get("forward")
    module.forward = function
    try:
        return nn.Module.__call__(module, *args)
    finally:
        if forward is None:
            del module.forward
        else:
            module.forward = forward


def most_of_all_processes(number: int, device: torch.device) -> int:
    """The largest of the numbers that the processes have. All of them wait for each other here."""
    numbers = torch.tensor(number, device=device)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    return int(numbers)
