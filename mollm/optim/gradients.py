"""The gradients of K objectives between backward and step, and where they wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mollm.distributed.sharding import Lists, local, local_gradients, placed_like
from mollm.optim.constants import BUCKET_BYTES, MEMORIES


class _Staging:
    """Two buffers on the device that buckets from the host take turns in.

    Events order them: a bucket is written over once the kernels that were enqueued for it are done,
    and the host waits for nothing, however far it is ahead.
    """

    def __init__(self, size: int, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._device = device
        stream.wait_stream(torch.cuda.current_stream(device))
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        for buffer in self._buffers:
            buffer.record_stream(stream)
        self._arrived: list[torch.cuda.Event] = []
        self._done: list[torch.cuda.Event] = []

    def fetch(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        """Enqueues one bucket's copies and gives the tensors that they go to."""
        bucket = len(self._arrived)
        buffer, begin = self._buffers[bucket % 2], 0
        if bucket >= 2:
            self._stream.wait_event(self._done[bucket - 2])
        with torch.cuda.stream(self._stream):
            for t in tensors:
                there = buffer[begin : begin + t.nbytes].view(t.dtype).view(t.shape)
                yield there.copy_(t, non_blocking=True)
                begin += _aligned(t.nbytes)
            self._arrived.append(_recorded())

    def wait(self) -> None:
        """Lets the current stream wait for the bucket that is next to be worked on."""
        torch.cuda.current_stream(self._device).wait_event(self._arrived[len(self._done)])

    def free(self) -> None:
        """Everything that works on that bucket has been enqueued."""
        self._done.append(_recorded())


def _plain(g: Tensor) -> Tensor:
    """A gradient in memory of its own: one that a hook or a caller has put there may be a view that
    negates, or hold one element in several places."""
    if g.is_contiguous() and not g.is_neg():
        return g
    g = g.resolve_neg()
    return g.clone() if torch._debug_has_internal_overlap(g) == 1 else g


