"""Signs of life: where one process of several dies or hangs, the others end, and say which it was.

Each process counts up a number of its own in the store by which the processes found each other,
and reads those of the others, in a thread and over a connection of its own. A collective that waits
for a process that is gone can wait for `ddp_timeout`, half an hour; here it waits for 40 seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mollm.distributed.sharding import world_size
from mollm.errors import UsageError
from mollm.system.parsing import reason_of

INTERVAL = 2.0
"""Seconds between two signs of life."""
JOINING = 60.0
"""Seconds within which all processes must come."""
PATIENCE = 40.0
"""Seconds without any after which a process counts as dead."""
_LEFT, _FAILED = "left", "failed"
_OF_A_CONNECTION = ("Connection", "connection", "gloo", "NCCL", "Socket", "Timed out", "timed out")


class Watch:
    """The signs of life of this process, and an eye on those of the others.

    Args:
        store: Where they are, by a connection that nobody else uses.
        rank: This process.
        world: The number of processes.
        end: What to do where another one is dead, with a sentence; by default this process ends.
    """

    def __init__(
        self, store: Any, rank: int, world: int, end: Callable[[str], None] | None = None
    ) -> None:
        self._store = store
        self._rank = rank
        self._world = world
        self._end = end or _end
        self._stopped = threading.Event()
        now = time.monotonic()
        self._contact = now  # with the store
        self._seen: dict[int, tuple[str, float]] = {
            other: ("", now) for other in range(world) if other != rank
        }
        self._beat(0)
        for work in (self._exchange, self._look):
            threading.Thread(target=work, name=f"mollm {work.__name__}", daemon=True).start()

    def stop(self, word: str = _LEFT) -> None:
        """Takes leave: from now on the others expect nothing of this process."""
        if not self._stopped.is_set():
            self._stopped.set()
            with contextlib.suppress(RuntimeError):  # the store is gone where its process is
                self._store.set(self._key(self._rank), word)

    def _key(self, rank: int) -> str:
        return f"mollm/alive/{rank}"

    def _beat(self, number: int) -> None:
        self._store.set(self._key(self._rank), str(number))

    def _exchange(self) -> None:
        number = 0
        while not self._stopped.wait(INTERVAL):
            number += 1
            try:
                self._beat(number)
                for other, (known, _) in list(self._seen.items()):
                    key = self._key(other)
                    found = self._store.get(key).decode() if self._store.check([key]) else known
                    if found != known:
                        self._seen[other] = found, time.monotonic()
            except RuntimeError:  # the process that holds the store is gone
                return
            self._contact = time.monotonic()

    def _look(self) -> None:
        while not self._stopped.wait(INTERVAL / 2):
            found = self.verdict()
            if found is not None and not self._stopped.is_set():
                self._end(found)
                return

    def verdict(self) -> str | None:
        """What is wrong with another process, in a sentence, if anything is."""
        now = time.monotonic()
        way_out = (
            f"process {self._rank} ends too: look at what that one printed, and resume from the "
            "last checkpoint with --resume."
        )
        for other, (word, since) in self._seen.items():
            if word == _FAILED:
                return f"process {other} of {self._world} has failed; {way_out}"
            # Nothing is heard of anybody where the store is gone.
            heard = now if now - self._contact < 3 * INTERVAL else self._contact
            if word != _LEFT and heard - since > PATIENCE:
                return (
                    f"process {other} of {self._world} has died or hangs: it gave no sign of life "
                    f"for {PATIENCE:.0f} s; {way_out}"
                )
        holder = 0 if self._rank else None
        if holder is not None and now - self._contact > PATIENCE:
            if self._seen[holder][0] == _LEFT:
                return None
            return (
                f"process {holder} of {self._world}, or the launcher, has died or hangs: nothing "
                f"was heard of it for {PATIENCE:.0f} s; {way_out}"
            )
        return None


def await_others() -> None:
    """Waits for the processes that are to be a group, where no launcher watches over them.

    Torch would wait for half an hour for one that died before it came. After JOINING seconds this
    process ends, with a sentence that names who is missing.
    """
    global _meeting
    ours = [os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")]
    launched = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun ends all when one ends
    if None in ours or launched or _meeting is not None or dist.is_initialized():
        return
    size, number, address, port = map(str, ours)
    if not (size.isdecimal() and number.isdecimal() and port.isdecimal()) or int(size) < 2:
        return
    rank, world, way_out = int(number), int(size), "look at what it printed, and start all anew."
    patience = timedelta(seconds=JOINING)
    try:
        # Of many tenants: Torch's own store, made later, listens at the same port.
        _meeting = dist.TCPStore(  # type: ignore[attr-defined]
            address, int(port), world, rank == 0, patience, wait_for_workers=False,
            multi_tenant=True,
        )  # fmt: skip
        _meeting.set(f"mollm/here/{rank}", "")
        end = time.monotonic() + JOINING
        missing = [other for other in range(world) if other != rank]
        while missing := [n for n in missing if not _meeting.check([f"mollm/here/{n}"])]:
            if time.monotonic() > end:
                names = ", ".join(map(str, missing))
                _end(f"process {names} of {world} did not come within {JOINING:.0f} s: {way_out}")
                return
            time.sleep(0.1)
    except RuntimeError as error:  # the store of the first process is not there, or no more
        _end(f"process 0 of {world} is not there ({reason_of(error, 100)}): {way_out}")


_meeting: Any = None
_watch: Watch | None = None


def watch() -> None:
    """Begins to give and to watch signs of life, where there are several processes.

    All of them must call it; once is enough.
    """
    global _watch
    if world_size() == 1 or _watch is not None:
        return
    store: Any = dist.distributed_c10d._get_default_store()
    _watch = Watch(store.clone(), dist.get_rank(), world_size())
    atexit.register(_leave)


def unwatch() -> None:
    """Takes leave of the others."""
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None


@contextlib.contextmanager
def blaming_the_dead() -> Iterator[None]:
    """A connection that breaks inside is told as what it is: a process that is gone.

    It waits for the signs of life to stop, so that the sentence names the right one.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        broken = any(word in str(error) for word in _OF_A_CONNECTION)
        if _watch is not None and broken:
            time.sleep(PATIENCE + 4 * INTERVAL)  # the watch ends this process before
        raise


def _leave() -> None:
    if _watch is not None:
        _watch.stop(_FAILED if getattr(sys, "last_value", None) is not None else _LEFT)


def _end(sentence: str) -> None:
    print(f"mollm: {sentence}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)  # a thread that waits in a collective hears of nothing else
