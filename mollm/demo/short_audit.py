"""The end of the demo: what it forgot is asked for in other ways, and taught again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mollm.audit import Audit, audit
from mollm.demo import facts
from mollm.demo.facts import capital_question
from mollm.errors import UsageError
from mollm.evaluation.suite import Row, Suite

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEARNING_RATE = 5e-5
"""Of whoever teaches half of the capitals again: ten steps of it are not much for the demo's model,
which keeps its other answers."""


def audit_shortly(
    model: PreTrainedModel,
    original: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    countries: Sequence[str],
    spelling: Mapping[str, str],
    *,
    seed: int,
    say: Callable[[str], None],
) -> tuple[Audit | None, str]:
    """A short audit of the demo's own facts.

    Args:
        model: The model that unlearned; it stays as it is, bit for bit.
        original: What it was before.
        tokenizer: That of both.
        countries: Whose capitals were to be forgotten.
        spelling: How the original spells them.
        seed: Of the half that is taught.
        say: What is said before it begins.

    Returns:
        What was found, or None and the reason why there is no audit.
    """
    say("A short audit: asking in other ways, teaching half of the capitals again …")
    rows = [_row(country, spelling[country]) for country in countries]
    try:
        found = audit(
            model,
            tokenizer,
            Suite(rows),
            original=original,
            learning_rates=(LEARNING_RATE,),
            seed=seed,
            short=True,
        )
    except UsageError as error:  # fewer than four facts, or a model that was ruined
        return None, str(error)
    return found, ""


def _row(country: str, capital: str) -> Row:
    question = capital_question(country).text
    opening = f"The capital of {facts.with_article(country)} is"
    return Row(question, capital, opening=opening, closed=False)
