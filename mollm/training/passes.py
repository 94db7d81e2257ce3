"""Rows through the model: the gradients of a step, and the losses of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mollm.data.chat import Batch, Tokens
from mollm.data.sets import role_of
from mollm.distributed import processes
from mollm.training.objectives import Objectives, count_loss_tokens
from mollm.training.relearning import relearnt, rows_to_relearn
from mollm.training.step import accumulate_forget, accumulate_retain

if TYPE_CHECKING:
    from mollm.optim.optimizer import MOLLMOptimizer
    from mollm.training.config import MOLLMConfig

Rows = Mapping[str, Sequence[Tokens]]
"""Rows of every set by its name."""


@dataclass(frozen=True)
class Passes:
    """The passes of a run; every process makes its share of them.

    Args:
        objectives: The losses.
        args: Of the run.
        collate: Makes a batch of rows, on the device.
        forget: Names of the sets to forget.
        retain: Names of the sets to retain.
        blocks: Through which gradients are streamed, if they are.
    """

    objectives: Objectives
    args: MOLLMConfig
    collate: Callable[[Sequence[Tokens]], Batch]
    forget: Sequence[str]
    retain: Sequence[str]
    blocks: Sequence[nn.Module] = ()

    def accumulate(
        self,
        optimizer: MOLLMOptimizer,
        rows: Rows,
        relearning: AbstractContextManager[None] | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Takes the gradients of all objectives on the rows of a step.

        Args:
            optimizer: Takes them.
            rows: Of all processes.
            relearning: Around the losses on what is to be forgotten, see `relearnt`.
            between: Called between two micro-batches.

        Returns:
            The losses by objective.
        """
        totals = {name: count_loss_tokens(some) for name, some in rows.items()}
        kept = sum(totals[name].tokens for name in self.retain)
        final = self.args.gradient_accumulation_steps - 1
        found: dict[str, list[Tensor]] = {n: [] for n in (*self.forget, "kl", *self.retain)}

        def add(losses: Mapping[str, Tensor]) -> None:
            for name, loss in losses.items():
                found[name].append(loss.double())

        model, blocks = self.objectives, self.blocks
        with relearning or nullcontext():
            for name in self.forget:
                for number, batch in enumerate(self._parts(rows[name])):
                    how = {"name": name, "totals": totals[name], "last": number == final}
                    add(accumulate_forget(model, optimizer, batch, blocks=blocks, **how))
        parts = (self._parts(rows[name]) for name in self.retain)
        for number, batches in enumerate(zip(*parts, strict=True)):
            if number:
                between()
            for name, batch in zip(self.retain, batches, strict=True):
                last = number == final
                how = {"name": name, "totals": totals[name], "last": last}
                how |= {"share": totals[name].tokens / kept}
                how |= {"last_of_kl": last and name == self.retain[-1]}
                add(accumulate_retain(model, optimizer, batch, blocks=blocks, **how))
        sums = processes.all_reduce_sum(
            torch.stack([torch.stack(parts).sum() for parts in found.values()])
        )
        return dict(zip(found, sums.tolist(), strict=True))

    def relearnt(
        self, known: Rows, rows: Rows, *, seed: int, step: int
    ) -> AbstractContextManager[None]:
        """Within it the model has begun to relearn forgotten rows that this step does not see.

        Args:
            known: All rows.
            rows: Those of the step.
            seed: Of the data.
            step: Its number.
        """
        learnt = [
            row
            for name in self.forget
            for row in rows_to_relearn(known[name], rows[name], seed=seed, step=step)
        ]
        totals, size = count_loss_tokens(learnt), self.args.per_device_train_batch_size
        batches = [learnt[start : start + size] for start in range(0, len(learnt), size)]
        params = [p for p in self.objectives.model.parameters() if p.requires_grad]

        def backward() -> None:
            for some, mine in processes.shares(batches):
                losses = self.objectives(relearn=self.collate(some), totals=(totals, totals))
                torch.autograd.backward(losses["relearn"] * mine)
            processes.add_up_gradients(params)

        return relearnt(params, backward, steps=self.args.relearn_steps, lr=self.args.relearn_lr)

    def mean_losses(self, sets: Rows) -> dict[str, float]:
        """The loss of every set by its name, and KL over all that is to be retained."""
        size = self.args.per_device_eval_batch_size
        totals = {name: count_loss_tokens(rows) for name, rows in sorted(sets.items())}
        kept = sum(totals[name].tokens for name in totals if role_of(name) == "retain")
        sums: dict[str, Tensor] = {}
        for name, total in totals.items():
            role, rows = role_of(name), sets[name]
            batches = [rows[start : start + size] for start in range(0, len(rows), size)]
            for some, mine in processes.shares(batches):
                losses = self.objectives(**{role: self.collate(some)}, totals=(total, total))
                for what, loss in losses.items():
                    as_what = "kl" if what == "kl" else name
                    known = sums.setdefault(as_what, torch.zeros_like(loss, dtype=torch.float64))
                    if mine:
                        known += loss * (total.tokens / kept if what == "kl" else 1)
        return {name: float(processes.all_reduce_sum(value)) for name, value in sums.items()}

    def _parts(self, rows: Sequence[Tokens]) -> Iterator[Batch]:
        """This process's share of a step's rows, so many at a time as the device takes."""
        mine = rows[processes.rank() :: self.args.world_size]
        size = len(mine) // self.args.gradient_accumulation_steps
        for start in range(0, len(mine), size):
            yield self.collate(mine[start : start + size])
