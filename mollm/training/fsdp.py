"""A model cut into parts over the processes, from the first one that read it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mollm.distributed.processes import all_gather, placed, rank
from mollm.distributed.sharding import world_size
from mollm.errors import UsageError
from mollm.system.precision import compute_dtype


def shard(
    module: nn.Module, device: torch.device, *, hybrid: bool = False, from_first: bool = False
) -> None:
    """Cuts the parameters inside a module of losses over the processes with FSDP2.

    Each decoder layer is a group of its own, everything else is another one. A group is gathered
    for its forward and for every backward alone: outside of these a parameter always is its part.
    Where the device computes in bfloat16 natively, so does the model, and gradients are added up
    in float32. They are sums over the processes, not means.

    Args:
        module: `mollm.training.objectives.Objectives`, on any device; it moves to `device`.
        device: Of this process.
        hybrid: Cut over the processes of a node and copy over the nodes, in place of a cut over
            all; under torchrun, which says how many a node has.
        from_first: The first process alone holds the values; those of the others are on the meta
            device. A tensor at a time goes to all of them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(device.type, (world_size(),))
    if hybrid:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        shape, names = (world_size() // local, local), ("copies", "parts")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    dtype = compute_dtype(device).dtype
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32)
    kinds = {k for m in module.modules() for k in getattr(m, "_no_split_modules", None) or ()}
    layers = [m for m in module.modules() if type(m).__name__ in kinds]
    if from_first:
        _take_memory(module, _layout_of_the_first(module))
    whole = {name: t.detach() for name, t in _tensors(module)} if from_first else {}
    for group in (*layers, module):
        fully_shard(group, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        assert isinstance(group, FSDPModule), "fully_shard changes the class"
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(module, "states")
    if from_first:
        _hand_out(whole, module, device)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _layout_of_the_first(module: nn.Module) -> list[tuple[torch.dtype, bool]]:
    """Dtype and requires_grad of the first process's tensors.

    A model that is read may differ in both from one that is made of its configuration.

    Raises:
        UsageError: Names or shapes are not the same on all processes.
    """
    shapes = [(name, tuple(t.shape)) for name, t in _tensors(module)]
    kinds = [(t.dtype, t.requires_grad) for _, t in _tensors(module)]
    layouts = all_gather((shapes, kinds))
    if any(others != layouts[0][0] for others, _ in layouts):
        raise UsageError(
            "all processes must be given the same model, but its tensors are not the same on all."
        )
    found: list[tuple[torch.dtype, bool]] = layouts[0][1]
    return found


def _take_memory(module: nn.Module, layout: Sequence[tuple[torch.dtype, bool]]) -> None:
    """Gives memory to tensors on the meta device; what is never written takes none in fact."""
    made: dict[int, Tensor] = {}
    for (_, t), (dtype, trains) in zip(_tensors(module), layout, strict=True):
        if t.is_meta:
            new = torch.empty(t.shape, dtype=dtype)
            made[id(t)] = nn.Parameter(new, trains) if isinstance(t, nn.Parameter) else new
    for part in module.modules():
        every: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for slots in every:
            for name, t in slots.items():
                if t is not None and t.is_meta:
                    slots[name] = made[id(t)]  # tied ones stay tied


@torch.no_grad()
def _hand_out(whole: Mapping[str, Tensor], module: nn.Module, device: torch.device) -> None:
    """Puts the first process's tensors into everybody's module, as far as each has a part."""
    for name, mine in _tensors(module):
        sent = torch.empty(mine.shape, dtype=mine.dtype, device=device)
        if rank() == 0:
            sent.copy_(whole[name])
        dist.broadcast(sent, 0)
        mine.copy_(placed(sent, mine))
