"""General abilities, through EleutherAI's lm-evaluation-harness where it is installed."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mollm.errors import UsageError
from mollm.evaluation.generation import answers_alike_in_company
from mollm.models.forward import in_evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Benchmarks = dict[str, dict[str, float]]


def general_benchmarks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    folder: Path | str | None = None,
    batch_size: int = 16,
    limit: int | None = None,
) -> Benchmarks:
    """Runs tasks of the harness, such as "mmlu" or "hellaswag", as it defines them.

    Args:
        model: A causal language model; its training mode, and the state of all random numbers, are
            put back at the end.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups of tasks; the harness loads their data.
        folder: Where further tasks are defined, in YAML files of the harness's format.
        batch_size: Rows that pass through the model together; of a model that then answers
            otherwise, as recurrent ones do, each passes alone.
        limit: Examples per task; None for all.

    Returns:
        For each task and group its figures by name, such as {"mmlu": {"acc": …, "acc_stderr": …}};
        the name of a filter other than "none" follows a comma. A figure that the harness calls
        "N/A", such as the error of a single example, is left out.

    Raises:
        UsageError: The package is not installed, or a task is not among those it knows.
    """
    manager = find_benchmarks(tasks, folder)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    own_tokenizer = copy.deepcopy(tokenizer)  # the harness may give it a padding token
    with _random_states_kept(), in_evaluation_mode(model):
        size = batch_size if answers_alike_in_company(model) else 1
        wrapped = HFLM(pretrained=model, tokenizer=own_tokenizer, batch_size=size)
        found = simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit, task_manager=manager)
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in figures.items()
            if "," in name and isinstance(value, int | float)
        }
        for task, figures in (found["results"] | found.get("groups", {})).items()
    }


def find_benchmarks(tasks: Sequence[str], folder: Path | str | None = None) -> Any:
    """The harness's index of tasks, which has all of these; needs no model.

    Raises:
        UsageError: As for `general_benchmarks`.
    """
    if not tasks:
        raise UsageError('benchmarks must name at least one task, such as "mmlu", but got none.')
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise UsageError(
            f"general benchmarks need the package {error.name}: pip install 'mollm[harness]'."
        ) from error
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UsageError(
            f"benchmarks must be tasks of lm-evaluation-harness, but got {unknown[0]!r}: "
            "`lm_eval ls tasks` lists them."
        )
    return manager


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """The harness seeds all generators; a run that it is called from must not notice."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
