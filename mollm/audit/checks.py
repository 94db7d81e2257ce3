"""Do the models of an audit belong together? Found out before their weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mollm.errors import UsageError
from mollm.models import loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ALIKE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def check_related(name: str, other: str, role: str) -> None:
    """Refuses a model that is not of the architecture of another one.

    Args:
        name: The model under audit, as for `find_model`.
        other: The original or the retain-only model.
        role: Which of them: "original" or "retain-only".

    Raises:
        UsageError: A size or the kind differs; both are named.
    """
    mine, theirs = (loading.load_config(each)[0].get_text_config() for each in (name, other))
    for field in _ALIKE:
        here, there = getattr(mine, field, None), getattr(theirs, field, None)
        if here != there:
            raise UsageError(
                f"the {role} model must be of the architecture of the one under audit, but {field} "
                f"is {there} in {other} and {here} in {name}: give the models of one run."
            )


def check_same_tokens(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, role: str
) -> None:
    """Refuses a model whose tokenizer gives the same text other ids.

    Raises:
        UsageError: A token has another id, or is missing; it is named.
    """
    mine, theirs = tokenizer.get_vocab(), other.get_vocab()
    token = next((t for t in {**mine, **theirs} if mine.get(t) != theirs.get(t)), None)
    if token is not None:
        raise UsageError(
            f"the {role} model must have the tokenizer of the one under audit, but the token "
            f"{token!r} has the id {theirs.get(token)} in it and {mine.get(token)} there: give the "
            "models of one run."
        )
