"""Accelerate: one process, or several under torchrun or `accelerate launch`.

accelerate launch --num_processes 8 examples/with_accelerate.py --model path/to/model
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from accelerate import Accelerator
from common import batches, load_model, options

from mollm import MOLLMOptimizer
from mollm.distributed.sharding import expect_backward


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Trains, and returns the losses of this process's batches at every step."""
    args = options(argv)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    rank, world_size = accelerator.process_index, accelerator.num_processes
    model, tokenizer = load_model(args.model)
    model = accelerator.prepare(model)
    # The optimizer stays as it is: a prepared one hides the objectives.
    optimizer = MOLLMOptimizer([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    history = []
    for forget, retain in islice(
        batches(tokenizer, accelerator.device, rank, world_size), args.steps
    ):
        optimizer.zero_grad()
        losses = model(forget=forget)
        with optimizer.objective("forget"):
            accelerator.backward(losses["forget"])
        losses |= model(retain=retain)
        with optimizer.objective("kl"):
            accelerator.backward(losses["kl"], retain_graph=True)
        with optimizer.objective("retain"):
            # Through the forward of the KL again: DistributedDataParallel must be told.
            accelerator.backward(expect_backward(model, losses["retain"]))
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
        accelerator.print(history[-1], optimizer.last_step, sep="\n")
    accelerator.end_training()
    return history


if __name__ == "__main__":
    main()
