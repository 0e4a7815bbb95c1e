"""Asynchronous copies, on a GPU and on a CPU with streams that delay each copy for as long as possible."""

import copy
from contextlib import contextmanager

import pytest
import torch
from comparison import assert_same
from tiny import random_embeddings, tiny_mamba2

from transformers_ma2mba import enable_multi_axis_checkpointing
from transformers_ma2mba.gradient_checkpointing import grid as checkpoint_grid
from transformers_ma2mba.gradient_checkpointing.offload import Offloader, SegmentReader


class LazyStream:
    """A stream that does no work until somebody waits for it."""

    def __init__(self):
        self.work = []
        self.done = 0

    def run(self, until=None):
        until = len(self.work) if until is None else until
        while self.done < until:
            self.done += 1
            self.work[self.done - 1]()

    def wait_stream(self, stream):
        self.work.append(stream.run)

    def record_event(self):
        return LazyEvent(self, len(self.work))

    synchronize = run


class LazyEvent:
    """A position in the work of a lazy stream."""

    def __init__(self, stream, position):
        self.synchronize = lambda: stream.run(position)


class MainStream(LazyStream):
    """The stream of the computation. A CPU computes at once, so this stream also waits at once."""

    def wait_event(self, event):
        event.synchronize()


class LazyOffloader(Offloader):
    """An offloader that copies within the memory of the CPU as if to and from a GPU. New memory is NaN."""

    def __init__(self, device, offload):
        super().__init__(device, False)
        self.active, self.inward, self.outward = offload, LazyStream(), LazyStream()

    def empty(self, shape, dtype):
        return torch.full(shape, torch.nan, dtype=dtype)


@pytest.fixture
def lazily(monkeypatch):
    """Replace CUDA's streams by lazy ones, and list the shapes of the tensors that are copied."""
    main, current, copies = MainStream(), [], []
    copy_now, empty = torch.Tensor.copy_, torch.empty

    def copy_(target, source, non_blocking=False):
        if not current:
            return copy_now(target, source)
        copies.append(source.shape)
        current[-1].work.append(lambda: copy_now(target, source))

    @contextmanager
    def stream(chosen):
        current.append(chosen)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))
    monkeypatch.setattr(checkpoint_grid, "Offloader", LazyOffloader)
    return copies


def test_store_and_fetch_do_not_wait_until_their_result_is_used(lazily):
    copies = LazyOffloader(torch.device("cpu"), True)
    kept, rows = copies.empty((2, 3), torch.float64), torch.ones(2, 3, dtype=torch.float64)
    copies.store(kept, rows)
    assert kept.isnan().all()
    copies.finish()
    assert torch.equal(kept, rows)
    wait = copies.fetch(kept)
    assert copies.inward.done == 0
    assert torch.equal(wait(), rows)


def test_stores_lag_by_at_most_two_segments(lazily):
    copies = LazyOffloader(torch.device("cpu"), True)
    kept = [copies.empty((1, 1), torch.float64) for _ in range(5)]
    for memory in kept:
        copies.store(memory, torch.zeros(1, 1, dtype=torch.float64))
        copies.end_segment()
    assert [memory.isnan().item() for memory in kept] == [False, False, False, True, True]


def test_reader_fetches_the_next_segment_in_advance(lazily):
    copies = LazyOffloader(torch.device("cpu"), True)
    segments = SegmentReader(torch.arange(6.0).view(1, 6), [(0, 2), (2, 4), (4, 6)], copies)
    assert segments.take(2, 1).tolist() == [[4, 5]]
    assert (len(copies.inward.work), copies.inward.done) == (2, 1)
    assert segments.take(1, 0).tolist() == [[2, 3]]
    assert segments.take(0, -1).tolist() == [[0, 1]]
    assert len(copies.inward.work) == 3


def steps(model, inputs, **options):
    """Outputs and gradients of a plain step, then of a checkpointed one."""
    for grid in (model, enable_multi_axis_checkpointing(copy.deepcopy(model), **options)):
        embeds = inputs.clone().requires_grad_()
        output = grid(inputs_embeds=embeds).last_hidden_state
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
        (output * weights.view_as(output)).sum().backward()
        gradients = {name: parameter.grad for name, parameter in grid.named_parameters()}
        yield {"output": output.detach(), "inputs": embeds.grad, **gradients}


@pytest.mark.parametrize("length", [2, 9, 31])
@pytest.mark.parametrize("layer_interval", [1, 2, 4])
@pytest.mark.parametrize("order", ["layer-major", "sequence-major"])
def test_step_reads_no_tensor_before_its_copy_ends(lazily, in_double, order, layer_interval, length):
    options = dict(layer_interval=layer_interval, sequence_interval=4, order=order, offload=True)
    expected, actual = steps(tiny_mamba2(num_hidden_layers=4), random_embeddings(length), **options)
    assert_same(actual, expected, 1e-10)
    assert len(lazily) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("order", ["layer-major", "sequence-major"])
def test_offloading_on_a_gpu_does_not_change_the_step(order):
    sizes = dict(hidden_size=256, head_dim=64, num_heads=8, state_size=64, chunk_size=64)
    model = tiny_mamba2(dtype=torch.float32, num_hidden_layers=4, **sizes)
    inputs = torch.randn(2, 1000, 256, device="cuda")
    options = dict(layer_interval=2, sequence_interval=128, order=order)
    _, here = steps(model.cuda(), inputs, **options)
    expected, there = steps(model, inputs, offload=True, **options)
    # Kernels compute in TF32 and add in no fixed order. A tensor read too early would cause far larger errors.
    assert_same(there, here, 1e-3)
    assert_same(there, expected, 2e-2)
