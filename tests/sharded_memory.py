"""The peak of a step of a model in shards, as two gloo processes allocate it.

For tests/planning/test_sharded_memory.py.
"""

from __future__ import annotations

import traceback

import launch
import tiny
import torch
import torch.distributed as dist
from allocated import peak_of

from mollm import MOLLMOptimizer, find_blocks
from mollm.data.chat import Batch
from mollm.models.forward import freeze_embeddings
from mollm.planning.settings import PlanSettings
from mollm.system import precision
from mollm.training.fsdp import shard
from mollm.training.objectives import Objectives
from mollm.training.reference_model import CopyReference
from mollm.training.step import accumulate

WORLD = 2
ROWS, LENGTH = 4, 192
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def settings(gram, dtype):
    return PlanSettings(
        batch_size=ROWS,
        sequence_length=LENGTH,
        compute_dtype=dtype,
        device="cpu",
        freeze_embeddings=True,
        gradient_memory="streamed",
        gram=gram,
        shards=WORLD,
    )


def measured(gram, dtype):
    """Bytes that a step allocates at most, beyond what was there before; the least of three steps,
    for gloo's threads let go of what was gathered when they come to it."""
    with precision.computing_in(dtype):
        model = tiny.model(**SIZES)
        freeze_embeddings(model)
        blocks = find_blocks(model)
        objectives = Objectives(model, CopyReference(model))
        shard(objectives, torch.device("cpu"))
        optimizer = MOLLMOptimizer(
            [p for p in model.parameters() if p.requires_grad],
            gradient_memory="streamed",
            gram=gram,
        )
        ids = torch.randint(3, SIZES["vocab_size"], (2, ROWS, LENGTH))
        mask = torch.ones_like(ids[0])
        mask[0, -3:] = 0
        pair = [Batch(rows, mask, rows.masked_fill(mask == 0, -100)) for rows in ids]

        def step():
            accumulate(objectives, optimizer, *pair, blocks=blocks)
            optimizer.step()

        step()
        return min(peak_of(step) for _ in range(5))


def _work(cases):
    torch.manual_seed(dist.get_rank())
    found = {}
    for case in cases:
        try:
            found[case] = measured(*case)
        except Exception:
            found[case] = traceback.format_exc()
            break
    return found


def run(folder, cases):
    """What every process measured, by case."""
    return launch.in_processes(_work, WORLD, folder, cases)
