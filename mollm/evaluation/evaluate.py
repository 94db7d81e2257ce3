"""`evaluate`: measures a model on a suite, and sums up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mollm.data.chat import ChatFormat
from mollm.errors import UsageError
from mollm.evaluation.examine import Examiner, Say, offers
from mollm.evaluation.generation import MAX_NEW_TOKENS
from mollm.evaluation.judges import Judge
from mollm.evaluation.registry import choose, columns_of, missing_input
from mollm.evaluation.suite import Suite
from mollm.evaluation.summary import Evaluation, check_same_questions, summarize
from mollm.models.logits import check_logits
from mollm.system.precision import computing_in
from mollm.system.terminal import Done, quietly

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Show = Callable[[int], contextlib.AbstractContextManager[Done]]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    *,
    names: Sequence[str] | None = None,
    original: PreTrainedModel | None = None,
    judges: Mapping[str, Judge] | None = None,
    batch_size: int = 16,
    max_new_tokens: int = MAX_NEW_TOKENS,
    resamples: int = 1000,
    seed: int = 0,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    say: Say = lambda text: None,
    show: Show | None = None,
) -> Evaluation:
    """Evaluates a model on a suite, in training too: no gradient, no change of mode or of seeds.

    The forward passes compute in the dtype of the weights, where these have one in common: in
    float32 batches and padding change nothing but the last digits.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        suite: The sets of questions and, for forget_quality and privleak, the retain logs.
        names: Which figures to compute, and nothing that they do not need; None for all that the
            suite and the arguments allow, the others then stand in `missing` with the reason.
        original: The model that unlearning started from, for the KL and the perplexity of replies.
        judges: Judges of replies by the name of their figures, such as {"toxicity": …}.
        batch_size: Rows that pass through the model together.
        max_new_tokens: Where a reply is cut off.
        resamples: Resamples of each confidence interval.
        seed: Of the resampling.
        system_prompt: Of conversations that have none of their own.
        chat_template_kwargs: Options of the chat template, such as {"enable_thinking": False}.
        say: Called with a line of progress.
        show: Called with how much there is to do; gives a context in which what it returns is
            called with how much more is done.

    Raises:
        UsageError: A figure that was named cannot be computed, an option is out of range, or a row
            does not fit into the model's context, found out before the model runs; the model's
            logits cannot be computed from its hidden states, see `mollm.models.logits`; or its
            output is not finite.
    """
    judges = dict(judges or {})
    wanted = wanted_scores(
        suite,
        names=names,
        original=original is not None,
        judges=judges,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        resamples=resamples,
    )
    chat = ChatFormat.of(
        model,
        tokenizer,
        template_kwargs=chat_template_kwargs,
        system_prompt=system_prompt,
    )
    if chat.note is not None:
        say(chat.note)
    examiner = Examiner(
        model,
        chat,
        original=original,
        judges=judges,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        say=say,
    )
    groups = {
        group: examiner.fitted(group, rows, wanted[group])
        for group, rows in suite.groups().items()
        if group in wanted
    }
    for group, rows in groups.items():
        examiner.check(group, rows, wanted[group])
    of_one_dtype = all(_has_one_dtype(m) for m in (model, original) if m is not None)
    total = sum(examiner.work(rows, wanted[group]) for group, rows in groups.items())
    with (
        computing_in("float32") if of_one_dtype else contextlib.nullcontext(),
        contextlib.nullcontext(quietly) if show is None else show(total) as done,
    ):
        examiner = replace(examiner, done=done)
        for each in (model, original):
            if each is not None:
                check_logits(each)
        records = [
            record
            for group, rows in groups.items()
            for record in examiner.examine(group, rows, wanted[group])
        ]
    say("Computing figures and intervals …")
    return summarize(
        records,
        suite.retain_logs,
        names=names,
        judges=sorted(judges),
        resamples=resamples,
        seed=seed,
    )


def _has_one_dtype(model: PreTrainedModel) -> bool:
    """The frozen copy of a run has not, where autocast is to make its products."""
    return len({p.dtype for p in model.parameters() if p.is_floating_point()}) == 1


def wanted_scores(
    suite: Suite,
    *,
    names: Sequence[str] | None = None,
    original: bool = False,
    judges: Iterable[str] = (),
    batch_size: int = 1,
    max_new_tokens: int = 1,
    resamples: int = 1,
) -> dict[str, set[str]]:
    """The scores, by set, that `evaluate` would compute; needs no model.

    Args:
        suite: As for `evaluate`; so are the other arguments, but for these two.
        original: Whether the original model is at hand.
        judges: The names of the judges.

    Raises:
        UsageError: `evaluate` would refuse this.
    """
    sizes = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "resamples": resamples}
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1, but got {value}.")
    judges = sorted(judges)
    figures = choose(names, judges)
    groups = suite.groups()
    check_same_questions(
        {group: [row.question for row in rows] for group, rows in groups.items()},
        suite.retain_logs,
    )
    offered = {
        group: offers(group, rows, judges, original=original) for group, rows in groups.items()
    }
    retrained = columns_of(suite.retain_logs or ())
    wanted: dict[str, set[str]] = {}
    for figure in figures:
        reason = missing_input(figure, offered, retrained)
        if reason and names is not None:
            raise UsageError(reason)
        for need in figure.needs:
            if not reason and not need.retrained:
                wanted.setdefault(need.group, set()).update(need.scores)
    return wanted
