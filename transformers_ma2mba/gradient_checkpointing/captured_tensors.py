"""The state of modules at a forward pass, put back when the same computation runs again in backward.

Between the two, `torch.func.functional_call` may exchange tensors, hooks may be removed, dropout may be switched off,
and optimizers may write into weights. Backward must restore the computation of the forward pass, and it must know
every tensor that requires a gradient, be it a parameter of a module or a tensor that a hook brings in.
"""

import copy
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager

import torch
from torch import nn

# Attributes that change what a module computes, and that can be put back ...
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
# ... and attributes of PEFT's layers that cannot, as merging an adapter writes into weights.
_ADAPTERS = ("merged_adapters", "_disable_adapters", "_active_adapter")


class CapturedTensors:
    """Parameters, buffers, training mode and hooks of modules and their sub-modules, as they are now.

    As a context, it puts all of this back.

    Args:
        modules: by the path that error messages use.
        with_hooks: whether hooks are captured.

    Attributes:
        trainable: the tensors that require a gradient, each once: those of the modules, then those added by `add`.
    """

    def __init__(self, modules: Mapping[str, nn.Module], with_hooks: bool = True):
        self.places = []  # (dictionary of a module, name in it, tensor)
        self.switches = []  # (dictionary of a module, name in it, value)
        self.adapters = []  # (path, module, values)
        self.names = {}
        self.trainable = []
        self.accumulators = []  # nodes of autograd's graph that hold the leaves' gradient accumulators, see `add`
        self.versions = {}
        self.constants = []  # weak references to tensors that came in through hooks, and their versions
        for prefix, root in modules.items():
            for path, module in root.named_modules(prefix=prefix):
                switches = ("training", *_HOOKS) if with_hooks else ("training",)
                self.switches += [(vars(module), name, copy.copy(vars(module)[name])) for name in switches]
                if hasattr(module, "merged_adapters"):
                    self.adapters.append((path, module, _adapters_of(module)))
                # A replica of DataParallel has no parameters: its tensors are not leaves, and stand elsewhere.
                replicated = vars(module).get("_former_parameters", {})
                for tensors in (module._parameters, replicated):
                    for name, tensor in tensors.items():
                        if tensor is not None:
                            self.add(tensor, f"{path}.{name}")
                self.places += [
                    (tensors, name, tensor)
                    for tensors in (module._parameters, module._buffers)
                    for name, tensor in tensors.items()
                ]

    def add(self, tensor: torch.Tensor, name: str):
        """Capture one more tensor, unless it has been captured already."""
        if tensor in self.names:
            return
        self.names[tensor] = name
        if tensor.requires_grad:
            self.trainable.append(tensor)
            if tensor.is_leaf:
                # PyTorch makes a leaf's gradient accumulator when a graph needs it, and drops it with the last graph.
                # If one thread makes it while another passes the leaf to a Function, PyTorch 2.15 deadlocks: the first
                # thread needs Python's lock, which the second one holds. So it is made here, by an operation that
                # releases that lock, and kept.
                with torch.enable_grad():
                    self.accumulators.append(tensor.view_as(tensor).grad_fn)
        if not tensor.is_inference():  # inference tensors have no version
            self.versions[tensor] = tensor._version

    def check_unchanged(self):
        """Check that backward can restore the computation of the forward pass.

        Raises:
            RuntimeError: if a tensor was modified in place since it was captured, as autograd does; or if adapters
                were merged or switched.
        """
        for path, module, before in self.adapters:
            if _adapters_of(module) != before:
                raise RuntimeError(
                    f"The adapters of {path} were merged, switched or disabled between the forward pass and backward, "
                    f"which needs them as they were: call backward before."
                )
        constants = [(reference(), version) for reference, version in self.constants]
        for tensor, version in [*self.versions.items(), *constants]:
            if tensor is not None and tensor._version != version:
                name = self.names.get(tensor, "A tensor that a hook or closure uses")
                raise RuntimeError(
                    f"{name}, {tuple(tensor.shape)}, was modified in place between the forward pass and backward, "
                    f"which needs it as it was (version {version}, now {tensor._version}): call backward before the "
                    f"optimizer's step, or do the forward pass again."
                )

    def __enter__(self):
        """Put the captured tensors, modes and hooks back, until `__exit__`.

        Raises:
            RuntimeError: if a captured tensor was modified in place.
        """
        self.check_unchanged()
        # Usually nothing has changed. Then several threads may enter at a time.
        changed = [place for place in self.places if place[0].get(place[1]) is not place[2]]
        changed += [switch for switch in self.switches if switch[0][switch[1]] != switch[2]]
        wanted = set(self.trainable)
        self.frozen_since = [t for t in self.trainable if t.is_leaf and not t.requires_grad]
        self.freed_since = [t for t in self.names if t.is_leaf and t.requires_grad and t not in wanted]
        self.others = [(owner, name, owner.get(name)) for owner, name, _ in changed]
        for owner, name, captured in changed:
            owner[name] = captured
        self._turn_gradients(frozen=self.frozen_since, freed=self.freed_since)

    def __exit__(self, *exception):
        for owner, name, other in self.others:
            owner[name] = other
        self._turn_gradients(frozen=self.freed_since, freed=self.frozen_since)

    @staticmethod
    def _turn_gradients(frozen: list[torch.Tensor], freed: list[torch.Tensor]):
        """Unfreeze the tensors in `frozen`, and freeze those in `freed`."""
        for tensor in frozen:
            tensor.requires_grad_(True)
        for tensor in freed:
            tensor.requires_grad_(False)

    def find_others(self, run: Callable, where: str, inputs: Iterable[torch.Tensor] = ()):
        """Run a computation without keeping it for backward, and capture the leaves that it depends on besides.

        These leaves require a gradient and belong to none of the modules, such as a vector that a hook multiplies by.
        Autograd records the computation, but keeps none of its tensors.

        Args:
            run: returns an iterable of tensors.
            where: the name of the computation in error messages.
            inputs: the inputs that require gradients.

        Returns:
            The tensors that `run` returns, detached; None stays None.

        Raises:
            RuntimeError: if the outputs depend on a tensor that requires a gradient and was computed elsewhere.
        """
        seen = {}

        def note(tensor):
            if not tensor.requires_grad and tensor not in self.names and not tensor.is_inference():
                seen[id(tensor)] = (weakref.ref(tensor), tensor._version)

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, _never):
            start = _sequence_number()
            outputs = list(run())
        # A tensor that backward would keep, and that outlives the run, was not made by the run.
        self.constants += [noted for noted in seen.values() if noted[0]() is not None]
        for leaf in unknown_leaves(outputs, [*self.trainable, *inputs], where, start):
            self.add(leaf, f"a tensor that {where} depend on")
        return [output if output is None else output.detach() for output in outputs]


