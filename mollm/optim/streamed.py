"""Gradients of K objectives that are never held as a whole: made block by block, as often as read.

    sweep 1    from the last block to the first: K gradients of the block, its part of the Gram
               matrix G (AdamW's second moment after the step depends on gradients alone)
    solve      w = rule(G); if G is not finite, nothing has been written
    sweep 2    the same gradients again; state and parameters of the block change at once

With a Gram matrix of each block's own there is one sweep, in which a block changes at once.

The numbers are those of the plain step. See `mollm.models.tape` for how a sweep is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from mollm.distributed.processes import add_up_lists, all_reduce_sum
from mollm.distributed.sharding import Lists, is_sharded, world_size
from mollm.errors import UsageError
from mollm.models.slices import whole_of
from mollm.models.tape import Tape
from mollm.optim.constants import STREAMED
from mollm.optim.gradients import GradientStore
from mollm.optim.groups import columns_of

Bucket = tuple[list[Tensor], Lists]
"""Parameters, or some rows of one, with their K lists of gradients."""


class StreamedGradients(GradientStore):
    """What `GradientStore` is, for gradients that a tape makes when they are asked for.

    Args:
        objectives: Their names, in the order of the Gram matrix.
    """

    def __init__(self, objectives: Sequence[str]) -> None:
        super().__init__(objectives, STREAMED)
        self._tape: Tape | None = None
        self._recorded: set[str] = set()
        self._seen: dict[Tensor, None] = {}
        self._add_up = False

    def __contains__(self, name: str) -> bool:
        return name in self._recorded

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_tape": None, "_recorded": set(), "_seen": {}}

    def clear(self) -> None:
        """Lets go of the tape."""
        super().clear()
        self._tape = None
        self._recorded.clear()
        self._seen.clear()

    @contextmanager
    def recording(
        self, blocks: Sequence[nn.Module], params: Sequence[Tensor], *, add_up: bool
    ) -> Iterator[None]:
        """Inside, forward passes of the blocks are recorded for the coming step."""
        copies = not all(is_sharded(p) for p in params)
        if copies and world_size() > 1 and not add_up:
            raise UsageError(
                f"add_up must be True with gradient_memory {STREAMED!r} in several processes, "
                f"but got False in {world_size()}: DistributedDataParallel averages no gradient "
                "that is streamed, so make each loss a share of one mean."
            )
        self._add_up = add_up
        if self._tape is None:
            self._tape = Tape(blocks, params, len(self.objectives))
        elif self._tape.blocks != tuple(blocks):
            raise ValueError(
                "blocks must be the same throughout a step, but got others than before: call "
                "step() or zero_grad() first."
            )
        with self._tape.recording():
            yield

    def record(self, losses: Mapping[str, Tensor]) -> None:
        """Takes what a sweep needs of these losses, and frees their graphs.

        Raises:
            RuntimeError: Nothing was recorded, or a loss depends on no parameter.
        """
        tape = self._tape
        if tape is None:
            raise RuntimeError(
                "backward() found no recorded pass: with gradient_memory='streamed', compute the "
                "losses inside `with optimizer.streamed(blocks)`."
            )
        last = list(losses)[-1]
        try:
            for name, loss in losses.items():
                number = self.objectives.index(name)
                if not tape.record(number, loss, keep_graph=name != last):
                    raise RuntimeError(
                        f"objective {name!r} got no gradient: its loss must depend on the "
                        "optimizer's parameters."
                    )
                self._recorded.add(name)
        except BaseException:
            self.clear()  # half of a micro-batch may be in it
            raise

    def touched(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The parameters that have a gradient from some objective, as far as a sweep has told."""
        return [p for p in params if p in self._seen]

    def non_finite_elements(self) -> Tensor:
        """How many there are of each objective in what a sweep begins with, [K]; of all processes
        together."""
        assert self._tape is not None, "a step has losses"
        counts = self._tape.non_finite_elements()
        return all_reduce_sum(counts)

    def buckets(self, params: Sequence[Tensor]) -> Iterator[Bucket]:
        """All parameters block by block, whatever `params` are; at the end those outside of the
        blocks, of which large matrices come some rows at a time."""
        for buckets in self.blocks():
            yield from buckets()

    def blocks(self) -> Iterator[Callable[[], Iterable[Bucket]]]:
        """The same by blocks: of each what gives its buckets as often as it is called, until the
        next one is asked for. What is outside of all blocks is one block more."""
        assert self._tape is not None, "a step has losses"
        tape, complete = self._tape, _add_up_copies if self._add_up else None

        def ends() -> Iterator[Bucket]:
            for some, rows in tape.ends(complete):
                self._seen.update((whole_of(p), None) for p in some)
                yield some, rows

        for bucket in tape.sweep(complete):
            self._seen.update(dict.fromkeys(bucket[0]))
            yield lambda bucket=bucket: [bucket]  # type: ignore[misc]
        yield ends


def _add_up_copies(params: list[Tensor], rows: Lists) -> None:
    """Sums over the processes, but for parameters in parts, which FSDP2 has added up."""
    columns = [n for n, p in enumerate(params) if not is_sharded(p)]
    lists = columns_of(rows, columns)
    add_up_lists([params[n] for n in columns], lists)
    for row, mine in zip(rows, lists, strict=True):
        for n, g in zip(columns, mine, strict=True):
            row[n] = g


def make_store(objectives: Sequence[str], memory: str) -> GradientStore:
    """The store for a gradient_memory."""
    return (
        StreamedGradients(objectives) if memory == STREAMED else GradientStore(objectives, memory)
    )
