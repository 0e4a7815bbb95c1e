"""The tensors that a computation depends on beside its inputs, held fast for when it runs again.

A checkpointed computation runs once in the forward pass and once more in backward. Between the two, modules may get
other tensors (`torch.func.functional_call` takes its own back), and optimizers may write into those they have. What is
restored must be computed with the tensors of the forward pass, and every one of them that wants a gradient must be
known, whether it is a parameter of a module or came in through a hook.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn


class CapturedTensors:
    """Parameters and buffers of some modules, and of all in these, as they are now. As a context, it puts them back.

    Attributes:
        trainable: the tensors that want a gradient, each once: those of the modules, then what `add` has added.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.places = []  # (dictionary of a module, name in it, tensor)
        self.names = {}
        self.trainable = []
        self.versions = {}
        for prefix, root in modules.items():
            for path, module in root.named_modules(prefix=prefix):
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
        """Captures one tensor more; one that is there already has no need of it."""
        if tensor in self.names:
            return
        self.names[tensor] = name
        if tensor.requires_grad:
            self.trainable.append(tensor)
        if not tensor.is_inference():  # which has no version
            self.versions[tensor] = tensor._version

    def check_unchanged(self):
        """
        Raises:
            RuntimeError: if a tensor was written into since it was captured. Autograd says the same of what it keeps.
        """
        for tensor, version in self.versions.items():
            if tensor._version != version:
                raise RuntimeError(
                    f"{self.names[tensor]}, {tuple(tensor.shape)}, was modified in place between the forward pass and "
                    f"backward, which needs it as it was (version {version}, now {tensor._version}): call backward "
                    f"before the optimizer's step, or do the forward pass again."
                )

    def __enter__(self):
        """Until `__exit__`, which may follow any number of times, the modules hold what was captured.

        Raises:
            RuntimeError: if a captured tensor was written into.
        """
        self.check_unchanged()
        self.others = [
            (tensors, name, tensor, tensors.get(name))
            for tensors, name, tensor in self.places
            if tensors.get(name) is not tensor
        ]
        for tensors, name, tensor, _ in self.others:
            tensors[name] = tensor

    def __exit__(self, *exception):
        for tensors, name, _, other in self.others:
            tensors[name] = other
        self.others = []

    def find_others(self, run: Callable, where: str):
        """Runs a computation as it runs without gradients, and captures what its outputs depend on besides.

        That are leaves which want a gradient and belong to none of the modules, such as a vector that a hook
        multiplies by. Autograd records the computation, but keeps none of its tensors.

        Args:
            run: gives an iterable of tensors; its inputs want no gradients.
            where: how errors call the computation.

        Returns:
            What `run` gives, detached; None stays None.

        Raises:
            RuntimeError: if it depends on a tensor that wants a gradient and was computed elsewhere.
        """
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, _never):
            start = _sequence_number()
            outputs = list(run())
        for leaf in unknown_leaves(outputs, self.trainable, where, start):
            self.add(leaf, f"a tensor that {where} depend on")
        return [output if output is None else output.detach() for output in outputs]


def unknown_leaves(
    outputs: Iterable[torch.Tensor | None], known: Iterable[torch.Tensor], where: str, start: int | None = None
) -> list[torch.Tensor]:
    """The leaves of autograd's graph that outputs depend on and that are none of the known tensors.

    Args:
        known: leaves, or tensors that were computed elsewhere; the graph is not followed beyond them.
        where: how errors call the computation.
        start: a sequence number of autograd's; nodes with a lower one were made elsewhere. None to not ask.

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
                f"{where} depend on a tensor that wants a gradient and that was computed outside ({node.name()}), by "
                f"which a checkpointed computation cannot send one back: have the hook or closure compute it from "
                f"parameters itself, or disable gradient checkpointing."
            )
        else:
            edges.extend(node.next_functions)
    return list(found)


def _never(packed):
    raise RuntimeError(
        "A tensor that a hook took out of a checkpointed layer cannot be differentiated, as what the layer kept for "
        "backward is gone: compute from the model's outputs instead, or disable gradient checkpointing."
    )


def _sequence_number() -> int:
    """The sequence number that autograd gives to the next node of this thread, or the one before."""
    return torch.zeros((), requires_grad=True).view(()).grad_fn._sequence_nr()


_ACCUMULATE_GRAD = type(torch.zeros((), requires_grad=True).view(()).grad_fn.next_functions[0][0])
