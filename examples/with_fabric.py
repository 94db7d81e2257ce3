"""Lightning Fabric: one process, or several with its own launcher or torchrun.

fabric run --accelerator cuda --devices 8 --strategy ddp examples/with_fabric.py
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice

from common import batches, load_model, options
from lightning_fabric import Fabric

from mollm import MOLLMOptimizer
from mollm.distributed.sharding import expect_backward


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Trains, and returns the losses of this process's batches at every step."""
    args = options(argv)
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fabric = Fabric(devices=devices, strategy="ddp" if devices > 1 else "auto")
    fabric.launch()
    model, tokenizer = load_model(args.model)
    model = fabric.setup_module(model)
    # The optimizer stays as it is: Fabric's wrapper hides the objectives.
    optimizer = MOLLMOptimizer([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    history = []
    for forget, retain in islice(
        batches(tokenizer, fabric.device, fabric.global_rank, fabric.world_size), args.steps
    ):
        optimizer.zero_grad()
        losses = model(forget=forget)
        with optimizer.objective("forget"):
            fabric.backward(losses["forget"])
        losses |= model(retain=retain)
        with optimizer.objective("kl"):
            fabric.backward(losses["kl"], retain_graph=True)
        with optimizer.objective("retain"):
            # Through the forward of the KL again: DistributedDataParallel must be told.
            fabric.backward(expect_backward(model, losses["retain"]))
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
        fabric.print(history[-1], optimizer.last_step, sep="\n")
    return history


if __name__ == "__main__":
    main()