def _aligned(size: int) -> int:
    return -(-size // 256) * 256


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


class GradientStore:
    """Gradients by objective and parameter; of a sharded one, this process's part.

    Args:
        objectives: their names, in the order of the Gram matrix.
        memory: "as-produced" takes a gradient over from autograd without a copy; "bfloat16" rounds
            it; "host" moves it to pinned host memory on a stream of its own, while backward goes
            on, and brings it back in buckets of 256 MiB.
    """

    def __init__(self, objectives: Sequence[str], memory: str = "as-produced") -> None:
        if memory not in MEMORIES:
            raise ValueError(
                f"gradient_memory must be one of {', '.join(MEMORIES)}, but got {memory!r}."
            )
        self.objectives = tuple(objectives)
        self.memory = memory
        self.bucket_bytes = BUCKET_BYTES
        self._held: dict[str, dict[Tensor, Tensor]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_streams": {}}

    def clear(self) -> None:
        """Lets go of every gradient."""
        self._held.clear()

    def lend(self, name: str, params: Sequence[Tensor]) -> None:
        """Moves this objective's gradients into `p.grad`, for backward to add to."""
        mine = self._held.pop(name, {})
        for p in params:
            g = mine.get(p)
            p.grad = None if g is None else placed_like(self._back(g, p).to(p.dtype), p)

    def take(self, name: str | None, params: Sequence[Tensor]) -> int:
        """Moves `p.grad` to this objective, or drops it where `name` is None.

        Returns:
            How many there were.

        Raises:
            TypeError: a gradient is sparse.
            RuntimeError: a gradient was written over that of another objective.
        """
        grads = local_gradients(params)
        sparse = [n for n, g in enumerate(grads) if g is not None and g.is_sparse]
        found = {p: g for p, g in zip(params, grads, strict=True) if g is not None}
        for p in found:
            p.grad = None
        if sparse and name is not None:
            raise TypeError(
                f"objective {name!r} wrote a sparse gradient to parameter {sparse[0]}, but only "
                "dense ones can be combined: make the embedding with sparse=False."
            )
        if name is not None and found:
            for stream in self._streams.values():
                # Those of the objective before are on the host by now, or else they would still
                # take their place on the device.
                stream.synchronize()
            for p, g in found.items():
                found[p] = self._away(_plain(g))
            self._refuse_reused_memory(name, found)
            self._held[name] = found
        return len(found)

    def _refuse_reused_memory(self, name: str, taken: dict[Tensor, Tensor]) -> None:
        for other, held in self._held.items():
            for p, g in taken.items():
                before = held.get(p)
                if before is not None and g.numel() and before.data_ptr() == g.data_ptr():
                    raise RuntimeError(
                        f"objective {name!r} must have gradients of its own, but they were written "
                        f"over those of {other!r}: make DistributedDataParallel with "
                        "gradient_as_bucket_view=False."
                    )

    def scale(self, factor: Tensor) -> None:
        """Multiplies every gradient by a scalar; one in float16 becomes float32, lest it vanish."""
        for stream in self._streams.values():
            stream.synchronize()  # a gradient may still be on its way to the host
        for held in self._held.values():
            for p, g in held.items():
                wide = g.float() if g.dtype == torch.float16 else g
                held[p] = wide * factor.to(device=g.device, dtype=wide.dtype)

    def change(
        self,
        params: Sequence[Tensor],
        function: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    ) -> None:
        """Replaces every parameter's gradients by what the function makes of them.

        Args:
            params: those that have any.
            function: from the gradients by objective, zeros where one has none, to new ones.
        """
        for stream in self._streams.values():
            stream.synchronize()  # a gradient may still be on its way to the host
        changed: dict[str, dict[Tensor, Tensor]] = {name: {} for name in self._held}
        for p in params:
            some = {name: held[p] for name, held in self._held.items() if p in held}
            like = next(iter(some.values()))
            every = {name: some.get(name, torch.zeros_like(like)) for name in self._held}
            given = function(every)
            if not isinstance(given, Mapping):
                raise ValueError(
                    "gradients must be changed to a mapping of tensors by objective, but got "
                    f"{type(given).__name__}."
                )
            for name, g in given.items():
                known = name in changed and isinstance(g, Tensor)
                if not known or g.shape != like.shape or g.device != like.device:
                    got = tuple(g.shape) if isinstance(g, Tensor) else type(g).__name__
                    raise ValueError(
                        f"gradients must be changed to tensors {tuple(like.shape)} of "
                        f"{', '.join(changed)}, but got {got} of {name!r}."
                    )
                changed[name][p] = _plain(g)
        for name, held in changed.items():
            self._held[name].update(held)

    def touched(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The parameters that have a gradient from some objective."""
        some: set[Tensor] = set()
        for held in self._held.values():
            some.update(held)  # takes the hashes over
        return [p for p in params if p in some]

    def get(self, name: str, p: Tensor) -> Tensor | None:
        """One gradient where it waits."""
        return self._held[name].get(p)

    def buckets(self, params: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], Lists]]:
        """The parameters in turn with their K lists of gradients on their own device.

        Gradients that wait on the device come in one bucket. Those on the host come in several, and
        the next bucket travels while the caller works on this one.
        """
        if self.memory != "host":
            yield list(params), self._lists(params)
            return
        chunks = list(self._cut(params))
        devices = {p.device for p in params if p.is_cuda}
        staging = {
            device: _Staging(self._largest(chunks, device), device, self._stream(device))
            for device in devices
        }
        coming = [self._fetch(chunk, staging) for chunk in chunks[:1]]
        for n, chunk in enumerate(chunks):
            coming += [self._fetch(after, staging) for after in chunks[n + 1 : n + 2]]
            there = staging.get(chunk[0].device)
            if there is not None:
                there.wait()
            yield chunk, coming.pop(0)
            if there is not None:
                there.free()

    def _largest(self, chunks: Sequence[Sequence[Tensor]], device: torch.device) -> int:
        """Bytes of the largest bucket that goes to this device."""
        sizes = [
            sum(
                _aligned(held[p].nbytes) for held in self._held.values() for p in chunk if p in held
            )
            for chunk in chunks
            if chunk[0].device == device
        ]
        return max(sizes)

    def _lists(self, params: Sequence[Tensor]) -> Lists:
        rows: Lists = []
        for name in self.objectives:
            held = self._held[name]
            rows.append([held.get(p) for p in params])
        return rows

    def _cut(self, params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        chunk: list[Tensor] = []
        size = 0
        for p in params:
            if chunk and p.device != chunk[0].device:
                yield chunk
                chunk, size = [], 0
            chunk.append(p)
            size += len(self.objectives) * local(p).nbytes
            if size >= self.bucket_bytes:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    # ---- to the host and back; on a CPU both leave a gradient where it is

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]

    def _away(self, g: Tensor) -> Tensor:
        if self.memory == "bfloat16":
            return g.bfloat16()
        if self.memory != "host" or not g.is_cuda:
            return g
        stream = self._stream(g.device)
        stream.wait_stream(torch.cuda.current_stream(g.device))
        with torch.cuda.stream(stream):
            host = torch.empty_like(g, device="cpu", pin_memory=True)
            host.copy_(g, non_blocking=True)
        g.record_stream(stream)
        return host

    def _back(self, g: Tensor, p: Tensor) -> Tensor:
        if g.device == p.device:
            return g
        stream = self._stream(p.device)
        with torch.cuda.stream(stream):  # after the copy that brought it to the host
            there = g.to(p.device, non_blocking=True)
        torch.cuda.current_stream(p.device).wait_stream(stream)
        there.record_stream(torch.cuda.current_stream(p.device))
        return there

    def _fetch(self, params: list[Tensor], staging: Mapping[torch.device, _Staging]) -> Lists:
        rows = self._lists(params)
        there = staging.get(params[0].device)
        if there is None:
            return rows
        moved = list(there.fetch([t for row in rows for t in row if t is not None]))
        return [[None if t is None else moved.pop(0) for t in row] for row in rows]
