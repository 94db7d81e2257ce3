"""`evaluate`: measures a model on a suite, and sums up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mollm.chat import ChatFormat
from mollm.errors import UsageError
from mollm.evaluation.examine import Examiner, Say
from mollm.evaluation.figures import Figure, choose, columns_of, obstacle
from mollm.evaluation.generation import MAX_NEW_TOKENS
from mollm.evaluation.judges import Judge
from mollm.evaluation.suite import TofuSuite
from mollm.evaluation.summary import Evaluation, check_same_questions, summarize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: TofuSuite,
    *,
    names: Sequence[str] | None = None,
    original: PreTrainedModel | None = None,
    judges: Mapping[str, Judge] | None = None,
    batch_size: int = 16,
    max_new_tokens: int = MAX_NEW_TOKENS,
    resamples: int = 1000,
    seed: int = 0,
    say: Say = lambda text: None,
) -> Evaluation:
    """Evaluates a model on a suite, in training too: no gradient, no change of mode or of seeds.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        suite: The sets of questions and, for forget_quality and priv_leak, the retain logs.
        names: Which figures to compute, and nothing that they do not need; None for all that the
            suite and the arguments allow, the others then stand in `missing` with the reason.
        original: The model that unlearning started from, for the KL and the perplexity of replies.
        judges: Judges of replies by the name of their figures, such as {"toxicity": …}.
        batch_size: Rows that pass through the model together.
        max_new_tokens: Where a reply is cut off.
        resamples: Resamples of each confidence interval.
        seed: Of the resampling.
        say: Told what is going on.

    Raises:
        UsageError: A figure that was named cannot be computed, found out before the model runs; or
            the model's output is not finite.
    """
    examiner = Examiner(
        model,
        ChatFormat(tokenizer),
        original=original,
        judges=dict(judges or {}),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        say=say,
    )
    groups = suite.groups()
    check_same_questions(
        {group: [row.question for row in rows] for group, rows in groups.items()},
        suite.retain_logs,
    )
    figures = choose(names, sorted(examiner.judges))
    wanted = _wanted(figures, suite, examiner, strict=names is not None)
    records = [
        record
        for group in groups
        if group in wanted
        for record in examiner.examine(group, groups[group], wanted[group])
    ]
    return summarize(
        records,
        suite.retain_logs,
        names=names,
        judges=sorted(examiner.judges),
        resamples=resamples,
        seed=seed,
    )


def _wanted(
    figures: Sequence[Figure], suite: TofuSuite, examiner: Examiner, *, strict: bool
) -> dict[str, set[str]]:
    """The scores, by set, that the figures need; strict refuses those that cannot be computed."""
    offered = {group: examiner.offers(group) for group in suite.groups()}
    retrained = columns_of(suite.retain_logs or ())
    wanted: dict[str, set[str]] = {}
    for figure in figures:
        reason = obstacle(figure, offered, retrained)
        if reason and strict:
            raise UsageError(reason)
        for need in figure.needs:
            if not reason and not need.retrained:
                wanted.setdefault(need.group, set()).update(need.scores)
    return wanted
