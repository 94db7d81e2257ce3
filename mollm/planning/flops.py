"""The floating-point operations of a training step.

    a layer's pass = tokens x (2 (matrix parameters that a token meets) + 4 T (queries' width))

A step runs forward once per side, backward once per objective at twice that (once under LoRA, which
takes no gradient of the weights), the original's forward, and what checkpointing and streaming
compute again. The head meets answer tokens alone; where its streamed gradients are made in slices,
it projects once more for each of two passes over these. Updates and elementwise work are left out.
"""

from __future__ import annotations

from mollm.planning.memory import matrices_in_slices
from mollm.planning.settings import PlanSettings
from mollm.planning.shapes import Shape


def step_flops(shape: Shape, settings: PlanSettings) -> float:
    """Of one process; the formula is the module's."""
    forget, retain = settings, settings.of_retain_batch
    backward = 1 if settings.lora_rank else 2
    again: float = int(settings.gradient_checkpointing)
    sides = 1 + settings.further_sets
    if settings.streams:
        again = sweeps_in_full(shape, settings)
        of_forget = sides * (1 + again * (1 + backward))
        of_retain = 1 + again * (1 + 2 * backward)
    else:
        of_forget = sides * (1 + backward + again)
        of_retain = 1 + 2 * (backward + again)
    of_forget += settings.relearning_passes * (1 + backward + again)
    of_retain += settings.reference != "cache"
    layers = of_forget * _layers_pass(shape, forget) + of_retain * _layers_pass(shape, retain)
    if matrices_in_slices(shape, settings):
        at_head, again_at_head = 1, 2 * 2  # projection and gradient, for Gram matrix and update
    else:
        at_head, again_at_head = 1 + settings.trains_head, 0
    losses = sides + settings.relearning_passes
    each = 1 + at_head + again_at_head
    head = losses * each * forget.answers + 2 * each * retain.answers
    return float(settings.accumulation * (layers + head * 2 * shape.embedding))


def sweeps_in_full(shape: Shape, settings: PlanSettings) -> float:
    """How often a step that streams computes all layers again: the second sweep leaves out one."""
    return 1 + (settings.sweeps - 1) * (1 - 1 / shape.num_layers)


def _layers_pass(shape: Shape, settings: PlanSettings) -> int:
    """FLOPs of one forward pass of a batch through all layers."""
    matrices = 2 * (shape.active + settings.lora_rank * shape.sides)
    attention = 4 * settings.sequence_length * shape.query * shape.num_layers
    return settings.tokens * (matrices + attention)
