"""Blocks of pinned memory have exact sizes, are reused, and return to the system. A list stands in for CUDA."""

import gc
import mmap
import os
import random
import re
import threading

import pytest
import torch

from transformers_ma2mba.gradient_checkpointing.pinned_memory import PinnedMemory


class Cuda:
    """The CUDA runtime's record of pinned blocks: their sizes by address."""

    def __init__(self, limit=float("inf")):
        self.pinned, self.registrations, self.most, self.limit = {}, 0, 0, limit

    def cudaHostRegister(self, address, num_bytes, flags):  # noqa: N802  CUDA's own name
        assert address % 4096 == 0 and flags == 0
        if sum(self.pinned.values()) + num_bytes > self.limit:
            return 2
        assert self.pinned.setdefault(address, num_bytes) == num_bytes
        self.registrations += 1
        self.most = max(self.most, sum(self.pinned.values()))
        return 0

    def cudaHostUnregister(self, address):  # noqa: N802
        del self.pinned[address]
        return 0


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    return cuda


def test_block_has_the_size_of_its_tensor(cuda):
    tensor = PinnedMemory().empty((3, 5, 7), torch.float64)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((3, 5, 7), torch.float64, True)
    assert cuda.pinned == {tensor.data_ptr(): 3 * 5 * 7 * 8}
    tensor.copy_(torch.arange(105.0).view(3, 5, 7))
    assert tensor.sum() == 105 * 52


def test_block_is_free_after_the_last_view(cuda):
    memory = PinnedMemory()
    tensor = memory.empty((100, 100), torch.float32)
    view, address = tensor[3:5], tensor.data_ptr()
    del tensor
    gc.collect()
    assert memory.empty((100, 100), torch.float32).data_ptr() != address
    del view
    again = memory.empty((90, 100), torch.float32)
    assert again.data_ptr() in cuda.pinned
    assert cuda.registrations == 2


def test_tensors_share_no_block(cuda):
    memory = PinnedMemory()
    one, two = (memory.empty((50,), torch.bfloat16).fill_(value) for value in (1, 2))
    assert (one == 1).all() and (two == 2).all()
    assert len(cuda.pinned) == 2


def request_after(memory, *sizes):
    """Allocate tensors of some bytes, free all of them, and return a tensor of the last size."""
    *freed, requested = sizes
    freed = [memory.empty((size,), torch.uint8) for size in freed]
    del freed
    return memory.empty((requested,), torch.uint8)


@pytest.mark.parametrize(
    ("freed", "requested", "pinned"),
    [
        ([4000], 1000, [4000]),  # a quarter of a block
        ([4001], 1000, [1000, 4001]),
        ([4000, 2000, 3000], 1500, [2000, 3000, 4000]),
        ([1000], 1001, [1000, 1001]),
        ([1000, 1900, 900], 5000, [1000, 1900, 5000, 900]),  # together not above twice the largest demand
        ([2000, 2000], 3000, [2000, 2000, 3000]),
        ([2000, 2000], 4500, [2000, 2000, 4500]),
        ([3000, 1500, 1400], 5900, [1400, 1500, 3000, 5900]),
    ],
)
def test_block_for_a_request(cuda, freed, requested, pinned):
    memory = PinnedMemory()
    tensor = request_after(memory, *freed, requested)
    assert sorted(cuda.pinned.values()) == sorted(pinned)
    assert memory.pinned_bytes == sum(pinned)
    assert tensor.data_ptr() in cuda.pinned


def test_the_smallest_suitable_block_is_taken(cuda):
    memory = PinnedMemory()
    tensor = request_after(memory, 4000, 2000, 3000, 1500)
    assert cuda.pinned[tensor.data_ptr()] == 2000


def test_new_block_replaces_the_next_smaller_ones(cuda):
    memory = PinnedMemory()
    request_after(memory, 1000, 1000, 2000)  # the largest demand is 2,000
    assert sorted(cuda.pinned.values()) == [1000, 1000, 2000]
    request_after(memory, 2100)
    assert sorted(cuda.pinned.values()) == [1000, 1000, 2100]


def test_unused_part_of_blocks_in_use_is_bounded(cuda):
    memory = PinnedMemory()
    large = [memory.empty((1000,), torch.uint8) for _ in range(2)]  # the largest demand
    del large
    held = [memory.empty((size,), torch.uint8) for size in (250, 250, 750, 750)]
    assert sorted(cuda.pinned.values()) == [750, 750, 1000, 1000]
    del held
    held = [memory.empty((250,), torch.uint8) for _ in range(3)]
    assert len(cuda.pinned) == 4  # 500, 500 and 750 are unused; 750 more would exceed 2,000
    held.append(memory.empty((250,), torch.uint8))
    assert sorted(cuda.pinned.values()) == [250, 750, 750, 1000, 1000]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shortest", [500, 2_000, 10_000], ids="from{}".format)
