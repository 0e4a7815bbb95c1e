"""Another forward pass for a module that exists, by way of its class.

The module gets a class made of its own and of another that stands in for one of its bases. Whatever makes a module
out of a module keeps it: copies, pickles, the replicas of DataParallel. A bound method on the instance would lead them
all back to the first module. And a subclass with a forward pass of its own keeps that: what it calls with `super()` is
then the one that stands in.
"""

import functools
from collections.abc import Callable
from types import MethodType

from torch import nn


def swap_class(module: nn.Module, stand_in: type):
    """Gives a module a class in which `stand_in` stands before its own first base. Doing it again has no effect."""
    if not isinstance(module, stand_in):
        _set_class(module, _class_with(type(module), stand_in))


def is_passed_by(module: nn.Module) -> bool:
    """Whether the module has a forward pass of its own, put on the instance, that is not the one of its class."""
    own = vars(module).get("_old_forward", vars(module).get("forward"))
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def restore_class(module: nn.Module):
    """Gives a module back the class that it had, unless others have built upon the new one since."""
    original = vars(type(module)).get("_swapped_class")
    if original is not None:
        _set_class(module, original)


class Swappable:
    """For classes that stand in. Pickles and copies name the class that the module had: the new one is nowhere to be
    imported from."""

    @classmethod
    def around(cls, swapped: type, forward: Callable) -> Callable:
        """What the new class, `swapped`, takes in place of the forward pass that its base has of its own."""
        return forward

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(protocol)
        original = vars(type(self)).get("_swapped_class")
        if original is None:
            return reduced
        stand_in = next(base for base in type(self).__mro__ if Swappable in base.__bases__)
        return _blank, (original, stand_in), *reduced[2:]


@functools.cache
def _class_with(cls: type, stand_in: type) -> type:
    (stock,) = (base for base in stand_in.__bases__ if base is not Swappable)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    # A base cannot stand before a class that is made from it.
    bases = (stand_in,) if cls is stock else (cls, stand_in)
    swapped = type(cls)(cls.__name__, bases, {**names, "_swapped_class": cls})
    if cls.forward is not stock.forward:
        swapped.forward = stand_in.around(swapped, cls.forward)
    return swapped


def _blank(cls: type, stand_in: type) -> nn.Module:
    swapped = _class_with(cls, stand_in)
    return swapped.__new__(swapped)


def _set_class(module: nn.Module, cls: type):
    before = type(module).forward
    module.__class__ = cls
    # Accelerate's hooks call the forward pass that they found, bound, and leave it behind when they go.
    for name in ("forward", "_old_forward"):
        if getattr(vars(module).get(name), "__func__", None) is before:
            setattr(module, name, MethodType(cls.forward, module))
