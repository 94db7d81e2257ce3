"""gradient_memory="host" on stand-ins for CUDA: how much is on the device, and in what order.

The host enqueues a step in no time; copies and kernels take theirs, on streams with a clock each.
"""

from __future__ import annotations

import contextlib
import types

import pytest
import torch

from mollm.optim import gradients
from mollm.optim.gradients import GradientStore

COPY, KERNEL = 1.0, 0.1  # seconds per byte
NAMES = ("forget", "kl", "retain")


class Stream:
    def __init__(self, *_):
        self.time = 0.0

    def wait_event(self, event):
        self.time = max(self.time, event.time)

    def wait_stream(self, other):
        self.time = max(self.time, other.time)


class Device:
    """Streams, memory, and what is in it."""

    def __init__(self):
        self.current = [Stream()]
        self.allocated = 0
        self.in_use = {}  # buffer and first byte: until when kernels read it

    @contextlib.contextmanager
    def stream(self, stream):
        self.current.append(stream)
        yield
        self.current.pop()

    def empty(self, size, dtype, device):
        self.allocated += size
        return Buffer(self, object(), 0, size)

    def event(self):
        device = self

        class Event:
            def record(self):
                self.time = device.current[-1].time

        return Event()


class Buffer:
    def __init__(self, device, memory, begin, end):
        self.device, self.memory, self.begin, self.end = device, memory, begin, end

    def __getitem__(self, at):
        assert at.stop <= self.end
        return Buffer(self.device, self.memory, self.begin + at.start, self.begin + at.stop)

    def view(self, _):
        return self

    def record_stream(self, stream):
        pass

    def copy_(self, tensor, non_blocking):
        stream = self.device.current[-1]
        assert non_blocking
        for (memory, begin, end), until in self.device.in_use.items():
            if memory is self.memory and begin < self.end and self.begin < end:
                assert stream.time >= until, "written over while a kernel reads it"
        stream.time += COPY * tensor.nbytes
        self.arrives = stream.time
        return self


class Parameter:
    is_cuda = True

    def __init__(self, size):
        self.nbytes, self.device = size, "cuda"


@pytest.mark.parametrize("sizes", [[1000] * 40, [300, 5000, 20, 700] * 8, [9000]], ids=str)
def test_two_buckets_at_most_are_on_the_device(monkeypatch, sizes):
    device = Device()
    cuda = types.SimpleNamespace(
        Stream=Stream,
        Event=device.event,
        stream=device.stream,
        current_stream=lambda _=None: device.current[-1],
    )
    fake = types.SimpleNamespace(cuda=cuda, empty=device.empty, uint8=None, device=object)
    monkeypatch.setattr(gradients, "torch", fake)
    monkeypatch.setattr(gradients, "local", lambda p: p)
    store = GradientStore(NAMES, "host")
    store.bucket_bytes = 6000
    params = [Parameter(n) for n in sizes]
    for name in NAMES:
        store._held[name] = {
            p: types.SimpleNamespace(nbytes=p.nbytes, dtype=None, shape=None) for p in params
        }
    seen = []
    for some, lists in store.buckets(params):
        main = device.current[-1]
        seen += some
        here = [t for row in lists for t in row]
        assert all(main.time >= t.arrives for t in here), "read before it has arrived"
        main.time += KERNEL * sum(t.end - t.begin for t in here)
        device.in_use |= {(t.memory, t.begin, t.end): main.time for t in here}
    assert seen == params
    largest = 6000 + 3 * max(sizes) + 3 * 256 * len(sizes)
    assert device.allocated <= 2 * largest
    if len(sizes) > 10:
        assert device.allocated < 3 * sum(sizes) / 2


@pytest.mark.gpu
def test_the_device_holds_two_buckets():
    params = [torch.nn.Parameter(torch.zeros(1 << 20, device="cuda")) for _ in range(32)]
    store = GradientStore(NAMES, "host")
    store.bucket_bytes = 12 << 20
    for name in NAMES:
        for p in params:
            p.grad = torch.ones_like(p)
        store.take(name, params)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _, lists in store.buckets(params):
        assert all((t == 1).all() for row in lists for t in row)
    assert torch.cuda.max_memory_allocated() - before < 40 << 20
