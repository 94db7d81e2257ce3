"""What Torch allocates."""

import gc

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def peak_of(call):
    """The most bytes that Torch has allocated during `call`, beyond those from before."""
    gc.collect()  # or what others have left is freed during the call, and counts as given back
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    waiting, changes = list(profiled.profiler.kineto_results.experimental_event_tree()), []
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    live = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        live += size
        peak = max(peak, live)
    return peak
