"""What the optimizer knows of several processes.

A parameter is a DTensor, of which every process holds a part (`torch.distributed.fsdp.fully_shard`,
on meshes of any number of dimensions), or an ordinary tensor, of which every process holds a copy
(`DistributedDataParallel`). A gradient's parts are multiplied and updated where they lie; only sums
of K (K + 1) / 2 or K numbers travel:

    G = Σ over the parts of a sharded gradient + G of the copies, counted once

DistributedDataParallel and FSDP2 both average the processes' gradients. A mean over the answer
tokens of all processes is then the loss whose normalizer is `answer_tokens(target)`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Lists = list[list[Tensor | None]]

_PLAIN = {Tensor, nn.Parameter}
_ALIKE = 1e-5  # relative; copies of one gradient have the same norm on every process


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor."""
    # Whoever has a DTensor has imported this module; others do not pay the half second it takes.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# ---- parts of tensors


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, in the same memory; any other tensor as it is."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def locals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`local` of each."""
    return list(tensors) if _are_plain(tensors) else [local(t) for t in tensors]


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether none can be a DTensor, which is a class of its own."""
    return _PLAIN.issuperset(map(type, tensors))


def local_gradient(p: Tensor) -> Tensor | None:
    """This process's part of `p.grad`, cut as the parameter is."""
    g = p.grad
    if g is None or not is_sharded(p) or not is_sharded(g):
        return g
    if g.placements != p.placements:
        g = g.redistribute(placements=p.placements)
    return local(g)


def local_gradients(params: Sequence[Tensor]) -> list[Tensor | None]:
    """`local_gradient` of each."""
    if _are_plain(params):
        return [p.grad for p in params]
    return [local_gradient(p) for p in params]


def placed_like(part: Tensor, p: Tensor) -> Tensor:
    """The inverse of `local_gradient`: the gradient of p that has this part here."""
    if not is_sharded(p):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


@dataclass(frozen=True)
class Sharding:
    """Over which processes the parts of a tensor lie."""

    mesh: DeviceMesh | None = None
    """None for an ordinary tensor."""
    copies: tuple[bool, ...] = ()
    """For each dimension of the mesh, whether the processes along it hold the same part."""

    @property
    def part(self) -> int:
        """The number of the part that this process holds."""
        if self.mesh is None:
            return 0
        number = 0
        for dim, same in enumerate(self.copies):
            if not same:
                number = number * self.mesh.size(dim) + self.mesh.get_local_rank(dim)
        return number

    def total(self, values: Tensor) -> Tensor:
        """The sum over all parts of what each process computed from its own."""
        if self.mesh is None:
            return values
        values = values.clone()
        for dim, same in enumerate(self.copies):
            if self.mesh.size(dim) > 1:
                # Copies are averaged: the same result, bit for bit, on every process.
                dist.all_reduce(values, group=self.mesh.get_group(dim))
                values = values / self.mesh.size(dim) if same else values
        return values

    def total_gram(self, gram: Tensor) -> Tensor:
        """`total` of a symmetric matrix [K, K], of which K (K + 1) / 2 entries travel."""
        if self.mesh is None:
            return gram
        i, j = torch.triu_indices(*gram.shape, device=gram.device)
        whole = torch.empty_like(gram)
        whole[i, j] = whole[j, i] = self.total(gram[i, j])
        return whole


def sharding_of(p: Tensor) -> Sharding:
    """How a parameter lies."""
    if not is_sharded(p):
        return Sharding()
    return Sharding(p.device_mesh, tuple(placement.is_replicate() for placement in p.placements))


def by_sharding(
    params: Sequence[Tensor], lists: Lists
) -> Iterator[tuple[Sharding, list[Tensor], Lists]]:
    """Parameters and their K lists of gradients, those that lie alike together."""
    if params and _are_plain(params):
        yield Sharding(), list(params), [list(row) for row in lists]
        return
    columns: dict[Sharding, list[int]] = {}
    for n, p in enumerate(params):
        columns.setdefault(sharding_of(p), []).append(n)
    for sharding, mine in columns.items():
        yield sharding, [params[n] for n in mine], [[row[n] for n in mine] for row in lists]


