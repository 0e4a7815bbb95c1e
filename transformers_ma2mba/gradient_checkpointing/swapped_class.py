"""Another forward pass for an existing module, by way of its class.

The module gets a new class, made from its own class and from a stand-in for one of the bases. Copies, pickles and the
replicas of DataParallel keep the class. With a bound method on the instance, all of them would call the first module.
A subclass keeps its own forward pass, and its call of `super().forward` reaches the stand-in.
"""

import functools
from collections.abc import Callable
from types import MethodType

from torch import nn


def swap_class(module: nn.Module, stand_in: type):
    """Give a module a class in which `stand_in` precedes its stock base. A second call has no effect."""
    if not isinstance(module, stand_in):
        _set_class(module, _class_with(type(module), stand_in))


def is_passed_by(module: nn.Module) -> bool:
    """Whether a forward pass on the instance replaces that of the module's class."""
    own = vars(module).get("_old_forward", vars(module).get("forward"))
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def restore_class(module: nn.Module):
    """Restore the class that a module had, unless another class has been derived from the new one since."""
    original = vars(type(module)).get("_swapped_class")
    if original is not None:
        _set_class(module, original)


class Swappable:
    """Base class of stand-ins.

    Pickles and copies name the class that the module had, as the new one cannot be imported.
    """

    @classmethod
    def around(cls, swapped: type, forward: Callable) -> Callable:
        """The forward pass of the new class, `swapped`, if the module's own class defines one, `forward`."""
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
    # A base cannot precede a class that is derived from it.
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
    # Accelerate's hooks call the bound forward pass that they found, and leave it on the instance when they go.
    for name in ("forward", "_old_forward"):
        if getattr(vars(module).get(name), "__func__", None) is before:
            setattr(module, name, MethodType(cls.forward, module))
