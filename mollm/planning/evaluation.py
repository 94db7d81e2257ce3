"""The memory of `mollm evaluate`, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mollm.planning.memory import OVERHEAD_BYTES, Stage, chunk_rows
from mollm.planning.settings import PlanSettings
from mollm.planning.shapes import Shape

BATCH_SIZE = 16
REPLY = 200
"""Examples that go together, and tokens of a reply, as `mollm evaluate` has them by default."""
_SCORED_ELEMENTS = 1 << 24
_SCORED_ARRAYS = 6
"""Logits that are scored at a time, and how many arrays of them: see `mollm.evaluation.scores`."""
_KL_ARRAYS = 2
_NEXT_ARRAYS = 4
"""Logits of the next token in `generate`: in the weights' dtype, in float32, and their choice."""


@dataclass(frozen=True)
class EvaluationPlan:
    """The predicted memory of an evaluation with the original beside the model."""

    stages: tuple[Stage, ...]
    """In the order of an evaluation."""

    @property
    def peak(self) -> Stage:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.total)


def plan_evaluation(
    shape: Shape, settings: PlanSettings, *, batch_size: int = BATCH_SIZE, reply: int = REPLY
) -> EvaluationPlan:
    """Predicts the memory of an evaluation.

    Both models are there throughout, with their weights in the dtype of the settings and, as in an
    evaluation, products in the same one. Judges and benchmarks are not counted.

    Args:
        shape: The model.
        settings: Of which the device, the dtype and the longest row count.
        batch_size: Examples that go together.
        reply: The most tokens of a reply.

    Example:
        >>> from mollm.planning.shapes import shape_named
        >>> plan = plan_evaluation(shape_named("smollm2-135m"), PlanSettings(device="cuda"))
        >>> [stage.name for stage in plan.stages]
        ['scoring answers', 'KL to the original', 'replies']
    """
    r, tokens = settings.weight_bytes, batch_size * settings.sequence_length
    lasting = {
        "parameters": shape.parameters * r,
        "original": shape.parameters * r,
        "overhead": OVERHEAD_BYTES[settings.device],
    }
    layer = tokens * _layer(shape, r)
    states = tokens * shape.hidden * r
    scored = min(_SCORED_ELEMENTS, tokens * shape.vocab) * 4 * _SCORED_ARRAYS
    chunk = chunk_rows(shape, replace(settings, batch_size=batch_size), 2)
    compared = chunk * shape.vocab * 4 * _KL_ARRAYS
    keys = 2 * shape.num_layers * shape.keys * r  # of a token, in all layers
    cached = batch_size * (settings.sequence_length + reply) * keys
    moments: tuple[tuple[str, dict[str, int]], ...] = (
        ("scoring answers", {"activations": states + max(layer, scored)}),
        ("KL to the original", {"activations": 2 * states + max(layer, compared)}),
        (
            "replies",
            {
                "activations": max(states + layer, batch_size * shape.vocab * 4 * _NEXT_ARRAYS),
                "keys and values": cached,
            },
        ),
    )
    return EvaluationPlan(tuple(Stage(name, lasting | parts) for name, parts in moments))


def _layer(shape: Shape, size: int) -> int:
    """Bytes of a token at the fullest moment of a decoder layer whose activations are not kept."""
    attention = 3 * shape.query + 2 * shape.hidden
    mlp = 3 * shape.intermediate + 2 * shape.hidden
    return size * (shape.hidden + max(attention, mlp)) + 4 * shape.hidden
