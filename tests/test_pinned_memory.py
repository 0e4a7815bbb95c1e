"""Blocks of pinned memory: exact, reused, given back. CUDA's part in it is played by a list."""

import gc
from types import SimpleNamespace

import pytest
import torch

from transformers_ma2mba.pinned_memory import PinnedMemory


@pytest.fixture
def pinned(monkeypatch):
    """Sizes of the blocks that are pinned, by address."""
    pinned = {}

    def register(address, num_bytes, flags):
        assert address % 4096 == 0 and flags == 0
        pinned[address] = num_bytes
        return 0

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=pinned.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    return pinned


def test_a_tensor_has_a_block_of_its_own_size(pinned):
    tensor = PinnedMemory().empty((3, 5, 7), torch.float64)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((3, 5, 7), torch.float64, True)
    assert pinned == {tensor.data_ptr(): 3 * 5 * 7 * 8}
    tensor.copy_(torch.arange(105.0).view(3, 5, 7))
    assert tensor.sum() == 105 * 52


def test_blocks_come_back_with_the_last_view(pinned):
    memory = PinnedMemory()
    tensor = memory.empty((100, 100), torch.float32)
    view, address = tensor[3:5], tensor.data_ptr()
    del tensor
    gc.collect()
    assert memory.free == []
    del view
    assert len(memory.free) == 1
    again = memory.empty((90, 100), torch.float32)  # nearly as large
    assert (again.data_ptr(), memory.free, len(pinned)) == (address, [], 1)


def test_two_at_a_time_share_nothing(pinned):
    memory = PinnedMemory()
    one, two = (memory.empty((50,), torch.bfloat16).fill_(value) for value in (1, 2))
    assert (one == 1).all() and (two == 2).all()
    assert len(pinned) == 2


def test_free_blocks_that_do_not_suit_are_released(pinned):
    memory = PinnedMemory()
    small, kept = memory.empty((10,), torch.float32), memory.empty((30,), torch.float32)
    del small
    large = memory.empty((1000,), torch.float32)
    assert sorted(pinned.values()) == [120, 4000]
    assert memory.free == []
    del large, kept
    memory.release()
    assert pinned == {}


def test_nothing_needs_no_block(pinned):
    assert PinnedMemory().empty((0, 5), torch.float32).shape == (0, 5)
    assert pinned == {}


def test_memory_that_cannot_be_pinned(monkeypatch):
    cudart = SimpleNamespace(cudaHostRegister=lambda *_: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    with pytest.raises(RuntimeError, match=r"CUDA cannot pin 0\.0 GiB .* \(error 2\)"):
        PinnedMemory().empty((10,), torch.float32)
