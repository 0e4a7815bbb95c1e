"""The memory of a step, to the byte: what CPU tensors hold at most while it runs."""

import gc

from torch.profiler import ProfilerActivity, profile


def peak_bytes(step) -> int:
    """Calls a function, and returns the most bytes that tensors made by it held at a time.

    PyTorch's allocator reports each tensor's memory to the profiler as it comes and goes. What was there before does
    not count, nor does it when it goes.
    """
    gc.collect()  # garbage that comes to be collected in the step would make it look smaller
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = most = 0
    for _, change in changes:
        live += change
        most = max(most, live)
    return most
