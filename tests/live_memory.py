"""The exact peak memory of CPU tensors in a step."""

import gc

from torch.profiler import ProfilerActivity, profile


def peak_bytes(step) -> int:
    """Call a function, and return the peak bytes of the tensors that it creates.

    PyTorch's allocator reports each tensor's memory to the profiler when it is allocated and freed. Tensors from
    before the call do not count, whether the function frees them or not.
    """
    gc.collect()  # garbage collected during the step would make its peak look smaller
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = most = 0
    for _, change in changes:
        live += change
        most = max(most, live)
    return most
