"""How prompts are written, where that is not left to the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from mollm.errors import UsageError

FormatOption: TypeAlias = "str | Mapping[str, Any] | PromptFormat | None"
"""As users give a format: a template, or options by name."""

CHAT, NONE = "chat", "none"
QUESTION, ANSWER = "{question}", "{answer}"
QUESTION_AND_ANSWER = f"Question: {QUESTION}\nAnswer: {ANSWER}"
"""The template of a tokenizer without one of its own."""
_OPTIONS = ("template", "prefix", "stop", "like")
OPEN_UNLEARNING = "open-unlearning"
"""Whose tokens and figures a format may reproduce."""
OPEN_UNLEARNING_SYSTEM = "You are a helpful assistant."
OPEN_UNLEARNING_DATE = "10 Apr 2025"


@dataclass(frozen=True)
class PromptFormat:
    r"""A template, what stands before every prompt, and the words that end a reply.

    Args:
        template: "chat" for the tokenizer's chat template; "none" for plain text, the answer after
            the prompt as it goes on; or a text with {question} that ends with {answer}. None for
            the chat template, and without one for a question and plain text for other rows.
        prefix: Text before every prompt, such as examples with their answers. Running text has
            none, for it has no prompt.
        stop: A reply ends before any of these words.
        like: "open-unlearning" for its tokens, so that figures can be compared: its system prompt
            and date in a chat template; a loss on all that follows the generation prompt, and on
            an end-of-sequence token at the end; the space before an answer is asked with; and no
            token attends to one that equals padding.

    Raises:
        UsageError: The template is none, a word is blank, or there is nothing of that name to be
            like.

    Example:
        >>> PromptFormat.of({"template": "Q: {question}\nA: {answer}", "stop": "\n"}).stop
        ('\n',)
        >>> PromptFormat.of("Q: {question}")
        Traceback (most recent call last):
        mollm.errors.UsageError: ...
    """

    template: str | None = None
    prefix: str = ""
    stop: tuple[str, ...] = ()
    like: str | None = None

    @classmethod
    def of(cls, given: FormatOption) -> PromptFormat:
        """The format that a setting says: a template, options by name, or None for the default."""
        if isinstance(given, PromptFormat):
            return given
        if not isinstance(given, Mapping):
            return cls(like=given) if given == OPEN_UNLEARNING else cls(template=given)
        unknown = [name for name in given if name not in _OPTIONS]
        if unknown:
            raise UsageError(
                f"prompt_format must be a template, or hold {', '.join(_OPTIONS)}, but got "
                f"{unknown[0]!r}."
            )
        stop = given.get("stop") or ()
        words = (stop,) if isinstance(stop, str) else tuple(stop)
        return cls(given.get("template"), given.get("prefix") or "", words, given.get("like"))

    def __post_init__(self) -> None:
        if self.like not in (None, OPEN_UNLEARNING) or (self.like and self.plain):
            raise UsageError(
                f"like of a prompt_format must be {OPEN_UNLEARNING}, with a chat template or a "
                f"template, but got {self.like!r} with {self.template!r}."
            )
        template = self.template
        if template is not None and template not in (CHAT, NONE):
            good = isinstance(template, str) and template.endswith(ANSWER)
            if not good or template.count(QUESTION) != 1 or template.count(ANSWER) != 1:
                raise UsageError(
                    "the template of a prompt_format must be chat, none, or a text that has "
                    f"{QUESTION} and ends with {ANSWER}, but got {template!r}."
                )
        if not isinstance(self.prefix, str):
            raise UsageError(
                f"the prefix of a prompt_format must be a text, but got {self.prefix!r}."
            )
        for word in self.stop:
            if not isinstance(word, str) or not word:
                raise UsageError(
                    f"stop of a prompt_format must be words that end a reply, but got {word!r}."
                )

    @property
    def plain(self) -> bool:
        """Whether every row is plain text."""
        return self.template == NONE

    @property
    def identity(self) -> str | dict[str, Any] | None:
        """As a setting says it; None for the default."""
        if not self.prefix and not self.stop:
            if self.like is None:
                return self.template
            if self.template is None:
                return self.like
        told = {"template": self.template, "prefix": self.prefix, "stop": list(self.stop)}
        return told | ({"like": self.like} if self.like else {})

    def begun(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of a word that ends it."""
        lengths = (n for word in self.stop for n in range(1, len(word)) if text.endswith(word[:n]))
        return max(lengths, default=0)

    def until_stop(self, text: str) -> tuple[str, bool]:
        """A reply up to the first of the words that end it, and whether one of them came."""
        ends = [place for word in self.stop if (place := text.find(word)) >= 0]
        return (text[: min(ends)], True) if ends else (text, False)
