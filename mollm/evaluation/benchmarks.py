"""General abilities, through EleutherAI's lm-evaluation-harness where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mollm.errors import UsageError
from mollm.models import in_evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def general_benchmarks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 16,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Runs tasks of the harness, such as "mmlu" or "hellaswag", as it defines them.

    Args:
        model: A causal language model; its training mode is put back at the end.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups of tasks; the harness loads their data.
        batch_size: Rows that pass through the model together.
        limit: Examples per task; None for all.

    Returns:
        For each task and group its figures by name, such as {"mmlu": {"acc": …, "acc_stderr": …}};
        the name of a filter other than "none" follows a comma.

    Raises:
        UsageError: The package is not installed, or no task is named.
    """
    if not tasks:
        raise UsageError('tasks must name at least one task, such as "mmlu", but got none.')
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as error:
        raise UsageError(
            f"general benchmarks need the package {error.name}: pip install 'lm_eval[hf]'."
        ) from error
    with in_evaluation_mode(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit)
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in figures.items()
            if isinstance(value, int | float)
        }
        for task, figures in (found["results"] | found.get("groups", {})).items()
    }
