"""Memory that autograd keeps for backward, in bytes."""

from contextlib import contextmanager

import torch


@contextmanager
def kept_beside(module):
    """Collect the sizes of the storages that autograd keeps within the context, except the module's parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    sizes = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes
