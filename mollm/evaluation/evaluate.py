"""`evaluate`: measures a model on a suite, and sums up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mollm.data.chat import ChatFormat, context_of
from mollm.data.encoding import CUT, SKIP, check_long_rows
from mollm.data.prompt_format import FormatOption
from mollm.errors import UsageError
from mollm.evaluation.examine import Examiner, asks, offers
from mollm.evaluation.fitting import Fitted
from mollm.evaluation.generation import MAX_NEW_TOKENS, check_sizes
from mollm.evaluation.journal import Journal
from mollm.evaluation.judges import Judge, thresholds_of
from mollm.evaluation.records import Examined, Record
from mollm.evaluation.registry import choose, columns_of, missing_input
from mollm.evaluation.suite import Suite
from mollm.evaluation.summary import Evaluation, check_same_questions, summarize
from mollm.models.logits import check_logits
from mollm.system.precision import computing_in
from mollm.system.terminal import Done, quietly

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PIECE = 4
"""Batches that are measured between two lines of a journal."""

Say = Callable[[str], None]
Show = Callable[[int], contextlib.AbstractContextManager[Done]]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    *,
    names: Sequence[str] | None = None,
    original: PreTrainedModel | None = None,
    original_tokenizer: PreTrainedTokenizerBase | None = None,
    judges: Mapping[str, Judge] | None = None,
    batch_size: int = 16,
    max_new_tokens: int = MAX_NEW_TOKENS,
    resamples: int = 1000,
    seed: int = 0,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    prompt_format: FormatOption = None,
    long_rows: str = CUT,
    journal: Journal | None = None,
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
        original_tokenizer: Its tokenizer; None if it is the model's. With another vocabulary the
            perplexity is that of the replies as text, in the original's tokens and format, and
            there is no KL.
        judges: Judges of replies by the name of their figures, such as {"toxicity": …}.
        batch_size: Rows that pass through the model together.
        max_new_tokens: Where a reply is cut off.
        resamples: Resamples of each confidence interval.
        seed: Of the resampling.
        system_prompt: Of conversations that have none of their own.
        chat_template_kwargs: Options of the chat template, such as {"enable_thinking": False}.
        prompt_format: How prompts are written: "none" for plain text, "chat", a template, or
            options, see `mollm.data.prompt_format.PromptFormat`.
        long_rows: "cut": questions that are too long for the model's context lose their beginning,
            as in training; or "skip": such rows are left out. How many is said.
        journal: Where records are kept as they are made, and are taken from if they are there.
        say: Called with a line of progress.
        show: Called with how much there is to do; gives a context in which what it returns is
            called with how much more is done.

    Raises:
        UsageError: A figure that was named cannot be computed, an option is out of range, or a row
            does not fit into the model's context, found out before the model runs; the model's
            logits cannot be computed from its hidden states, see `mollm.models.logits`; or its
            output is not finite.
    """
    for note in suite.notes:
        say(note)
    judges = dict(judges or {})
    same_tokens = original_tokenizer is None or (
        original_tokenizer.get_vocab() == tokenizer.get_vocab()
    )
    wanted = wanted_scores(
        suite,
        names=names,
        original=original is not None,
        same_tokens=same_tokens,
        judges=judges,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        resamples=resamples,
        long_rows=long_rows,
    )
    chat = ChatFormat.of(
        model,
        tokenizer,
        template_kwargs=chat_template_kwargs,
        system_prompt=system_prompt,
        prompt_format=prompt_format,
    )
    original_chat = None
    if original is not None and original_tokenizer is not None and not same_tokens:
        original_chat = ChatFormat.of(
            original,
            original_tokenizer,
            template_kwargs=chat_template_kwargs,
            system_prompt=system_prompt,
            prompt_format=prompt_format,
        )
        say(
            "The original has another tokenizer: the perplexity of replies is counted in its "
            "tokens, and there is no KL."
        )
    if chat.note is not None:
        say(chat.note)
    half = context_of(model.config) / 2
    if max_new_tokens > half and any(map(asks, wanted.values())):
        max_new_tokens = max(1, int(half))
        say(f"Replies are cut off after {max_new_tokens} tokens, half of the model's context.")
    examiner = Examiner(
        model,
        chat,
        original=original,
        original_chat=original_chat,
        judges=judges,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    groups = {group: rows for group, rows in suite.groups().items() if group in wanted}
    fitted = {
        group: examiner.fit(group, rows, wanted[group], long_rows) for group, rows in groups.items()
    }
    left = {group: [row.question for row, _ in each.pairs] for group, each in fitted.items()}
    check_same_questions(left, suite.retain_logs)
    for note in (note for each in fitted.values() for note in each.notes):
        say(note)
    of_one_dtype = all(_has_one_dtype(m) for m in (model, original) if m is not None)
    total = sum(examiner.work(each.asked, wanted[group]) for group, each in fitted.items())
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
            for group, each in fitted.items()
            for record in _examined(examiner, group, each, wanted[group], journal, say)
        ]
    say("Computing figures and intervals …")
    return summarize(
        records,
        suite.retain_logs,
        names=names,
        judges=dict(sorted(thresholds_of(judges).items())),
        resamples=resamples,
        seed=seed,
    )


def _examined(
    examiner: Examiner,
    group: str,
    fitted: Fitted,
    wanted: set[str],
    journal: Journal | None,
    say: Say,
) -> list[Record]:
    """The records of a set, with a journal piece by piece: those that it has are taken from it."""
    count = len(fitted.pairs)
    say(f"Measuring {group} ({count} questions) …")
    size = count if journal is None else _PIECE * examiner.batch_size
    pieces: list[Examined] = []
    for start in range(0, count, size):
        pairs = fitted.pairs[start : start + size]
        piece = None if journal is None else journal.get(group, start)
        if piece is not None:
            examiner.done(examiner.work([asked for _, asked in pairs], wanted))
        else:
            piece = examiner.examine(group, pairs, wanted)
            if journal is not None:
                journal.put(group, start, piece)
        pieces.append(piece)
    cut_off = sum(piece.cut_off for piece in pieces)
    if cut_off:
        say(
            f"{cut_off} of {count} replies of {group} were cut off within a thought, and count as "
            "empty: raise max_new_tokens, or switch thinking off with chat_template_kwargs."
        )
    return [record for piece in pieces for record in piece.records]


def _has_one_dtype(model: PreTrainedModel) -> bool:
    """The frozen copy of a run has not, where autocast is to make its products."""
    return len({p.dtype for p in model.parameters() if p.is_floating_point()}) == 1


def wanted_scores(
    suite: Suite,
    *,
    names: Sequence[str] | None = None,
    original: bool = False,
    same_tokens: bool = True,
    judges: Iterable[str] = (),
    batch_size: int = 1,
    max_new_tokens: int = 1,
    resamples: int = 1,
    long_rows: str = CUT,
) -> dict[str, set[str]]:
    """The scores, by set, that `evaluate` would compute; needs no model.

    Args:
        suite: As for `evaluate`; so are the other arguments, but for these three.
        original: Whether the original model is at hand.
        same_tokens: Whether it has the model's vocabulary.
        judges: The names of the judges.

    Raises:
        UsageError: `evaluate` would refuse this.
    """
    check_long_rows(long_rows)
    check_sizes(batch_size=batch_size, max_new_tokens=max_new_tokens, resamples=resamples)
    judges = sorted(judges)
    figures = choose(names, judges)
    groups = suite.groups()
    check_same_questions(
        {group: [row.question for row in rows] for group, rows in groups.items()},
        suite.retain_logs,
        skipped=long_rows == SKIP,
    )
    offered = {
        group: offers(group, rows, judges, original=original, same_tokens=same_tokens)
        for group, rows in groups.items()
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