def test_steps_of_random_lengths_rarely_pin(cuda, shortest, seed):
    """Each step has six blocks like a layer-major plan: rows grow with the length, and states with its square root."""
    memory, draw = PinnedMemory(), random.Random(seed)
    largest_demand = steps_that_pin = 0
    for _ in range(24):
        length = draw.randint(shortest, 20_000)
        before = cuda.registrations
        sizes = [8 * length] * 4 + [int(900 * length**0.5), int(90 * length**0.5)]
        tensors = [memory.empty((size,), torch.uint8) for size in sizes]
        largest_demand = max(largest_demand, sum(sizes))
        assert cuda.most <= 2 * largest_demand
        steps_that_pin += cuda.registrations > before
        del tensors
    assert memory.largest_demand == largest_demand
    assert steps_that_pin <= 8
    assert cuda.registrations <= 24 * 6 // 4
    memory.release()
    assert cuda.pinned == {} and memory.pinned_bytes == memory.demand == memory.used_bytes == 0


@pytest.mark.parametrize("seed", range(20))
def test_pinned_bytes_stay_within_twice_the_largest_demand(cuda, seed):
    memory, draw = PinnedMemory(), random.Random(seed)
    held, demand, largest_demand = [], 0, 0
    for _ in range(500):
        if held and draw.random() < 0.5:
            for _ in range(draw.randint(1, len(held))):
                demand -= held.pop(draw.randrange(len(held))).nbytes
        held.append(memory.empty((int(10 ** draw.uniform(0, 4)),), torch.uint8))
        demand += held[-1].nbytes
        largest_demand = max(largest_demand, demand)
        assert sum(cuda.pinned.values()) == memory.pinned_bytes <= 2 * largest_demand
        assert (memory.demand, memory.largest_demand) == (demand, largest_demand)
        assert memory.used_bytes == sum(cuda.pinned[tensor.data_ptr()] for tensor in held)


def test_threads_share_no_block(cuda):
    memory, failures = PinnedMemory(), []

    def work(number):
        draw = random.Random(number)
        for _ in range(200):
            tensors = [memory.empty((draw.randint(1, 5000),), torch.uint8).fill_(number) for _ in range(3)]
            if not all((tensor == number).all() for tensor in tensors):
                failures.append(number)
            del tensors

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory.release()
    assert not failures
    assert cuda.pinned == {} and memory.pinned_bytes == memory.demand == memory.used_bytes == 0


def test_empty_tensor_needs_no_block(cuda):
    assert PinnedMemory().empty((0, 5), torch.float32).shape == (0, 5)
    assert cuda.pinned == {}


@pytest.mark.parametrize("initialized", [False, True])
def test_memory_that_cannot_be_pinned(cuda, monkeypatch, initialized):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    cuda.limit = 100
    memory = PinnedMemory()
    held = memory.empty((20,), torch.uint8)
    with pytest.raises(RuntimeError, match=r"CUDA cannot pin 0\.0 GiB .* \(error 2\)"):
        memory.empty((90,), torch.uint8)
    assert list(cuda.pinned.values()) == [20] and memory.demand == memory.pinned_bytes == 20
    assert memory.empty((80,), torch.uint8).shape == (80,)
    del held


def test_free_blocks_are_released_before_pinning_fails(cuda):
    cuda.limit = 100
    memory = PinnedMemory()
    request_after(memory, 10, 60)
    held = memory.empty((50,), torch.uint8)  # in the block of 60 bytes
    assert sorted(cuda.pinned.values()) == [10, 60]
    tensor = memory.empty((39,), torch.uint8)
    assert sorted(cuda.pinned.values()) == [39, 60]
    assert {tensor.data_ptr(), held.data_ptr()} == set(cuda.pinned)


def test_memory_beyond_the_systems(cuda, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(RuntimeError, match="CUDA cannot pin .* Cannot allocate memory"):
        PinnedMemory().empty((90,), torch.uint8)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="the system does not list its mappings")
def test_blocks_are_private_in_huge_pages_and_not_for_forks(cuda):
    tensor = PinnedMemory().empty((5 * 2**20,), torch.uint8)
    with open("/proc/self/smaps") as file:
        mappings = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) (\S+)(?:.*\n)*?VmFlags: (.*)$", file.read(), re.MULTILINE)
    (found,) = [m for m in mappings if int(m[0], 16) <= tensor.data_ptr() < int(m[1], 16)]
    assert found[2] == "rw-p"
    huge_pages = os.path.exists("/sys/kernel/mm/transparent_hugepage")
    assert {"dc", *(["hg"] if huge_pages else [])} <= set(found[3].split())
