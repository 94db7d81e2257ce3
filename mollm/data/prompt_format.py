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
_OPTIONS = ("template", "prefix", "stop")


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

    Raises:
        UsageError: The template is none, or a word is blank.

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

    @classmethod
    def of(cls, given: FormatOption) -> PromptFormat:
        """The format that a setting says: a template, options by name, or None for the default."""
        if isinstance(given, PromptFormat):
            return given
        if not isinstance(given, Mapping):
            return cls(template=given)
        unknown = [name for name in given if name not in _OPTIONS]
        if unknown:
            raise UsageError(
                f"prompt_format must be a template, or hold {', '.join(_OPTIONS)}, but got "
                f"{unknown[0]!r}."
            )
        stop = given.get("stop") or ()
        words = (stop,) if isinstance(stop, str) else tuple(stop)
        return cls(given.get("template"), given.get("prefix") or "", words)

    def __post_init__(self) -> None:
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
            return self.template
        return {"template": self.template, "prefix": self.prefix, "stop": list(self.stop)}

    def begun(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of a word that ends it."""
        lengths = (n for word in self.stop for n in range(1, len(word)) if text.endswith(word[:n]))
        return max(lengths, default=0)

    def until_stop(self, text: str) -> tuple[str, bool]:
        """A reply up to the first of the words that end it, and whether one of them came."""
        ends = [place for word in self.stop if (place := text.find(word)) >= 0]
        return (text[: min(ends)], True) if ends else (text, False)