@contextmanager
def without_hooks(tensors: Iterable[torch.Tensor]):
    """Disable the gradient hooks of tensors, which expect whole gradients, while a cell computes its share of them.

    Raises:
        RuntimeError: if another thread has disabled hooks of the same tensors.
    """
    with _lock:
        if any(tensor in _hooks_held for tensor in tensors):
            raise RuntimeError(
                "Parameters with gradient hooks cannot be trained by several threads at a time under gradient "
                "checkpointing, as their hooks expect whole gradients: give each thread a copy of the model."
            )
        hooks = {tensor: tensor._backward_hooks for tensor in tensors if tensor._backward_hooks}
        for tensor in hooks:
            tensor._backward_hooks = None
        _hooks_held.update(hooks)
    try:
        yield
    finally:
        with _lock:
            for tensor, held in hooks.items():
                tensor._backward_hooks = held
                del _hooks_held[tensor]


def unknown_leaves(
    outputs: Iterable[torch.Tensor | None], known: Iterable[torch.Tensor], where: str, start: int | None = None
) -> list[torch.Tensor]:
    """The unknown leaves of autograd's graph that outputs depend on.

    Args:
        known: leaves, or tensors that were computed elsewhere; the search ends at them.
        where: the name of the computation in error messages.
        start: the sequence number of the computation's first node; nodes with a lower one were made elsewhere. None
            to accept any node.

    Raises:
        RuntimeError: if a node was made elsewhere.
    """
    known_leaves, known_edges = set(), set()
    for tensor in known:
        if tensor.grad_fn is None:
            known_leaves.add(tensor)
        else:
            known_edges.add((tensor.grad_fn, tensor.output_nr))
    found = {}
    edges = [(output.grad_fn, output.output_nr) for output in outputs if output is not None]
    seen = set()
    while edges:
        edge = edges.pop()
        node = edge[0]
        if node is None or node in seen or edge in known_edges:
            continue
        seen.add(node)
        if isinstance(node, _ACCUMULATE_GRAD):
            if node.variable not in known_leaves:
                found[node.variable] = None
        elif start is not None and node._sequence_nr() < start:
            raise RuntimeError(
                f"{where} depend on a tensor that requires a gradient and that was computed outside ({node.name()}). "
                f"A checkpointed computation cannot send a gradient there: let the hook or closure compute the tensor "
                f"from parameters itself, or disable gradient checkpointing."
            )
        else:
            edges.extend(node.next_functions)
    return list(found)


def _adapters_of(module: nn.Module) -> list:
    return [copy.copy(getattr(module, name, None)) for name in _ADAPTERS]


def _never(packed):
    raise RuntimeError(
        "A tensor that a hook took out of a checkpointed layer cannot be differentiated, as the layer keeps nothing "
        "for backward: compute from the model's outputs instead, or disable gradient checkpointing."
    )


def _sequence_number() -> int:
    """The sequence number of autograd's latest node in this thread."""
    return torch.zeros((), requires_grad=True).view(()).grad_fn._sequence_nr()


_lock = threading.Lock()
_hooks_held = {}  # by tensor
_ACCUMULATE_GRAD = type(torch.zeros((), requires_grad=True).view(()).grad_fn.next_functions[0][0])
