"""Endless batches of rows, in an order that a seed decides and a checkpoint remembers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from mollm.errors import UsageError

Row = TypeVar("Row")


class EndlessBatches(Generic[Row]):
    """Batches without end: every epoch shuffles the rows anew and visits each once.

    A batch that begins at the end of an epoch goes on in the next one, so that all batches have the
    same size and no row is dropped. The order depends on the rows' number, `seed` and `name`
    alone: however many processes share the batches, together they see the same ones.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        *,
        seed: int,
        name: str = "training",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Begins with the first epoch.

        Args:
            rows: What to draw from.
            batch_size: The rows of a batch, all processes together.
            seed: Decides the order.
            name: Gives samplers of the same seed orders of their own.
            rank: This process, from 0; it gets every batch's rank-th part.
            world_size: The number of processes.

        Raises:
            UsageError: There is no row, or the processes cannot share a batch evenly.
        """
        if not rows:
            raise UsageError(f"the {name} data must hold at least one row, but it holds none.")
        if not 0 <= rank < world_size:
            raise UsageError(
                f"rank must be at least 0 and less than world_size {world_size}, but got {rank}."
            )
        if batch_size < 1 or batch_size % world_size:
            raise UsageError(
                f"batch_size must be a positive multiple of the {world_size} processes, but got "
                f"{batch_size}."
            )
        self._rows = rows
        self._batch_size = batch_size
        self._seed = seed
        self._name = name
        share = batch_size // world_size
        self._share = slice(rank * share, (rank + 1) * share)
        self.epoch = 0
        """How often every row has been drawn."""
        self.index = 0
        """How many rows have been drawn since."""
        self._order = self._shuffled()

    def __iter__(self) -> Iterator[list[Row]]:
        return self

    def __next__(self) -> list[Row]:
        """This process's part of the next batch."""
        drawn = [self._draw() for _ in range(self._batch_size)]
        return [self._rows[i] for i in drawn[self._share]]

    def state_dict(self) -> dict[str, Any]:
        """The position, the same in every process."""
        return self._fixed() | {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position; batch size and number of processes may be others than then.

        Raises:
            UsageError: The position is one in another order.
        """
        for key, value in self._fixed().items():
            if state.get(key) != value:
                raise UsageError(
                    f"{key} of the {self._name} data must be {state.get(key)} as in the "
                    f"checkpoint, but got {value}: resume with the same data and seed."
                )
        epoch, index = state["epoch"], state["index"]
        if not (epoch >= 0 and 0 <= index < len(self._rows)):
            raise UsageError(
                f"the position of the {self._name} data must lie within {len(self._rows)} rows, "
                f"but got epoch {epoch}, index {index}."
            )
        self.epoch, self.index = epoch, index
        self._order = self._shuffled()

    def _fixed(self) -> dict[str, Any]:
        return {"name": self._name, "seed": self._seed, "rows": len(self._rows)}

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._rows)))
        random.Random(f"{self._name} {self._seed} {self.epoch}").shuffle(order)
        return order

    def _draw(self) -> int:
        drawn = self._order[self.index]
        self.index += 1
        if self.index == len(self._rows):
            self.epoch, self.index = self.epoch + 1, 0
            self._order = self._shuffled()
        return drawn


class JointSampler(Generic[Row]):
    """A batch of every set at each step, each set at its own pace."""

    def __init__(self, samplers: Mapping[str, EndlessBatches[Row]]) -> None:
        self.samplers = dict(samplers)

    def __iter__(self) -> Iterator[dict[str, list[Row]]]:
        return self

    def __next__(self) -> dict[str, list[Row]]:
        """This process's part of the next batches, by set."""
        return {name: next(sampler) for name, sampler in self.samplers.items()}

    def state_dict(self) -> dict[str, Any]:
        """All positions."""
        return {name: sampler.state_dict() for name, sampler in self.samplers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to saved positions.

        Raises:
            UsageError: One of them is a position in another order.
        """
        for name, sampler in self.samplers.items():
            sampler.load_state_dict(state[name])
