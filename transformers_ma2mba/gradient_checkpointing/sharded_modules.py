"""Modules whose parameters are sharded over processes: FSDP2's `fully_shard` and DeepSpeed's ZeRO-3.

Hooks around a module's call gather its parameters, and scatter its gradients once these are complete. Both are
collective operations, so all processes must make the same calls in the same order, however long their sequences are.
"""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import nn

try:
    from torch.distributed.fsdp import FSDPModule
except ImportError:  # PyTorch built without torch.distributed
    FSDPModule = ()


def is_sharded(module: nn.Module) -> bool:
    """Whether calls of this module itself gather parameters from other processes."""
    return isinstance(module, FSDPModule) or "ds_id" in vars(module)  # ZeRO-3's mark


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether calls of this module itself run forward hooks other than those of sharding."""
    if torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks:
        return True
    return not is_sharded(module) and bool(module._forward_hooks or module._forward_pre_hooks)


def plain_forward(module: nn.Module) -> Callable:
    """Return the callable for a module inside `call_through_hooks`, which has run a sharded module's hooks already."""
    return module.forward if is_sharded(module) else module


def gather_at_once(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Make ZeRO-3 gather all parameters of each module around its call, as FSDP2 does, and not by sub-module.

    Returns:
        The modules that were not marked for this before.

    Raises:
        RuntimeError: if DeepSpeed has already added its hooks to the sub-modules.
    """
    changed = []
    for module in modules:
        if is_sharded(module) and not isinstance(module, FSDPModule) and not getattr(module, "_z3_leaf", False):
            raise RuntimeError(
                "DeepSpeed ZeRO-3 gathers the parameters of this model linear layer by linear layer, where multi-axis "
                "gradient checkpointing needs a whole block: enable it before deepspeed.initialize, as Trainer does."
            )
        if not getattr(module, "_z3_leaf", False):
            module._z3_leaf = True  # as deepspeed.utils.set_z3_leaf_module does; only DeepSpeed reads it
            changed.append(module)
    return changed


def gather_piecemeal(modules: Iterable[nn.Module]):
    """Undo `gather_at_once`.

    The mark stays on modules that DeepSpeed has added its hooks to, because it reads the mark at each call.
    """
    for module in modules:
        if not is_sharded(module):
            vars(module).pop("_z3_leaf", None)


def call_through_hooks(modules: list[nn.Module], function: Callable, hidden_states: torch.Tensor, *args):
    """Call a function inside one call of each sharded module.

    The modules' hooks gather the parameters before the function and in its backward, and scatter the gradients once
    they are complete, as for a call of the module itself.

    Args:
        modules: sharded or not, perhaps repeated; the first is called outermost.
        function: receives `hidden_states` and `args`.
        hidden_states: its gradient is required if parameters are trained.
        args: further arguments.

    Returns:
        The result of the function.

    Raises:
        RuntimeError: under the first version of FSDP, which hides the parameters.
    """
    # Both versions mark the modules that they manage; the first leaves plain tensors in place of parameters.
    if any(getattr(module, "_is_fsdp_managed_module", False) and not [*module.parameters()] for module in modules):
        raise RuntimeError(
            "Multi-axis gradient checkpointing cannot see the parameters that the first version of FSDP has "
            "flattened: use the second version, fully_shard (fsdp_version: 2 in Accelerate's configuration)."
        )
    sharded = [module for module in dict.fromkeys(modules) if is_sharded(module)]
    trained = any(parameter.requires_grad for module in sharded for parameter in module.parameters())
    if trained and torch.is_grad_enabled() and not hidden_states.requires_grad:
        # Hooks wait for the input's gradient before they scatter; without one, ZeRO-3's would not wait at all.
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


def processes_in_step(model: nn.Module) -> list:
    """Find the process groups whose processes must call a model's modules in the same order.

    Modules are sharded over these groups, or DeepSpeed's ZeRO-1 and 2 add up gradients over them in the order of
    their arrival.

    Returns:
        The groups, none if the order may differ.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            sharded = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # the latter up to 2.11
            if sharded[0] is not None:
                # With replicated shards, the mesh has two dimensions, and a group for each.
                return sharded[0].mesh_info.mesh.get_all_groups()
        for parameter in module.parameters(recurse=False):
            if "ds_process_group" in vars(parameter):
                return [parameter.ds_process_group]
            if any(_is_deepspeeds(hook) for hook in (parameter._post_accumulate_grad_hooks or {}).values()):
                return [torch.distributed.group.WORLD]
    return []


def _is_deepspeeds(hook: Callable) -> bool:
    return (getattr(hook, "__module__", None) or "").partition(".")[0] == "deepspeed"


def max_over_processes(numbers: list[int], groups: list, device: torch.device) -> list[int]:
    """Return the elementwise maximum of the numbers over the processes of the groups, which wait for each other.

    Args:
        numbers: as many in each process.
        groups: as from `processes_in_step`.
        device: where the groups' backend communicates.
    """
    largest = torch.tensor(numbers, device=device)
    for group in groups:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
    return largest.tolist()
