"""FSDP2: parameters, gradients and optimizer state in parts, one on each GPU.

torchrun --standalone --nproc-per-node 8 examples/fsdp2.py --model path/to/model
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice

import torch
import torch.distributed as dist
from common import batches, load_model, options
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mollm import MOLLMOptimizer


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Trains, and returns the losses of this process's batches at every step."""
    args = options(argv)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # HSDP: init_device_mesh(kind, (nodes, gpus), mesh_dim_names=("copies", "parts"))
    mesh = init_device_mesh(kind, (world_size,))

    policy = MixedPrecisionPolicy()
    if kind == "cuda":
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)

    model, tokenizer = load_model(args.model)
    for layer in [*model.model.model.layers, *model.reference.model.model.layers]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # Embeddings, norms and heads, which the losses need, run inside.
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to(device)
    optimizer = MOLLMOptimizer([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    history = []
    for forget, retain in islice(batches(tokenizer, device, rank, world_size), args.steps):
        optimizer.zero_grad()
        losses = model(forget, retain)
        optimizer.backward(losses)
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
        if rank == 0:
            print(history[-1], optimizer.last_step, sep="\n")
    dist.destroy_process_group()
    return history


if __name__ == "__main__":
    main()
