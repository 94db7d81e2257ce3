"""What a training loop asks of several processes; with one alone, nothing happens.

Two ways to share a step:

    copies   Every process holds the whole model. The gradients of its own rows are added up over
             the processes once a step and objective, after the last micro-batch.
    parts    FSDP2: every process holds a part of each parameter. Layers are gathered when they
             run, and their gradients added up and cut into parts in every backward.

Copies go without DistributedDataParallel. Its reducer averages in one backward after each forward
of the wrapped module, where a step of three gradients has two backwards through one forward, and
accumulation needs yet another switch; both can fail silently. All it would save is the time in
which sums could travel while backward still runs: with adapters next to nothing, and a model with
gradients so large that it matters is better cut into parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mollm.distributed.sharding import is_sharded, world_size
from mollm.distributed.watch import unwatch
from mollm.errors import UsageError

Item = TypeVar("Item")


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Goes on when all processes have come here."""
    if world_size() > 1:
        dist.barrier()


def stop() -> None:
    """Takes leave of the other processes."""
    unwatch()
    if world_size() > 1:
        dist.destroy_process_group()


# ---- the same everywhere


def all_gather(value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """A mistake of the user's that one process finds becomes that of all.

    Inside, processes must not wait for each other.

    Raises:
        UsageError: one was raised inside, here or on another process.
    """
    error: UsageError | None = None
    try:
        yield
    except UsageError as found:
        error = found
    told = all_gather(None if error is None else str(error))
    if error is not None:
        raise error
    for text in told:
        if text is not None:
            raise UsageError(text)


@contextlib.contextmanager
def on_rank_zero(context: contextlib.AbstractContextManager[Item]) -> Iterator[Item | None]:
    """Enters a context on the first process; the others get None, and all go on together.

    Raises:
        UsageError: one was raised inside, or by the context, here or on another process.
    """
    with raise_on_all_ranks():
        if rank() == 0:
            with context as value:
                yield value
        else:
            yield None


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of the processes' values, the same on all of them."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def shares(items: Sequence[Item]) -> Iterator[tuple[Item, bool]]:
    """This process's share of the items, as many as every other process gets.

    Where they do not go round, some processes get an item that another one has too, with False:
    models in parts run only on all processes at once.
    """
    world, last = world_size(), len(items) - 1
    for first in range(0, len(items), world):
        mine = first + rank()
        yield items[min(mine, last)], mine <= last


# ---- gradients of copies


def add_up_gradients(params: Sequence[Tensor]) -> None:
    """Makes `p.grad` of every ordinary parameter its sum over the processes.

    Those of DTensors are sums already, see `shard`. A parameter without a gradient on this process
    alone counts as zero here. All processes must call it, with the same parameters.
    """
    mine = [p for p in params if p.requires_grad and not is_sharded(p)]
    if world_size() == 1 or not mine:
        return
    for p, g in zip(mine, _sums([p.grad for p in mine], mine), strict=True):
        p.grad = g


def add_up_lists(params: Sequence[Tensor], lists: Sequence[list[Tensor | None]]) -> None:
    """The same for lists of gradients of ordinary parameters, in place of `p.grad`."""
    if world_size() == 1 or not params:
        return
    for row in lists:
        row[:] = _sums(row, params)


def _sums(gradients: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
    """Over the processes; None only for a parameter that has no gradient on any of them."""
    reached = torch.tensor([g is not None for g in gradients], device=params[0].device).byte()
    dist.all_reduce(reached, dist.ReduceOp.MAX)
    sums: list[Tensor | None] = []
    work = []
    for p, g, somewhere in zip(params, gradients, reached.tolist(), strict=True):
        if somewhere:
            g = torch.zeros_like(p) if g is None else g.contiguous()
            work.append(dist.all_reduce(g, async_op=True))
        sums.append(g)
    for one in work:
        one.wait()
    return sums


# ---- parts


def gathered(tree: Any) -> Any:
    """Nested dicts, lists and tuples with every DTensor whole, on the CPU of the first process.

    The others get None in its place; all must call it.
    """
    if isinstance(tree, Mapping):
        return {key: gathered(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value) for value in tree)
    if not isinstance(tree, Tensor) or not is_sharded(tree):
        return tree
    whole = tree.full_tensor()
    return whole.cpu() if rank() == 0 else None


def placed(whole: Tensor, p: Tensor) -> Tensor:
    """A whole tensor, cut as the parameter of the same shape is: a DTensor, or itself."""
    if not is_sharded(p):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def placed_state(state: Mapping[str, Any], params: Sequence[Tensor]) -> dict[str, Any]:
    """The state dict of a MOLLMOptimizer, its whole tensors cut as the parameters are.

    Args:
        state: As `state_dict()` gives it, with `gathered` tensors.
        params: The optimizer's parameters, in its order.
    """

    def cut(value: Any, n: int) -> Any:
        fits = isinstance(value, Tensor) and value.shape == params[n].shape
        return placed(value, params[n]) if fits else value

    slots = {
        n: {name: cut(value, n) for name, value in slot.items()}
        for n, slot in state["state"].items()
    }
    mine = dict(state["mollm"])
    if "means" in mine:
        held = {
            name: {n: cut(mean, n) for n, mean in row.items()}
            for name, row in mine["means"]["held"].items()
        }
        mine["means"] = {**mine["means"], "held": held}
    return {**state, "state": slots, "mollm": mine}
