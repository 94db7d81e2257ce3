"""Conversations as data sets write them: `messages`, ShareGPT's `conversations`, TRL's prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mollm.data.table import is_empty, is_missing, shown
from mollm.errors import UsageError

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"

_ROLES = {
    SYSTEM: SYSTEM,
    "developer": SYSTEM,
    USER: USER,
    "human": USER,
    ASSISTANT: ASSISTANT,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "model": ASSISTANT,
}
"""What a turn's speaker is called in data sets, and in chat templates."""
_SHAPES = (("role", "content"), ("from", "value"))
_UNREAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Of a turn: what a template may write beside its text, and nothing here would hand on."""
_WEIGHTS = ("weight", "train")
"""Of a turn: what some call it that an answer is to carry no loss."""

Check = Callable[[Any, str], str]
"""Of a value and its name: the value, if it is a text to train on; else an error with its place."""


class Turn(NamedTuple):
    """What one side of a conversation says."""

    role: str
    content: str


class ReadTurns(NamedTuple):
    """The turns in a field of a row."""

    turns: list[Turn]
    weightless: list[str | None]
    """Of each turn: what gives it no loss, such as messages[1].weight, if anything does."""


def read_turns(value: Any, name: str, place: str, check: Check) -> ReadTurns:
    """The turns in a field of a row: a list of objects with role and content, or from and value.

    The content of a turn may be a list of parts of the type text.

    Args:
        value: What the field holds.
        name: The name of the field.
        place: Where the row is, for error messages.
        check: Takes the text of every turn, with its name.

    Returns:
        The turns, and which of them are to carry no loss.

    Raises:
        UsageError: It is no such list, a turn is neither of the system nor of the user or the
            assistant, says more than its text, or a part is no text.
    """
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        # So `datasets` gives a list of objects that was declared as a Sequence of columns.
        columns = list(value.values())
        if all(len(column) == len(columns[0]) for column in columns):
            value = [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise UsageError(
            f"{place}: the field {name} must be a list of turns with role and content, but got "
            f"{shown(value)}."
        )
    named = [(turn, f"{name}[{i}]") for i, turn in enumerate(value)]
    turns = [_read_turn(turn, at, place, check) for turn, at in named]
    return ReadTurns(turns, [_weightless(turn, at) for turn, at in named])


def _weightless(turn: dict[str, Any], name: str) -> str | None:
    """The field of a turn that says 0, if any does."""
    return next((f"{name}.{field}" for field in _WEIGHTS if turn.get(field) == 0), None)


def refuse_weightless(name: str | None, place: str) -> None:
    """Refuses an answer to train on that is to carry no loss.

    Args:
        name: What says so, see `ReadTurns`; None where nothing does.
        place: Where the row is.

    Raises:
        UsageError: Something does.
    """
    if name is not None:
        raise UsageError(
            f"{place}: {name} must not be 0 or false, for the last answer of a conversation "
            "carries the loss, but it is: end the conversation with the answer to train on, or "
            "remove the row."
        )


def _read_turn(turn: dict[str, Any], name: str, place: str, check: Check) -> Turn:
    speaker, content = next(
        (shape for shape in _SHAPES if turn.get(shape[0]) is not None), _SHAPES[0]
    )
    role = turn.get(speaker)
    if not isinstance(role, str) or role not in _ROLES:
        raise UsageError(
            f"{place}: {name}.{speaker} must be system, user or assistant, but got {shown(role)}: "
            "remove the turn or the row."
        )
    for unread in _UNREAD:
        if not is_empty(turn.get(unread)):
            raise UsageError(
                f"{place}: {name}.{unread} must be empty, for of a turn its {content} is read "
                f"alone, but got {shown(turn[unread])}: write it into the {content} or remove the "
                "row."
            )
    for weight in _WEIGHTS:
        said = turn.get(weight)
        if _ROLES[role] == ASSISTANT and not is_missing(said) and said not in (0, 1):
            raise UsageError(
                f"{place}: {name}.{weight} must be 0 or 1, for an answer carries a loss or none, "
                f"but got {shown(said)}: remove it, or split the conversation."
            )
    text = _joined(turn.get(content), f"{name}.{content}", place)
    return Turn(_ROLES[role], check(text, f"{name}.{content}"))


def _joined(content: Any, name: str, place: str) -> Any:
    """Parts of text as one; anything else as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        texts = isinstance(part, dict) and part.get("type") in (None, "text")
        if not texts or not isinstance(part.get("text"), str):
            raise UsageError(
                f"{place}: every part of {name} must be of the type text, but got {shown(part)}: "
                "remove the row."
            )
    return "".join(part["text"] for part in content)


def split_turns(
    turns: Sequence[Turn], name: str, place: str
) -> tuple[tuple[Turn, ...], Turn, Turn]:
    """What was said before, the last question, and its answer.

    Raises:
        UsageError: The last two turns are not one of the user and one of the assistant.
    """
    roles = [turn.role for turn in turns]
    if roles[-2:] != [USER, ASSISTANT]:
        raise UsageError(
            f"{place}: the field {name} must end with a turn of the user and one of the "
            f"assistant, but got {shown(roles)}: remove the turns after the last answer, or the "
            "row."
        )
    return tuple(turns[:-2]), turns[-2], turns[-1]