# ---- what is agreed on


def common_seed() -> int:
    """Torch's seed, that of the first process on all of them: copies must round alike."""
    seed = [torch.initial_seed()]
    if world_size() > 1:
        dist.broadcast_object_list(seed)
    return seed[0]


def answer_tokens(target: Tensor, *, ignore_index: int = -100) -> Tensor:
    """How many answer tokens a process has on average, as the `normalizer` of the losses.

    With it, the average of all processes' gradients is the gradient of the mean over all of their
    tokens, however unevenly they lie. Every process must call it.

    Args:
        target: the tokens that this process predicts, of all its micro-batches of this step.
        ignore_index: marks those that do not count.

    Example:
        >>> import torch
        >>> answer_tokens(torch.tensor([[-100, 5, 7], [-100, -100, 3]])).item()  # one process
        3.0
    """
    count = target.ne(ignore_index).sum().double()
    if world_size() > 1:
        dist.all_reduce(count)
    return count / world_size()


def expect_backward(model: nn.Module, loss: Tensor) -> Tensor:
    """The same loss, for a backward that is not the first one since the last forward of `model`.

    DistributedDataParallel averages gradients in one backward after each forward; those of any
    other stay local, silently. This readies it for one more:

        with optimizer.objective("kl"):
            loss_kl.backward(retain_graph=True)
        with optimizer.objective("retain"):
            expect_backward(model, loss_retain).backward()

    `MOLLMOptimizer.backward(losses, model)` does so by itself. Other models, FSDP2's among them,
    need nothing, and nothing is done to them; neither under `no_sync()`.

    Args:
        model: as wrapped; also a module that contains the wrapper.
        loss: of the coming backward.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> loss = layer(torch.ones(2)).sum()
        >>> expect_backward(layer, loss) is loss  # without DistributedDataParallel
        True
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            module.reducer._rebuild_buckets()
            loss = module._post_forward(loss)  # type: ignore[no-untyped-call]
    return loss


# ---- what is refused


def refuse_partitioned(params: Sequence[Tensor]) -> None:
    """Refuses parameters whose parts are not told from whole tensors.

    Raises:
        TypeError: DeepSpeed ZeRO or the first version of FSDP holds one of them.
    """
    for n, p in enumerate(params):
        zero = hasattr(p, "ds_id") or hasattr(p, "ds_tensor")
        if zero or getattr(p, "_is_flat_param", False):
            holder = "DeepSpeed ZeRO" if zero else "FullyShardedDataParallel"
            raise TypeError(
                "params must be ordinary tensors or DTensors, but parameter "
                f"{n} is partitioned by {holder}: shard the model with "
                "torch.distributed.fsdp.fully_shard, or use DistributedDataParallel."
            )


def refuse_unlike_copies(gram: Tensor, objectives: Sequence[str]) -> None:
    """Refuses gradients of ordinary tensors that are not the same on every process.

    Waits for the device and for the other processes of the default group; one process alone
    returns at once.

    Args:
        gram: [K, K], of the ordinary tensors alone.
        objectives: their names.

    Raises:
        RuntimeError: a gradient was not averaged over the processes.
    """
    if world_size() == 1:
        return
    squares = gram.diagonal().nan_to_num(nan=-1, posinf=-1, neginf=-1)
    ends = torch.stack([squares, -squares])
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    most, least = ends[0], -ends[1]
    unlike = (most - least > _ALIKE * most.abs()).tolist()
    names = [name for name, differs in zip(objectives, unlike, strict=True) if differs]
    if names:
        raise RuntimeError(
            f"the gradient of {', '.join(names)} must be the same on all {world_size()} processes, "
            "but it differs: average it with DistributedDataParallel, and where several backwards "
            "follow one forward, call optimizer.backward(losses, model) or "
            "mollm.distributed.expect_backward(model, loss)."
        )
