"""What autograd keeps for backward, in bytes."""

from contextlib import contextmanager

import torch


@contextmanager
def kept_beside(module):
    """Collects the sizes of the storages that are kept within the context, the module's parameters apart."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    sizes = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes
