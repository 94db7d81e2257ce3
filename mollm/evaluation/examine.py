"""Measures a model on one set of questions: from rows to records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mollm.data.chat import ChatFormat, Tokens, context_of
from mollm.errors import UsageError
from mollm.evaluation import metrics
from mollm.evaluation.fitting import Fitted, choices_of, fit
from mollm.evaluation.generation import MAX_NEW_TOKENS, Reply, generate_replies
from mollm.evaluation.judges import Judge, judge_replies
from mollm.evaluation.records import Examined, Record
from mollm.evaluation.registry import JUDGED
from mollm.evaluation.scores import TokenScores, check_vocabularies, kl_to_original, score_rows
from mollm.evaluation.suite import Row
from mollm.system.terminal import Done, quietly

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scores = dict[str, float]

_ANSWER = frozenset(
    {"nll", "probability", "exact_memorization", "extraction_strength"}
    | {"zlib", "min_k", "min_k_plus_plus"}
)
_WRONG = frozenset({"correct_nll", "wrong_nll", "truth_ratio", "choice_probability"})
_REPLY = frozenset({"rouge_l", "repetition"})
_ORIGINAL_REPLY = frozenset({"reply_nll", "reply_tokens"})
_REPLY_PASSES = 12
"""As many passes as a reply takes the time of, about."""


@dataclass(frozen=True)
class Examiner:
    """A model with all that it is measured by."""

    model: PreTrainedModel
    chat: ChatFormat
    original: PreTrainedModel | None = None
    original_chat: ChatFormat | None = None
    """The format of the original where its tokenizer is another one."""
    judges: Mapping[str, Judge] = field(default_factory=dict)
    batch_size: int = 16
    max_new_tokens: int = MAX_NEW_TOKENS
    done: Done = quietly

    def work(self, rows: Sequence[Row], wanted: set[str]) -> int:
        """How much there is to do for a set, in passes of a row; a reply counts as many."""
        passes = 1 + 2 * ("kl" in wanted) + bool(wanted & _ORIGINAL_REPLY)
        wrong = sum(len(choices_of(row)) for row in rows) if wanted & _WRONG else 0
        return len(rows) * (passes + _REPLY_PASSES * asks(wanted)) + wrong

    def check(self, group: str, rows: Sequence[Row], wanted: set[str]) -> None:
        """Encodes all that the wanted scores ask the model about.

        Raises:
            UsageError: A text has no tokens, or does not fit into the model's context; or the
                original is to be compared with, but has another vocabulary.
        """
        compared = wanted & ({"kl"} if self.original_chat else {"kl", *_ORIGINAL_REPLY})
        if compared:
            check_vocabularies(self.model, self._original())
        context = context_of(self.model.config)
        for row in rows:
            texts = [row.answer]
            texts += [*choices_of(row)] if wanted & _WRONG else []
            for text in texts:
                tokens = self.chat.encode(row.example(text))
                self.chat.refuse_unknown(tokens, f"the row {row.question!r} of the set {group}")
                if self.chat.answer_length(tokens) < 1:
                    raise UsageError(
                        f"every answer of the set {group} must hold a token, but the tokenizer "
                        f"makes none of {text!r}: leave out the question {row.question!r}."
                    )
                if len(tokens.ids) > context:
                    raise UsageError(
                        f"every row of the set {group} must fit into the model's context of "
                        f"{context} tokens, but {row.question!r} takes {len(tokens.ids)} with an "
                        "answer: shorten it or leave it out."
                    )

    def fit(self, group: str, rows: Sequence[Row], wanted: set[str], long_rows: str) -> Fitted:
        """The rows as they fit into the model's context with all that is wanted, see `fit`.

        Raises:
            UsageError: As `fit` and `check`.
        """
        fitted = fit(
            group,
            rows,
            self.chat,
            context_of(self.model.config),
            reply=self.max_new_tokens if asks(wanted) else 0,
            with_choices=bool(wanted & _WRONG),
            long_rows=long_rows,
        )
        self.check(group, fitted.asked, wanted)
        return fitted

    def examine(self, group: str, pairs: Sequence[tuple[Row, Row]], wanted: set[str]) -> Examined:
        """Records with at least the wanted scores, in the order of the pairs of `Fitted`."""
        given, rows = [row for row, _ in pairs], [asked for _, asked in pairs]
        scores = self._answers(rows)
        if wanted & _WRONG:
            scores = _joined(scores, self._wrong(rows, [each["nll"] for each in scores]))
        if "kl" in wanted:
            scores = _joined(scores, self._kl(rows))
        replies: list[Reply] | None = None
        if asks(wanted):
            replies = self._ask(rows)
            scores = _joined(scores, self._replies(rows, replies, wanted))
        records = tuple(
            Record(group, row.question, row.answer, replies[i].text if replies else None, each)
            for i, (row, each) in enumerate(zip(given, scores, strict=True))
        )
        return Examined(records, sum(reply.thinking for reply in replies or ()))

    def _answers(self, rows: Sequence[Row]) -> list[Scores]:
        encoded = [self.chat.encode(row.example(row.answer)) for row in rows]
        scored = self._score(self.model, encoded)
        return [
            self._answer(row, tokens, row_tokens)
            for row, tokens, row_tokens in zip(rows, scored, encoded, strict=True)
        ]

    def _answer(self, row: Row, tokens: TokenScores, encoded: Tokens) -> Scores:
        nll = tokens.mean_nll
        words = tokens.without_last() if encoded.closed else tokens
        like = self.chat.format.like
        text = self.chat.scored_text(encoded) if like else row.answer.strip()
        return {
            "nll": nll,
            "probability": float(metrics.probability([nll])[0]),
            "exact_memorization": metrics.exact_memorization(words.hits),
            "extraction_strength": metrics.extraction_strength(words.hits),
            "zlib": metrics.zlib_score(nll, text),
            "min_k": metrics.min_k(words.log_probs),
            "min_k_plus_plus": metrics.min_k_plus_plus(words.log_probs, words.means, words.stds),
        }

    def _wrong(self, rows: Sequence[Row], answer_nll: Sequence[float]) -> list[Scores]:
        encoded = [self.chat.encode(row.example(text)) for row in rows for text in choices_of(row)]
        scored = iter(self._score(self.model, encoded))
        scores = []
        for row, nll in zip(rows, answer_nll, strict=True):
            correct = next(scored).mean_nll
            wrong = [next(scored).mean_nll for _ in row.perturbed_answers]
            scores.append(
                {
                    "correct_nll": correct,
                    "wrong_nll": metrics.mean(wrong),
                    "truth_ratio": metrics.truth_ratio(correct, wrong),
                    "choice_probability": metrics.choice_probability(nll, wrong),
                }
            )
        return scores

    def _kl(self, rows: Sequence[Row]) -> list[Scores]:
        encoded = [self.chat.encode(row.example(row.answer)) for row in rows]
        kl = kl_to_original(
            self.model,
            self._original(),
            encoded,
            pad_id=self.chat.pad_id,
            batch_size=self.batch_size,
            done=lambda count: self.done(2 * count),
        )
        return [{"kl": float(value)} for value in kl]

    def _ask(self, rows: Sequence[Row]) -> list[Reply]:
        return generate_replies(
            self.model,
            self.chat,
            [row.asked for row in rows],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            done=lambda count: self.done(_REPLY_PASSES * count),
        )

    def _replies(
        self, rows: Sequence[Row], replies: Sequence[Reply], wanted: set[str]
    ) -> list[Scores]:
        pairs = list(zip(rows, replies, strict=True))
        scores: list[Scores] = [
            {
                "rouge_l": max(
                    metrics.rouge_l_recall(reply.text, answer) for answer in self._accepted(row)
                ),
                "repetition": metrics.repetition(reply.text),
            }
            for row, reply in pairs
        ]
        if wanted & _ORIGINAL_REPLY:
            # A reply that was cut off did not end its turn; an empty one did, at once.
            chat = self.original_chat or self.chat
            encoded = [
                chat.encode_reply(
                    row.example("", closed=reply.complete or not reply.text), reply.text
                )
                for row, reply in pairs
            ]
            scored = self._score(self._original(), encoded, chat)
            fluency = [
                {"reply_nll": each.mean_nll, "reply_tokens": float(len(each.log_probs))}
                for each in scored
            ]
            scores = _joined(scores, fluency)
        questions, texts = [row.question for row in rows], [reply.text for reply in replies]
        for name, judge in self.judges.items():
            if JUDGED + name in wanted:
                judged = judge_replies(judge, name, questions, texts)
                scores = _joined(scores, [{JUDGED + name: score} for score in judged])
        return scores

    def _accepted(self, row: Row) -> Sequence[str]:
        """What a reply is compared with: of plain text, which has no end, as much as a reply has
        room for."""
        answers = row.accepted_answers or (row.answer,)
        if not self.chat.is_plain(row.example("")):
            return answers
        return [self.chat.beginning(row.example(text), self.max_new_tokens) for text in answers]

    def _original(self) -> PreTrainedModel:
        assert self.original is not None, "scores that need it are only offered where it is given"
        return self.original

    def _score(
        self, model: PreTrainedModel, rows: Sequence[Tokens], chat: ChatFormat | None = None
    ) -> list[TokenScores]:
        pad_id = (chat or self.chat).pad_id
        return score_rows(model, rows, pad_id=pad_id, batch_size=self.batch_size, done=self.done)


def asks(wanted: set[str]) -> bool:
    """Whether the wanted scores are of replies."""
    return bool(wanted - _ANSWER - _WRONG - {"kl"})


def offers(
    group: str,
    rows: Sequence[Row],
    judges: Iterable[str],
    *,
    original: bool,
    same_tokens: bool = True,
) -> frozenset[str]:
    """The scores that can be had for the examples of a set.

    Args:
        group: The name of the set.
        rows: Its rows.
        judges: The names of the judges.
        original: Whether the original model is at hand.
        same_tokens: Whether it has the model's vocabulary.
    """
    if group == "holdout":
        return _ANSWER
    judged = {JUDGED + name for name in judges}
    compared = _ORIGINAL_REPLY if original else frozenset()
    compared |= {"kl"} if original and same_tokens else frozenset()
    wrong = _WRONG if all(row.perturbed_answers for row in rows) else frozenset()
    return _ANSWER | wrong | _REPLY | judged | compared


def _joined(scores: Sequence[Scores], more: Sequence[Scores]) -> list[Scores]:
    return [one | other for one, other in zip(scores, more, strict=True)]
