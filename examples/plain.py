"""A plain Torch loop, in one process or, under torchrun, in several.

python examples/plain.py --model path/to/model
torchrun --standalone --nproc-per-node 8 examples/plain.py --model path/to/model
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice

import torch
import torch.distributed as dist
from common import batches, load_model, options
from torch.nn.parallel import DistributedDataParallel

from mollm import MOLLMOptimizer


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Trains, and returns the losses of this process's batches at every step."""
    args = options(argv)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    model, tokenizer = load_model(args.model)
    model.to(device)
    if world_size > 1:
        dist.init_process_group()
        model = DistributedDataParallel(model)
    optimizer = MOLLMOptimizer([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    history = []
    for forget, retain in islice(batches(tokenizer, device, rank, world_size), args.steps):
        optimizer.zero_grad()
        losses = model(forget, retain)
        # KL and retain share a forward: DistributedDataParallel must be told of each backward.
        optimizer.backward(losses, model)
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
        if rank == 0:
            print(history[-1], optimizer.last_step, sep="\n")
    if world_size > 1:
        dist.destroy_process_group()
    return history


if __name__ == "__main__":
    main()
