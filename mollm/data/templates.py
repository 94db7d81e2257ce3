"""Conversations as text: by a tokenizer's chat template, or plainly where it has none.

A writer gives the whole text of a conversation and says where in it an answer stands, whatever the
template puts before it or makes of it. An answer is found by rendering the conversation once as it
is and once with a mark in the answer's place: what the two texts have in common before and after
the mark is the template's, and what stands between is the answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from mollm.data.conversations import ASSISTANT, SYSTEM, USER, Turn
from mollm.data.prompt_format import ANSWER, QUESTION, QUESTION_AND_ANSWER
from mollm.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""From the first character to behind the last one."""

DATE = datetime(2024, 7, 26)
"""The day that every chat template is told it is: metrics, a run that is resumed and the logs of
another model would otherwise depend on the day. It is the date that Llama 3's template writes
where nobody tells it another one."""

THOUGHTS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)
"""How chat models mark where a thought begins and ends."""

_DIRECTIVES = "aAbBcdDeFGhHIjmMpRSTuUVwWxXyYzZ"
TEMPLATE_FAILURES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What expressions of a template raise, besides Jinja's own errors."""
_RESERVED = {
    "conversation",
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "sanitize_control_tokens",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "strftime_now",
}
_NAME = "chat_template"


class Writer(Protocol):
    """Writes conversations as text."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the text depends on besides the conversation, by names for an error message."""
        ...

    @property
    def notes(self) -> list[str]:
        """Sentences that the user should see."""
        ...

    def asked(self, turns: Sequence[Turn], before: str) -> str:
        """How much of the text before the last turn, an answer, the model is asked with."""
        ...

    def asked_and_whole(self, turns: Sequence[Turn]) -> tuple[str, str]:
        """What asks for the last turn, a generation prompt, and the text of the conversation."""
        ...

    def write(self, turns: Sequence[Turn], answers: Sequence[int]) -> tuple[str, list[Span]]:
        """The text of a conversation, and where in it the turns numbered `answers` stand.

        Raises:
            UsageError: The conversation cannot be written, or a turn is not in its text.
        """
        ...


@dataclass(frozen=True)
class PlainWriter:
    """Question and answer as a template of plain text has them."""

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None = None
    template: str | None = None
    """With {question} and, at its end, {answer}; None for QUESTION_AND_ANSWER."""
    prefix: str = ""
    """Text before the first question."""

    @property
    def identity(self) -> dict[str, Any]:
        """See `Writer`."""
        return _identity(system_prompt=self.system_prompt)

    @property
    def notes(self) -> list[str]:
        """See `Writer`."""
        if self.template is not None:
            return []
        name = self.tokenizer.name_or_path or "of this model"
        return [
            f"The tokenizer {name} has no chat template, so rows with a question are "
            r"written as 'Question: …\nAnswer:' and the answer, and others as plain text: "
            "prompt_format writes them otherwise."
        ]

    def asked(self, turns: Sequence[Turn], before: str) -> str:
        """See `Writer`."""
        return before

    def asked_and_whole(self, turns: Sequence[Turn]) -> tuple[str, str]:
        """See `Writer`; the spaces of the template before the answer are asked with."""
        *said, answer = turns
        text, ((start, _),) = self.write([*said, Turn(ASSISTANT, "")], [len(said)])
        asking = (self.template or QUESTION_AND_ANSWER).removesuffix(ANSWER)
        asked = text[:start] + asking[len(asking.rstrip(" ")) :]
        return asked, asked + answer.content

    def write(self, turns: Sequence[Turn], answers: Sequence[int]) -> tuple[str, list[Span]]:
        """See `Writer`; spaces before an answer are part of it, for the model is to write them."""
        asking = (self.template or QUESTION_AND_ANSWER).removesuffix(ANSWER)
        asked = asking.rstrip(" ")
        space = asking[len(asked) :]
        text, spans, prefix = "", {}, self.prefix
        for place, turn in enumerate(_with_system(turns, self.system_prompt)):
            text += "\n\n" if text and turn.role != ASSISTANT else ""
            if turn.role == USER:
                text, prefix = text + prefix, ""
            start = len(text)
            if turn.role == USER:
                text += asked.replace(QUESTION, turn.content)
            elif turn.role == ASSISTANT:
                text += f"{space}{turn.content.strip()}".rstrip(" ")
            else:
                text += turn.content
            spans[place] = start, len(text)
        shift = len(spans) - len(turns)
        return text, [spans[place + shift] for place in answers]


@dataclass
class TemplateWriter:
    """Writes what the chat template of a tokenizer writes.

    Raises:
        UsageError: The template fails, or leaves out questions or answers; or an option is none of
            the template's.
    """

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of `apply_chat_template`: what the template reads, or `chat_template`, the
    name of one where the tokenizer has several."""
    prefix: str = ""
    """Text before the first question, in the turn of the user."""

    def __post_init__(self) -> None:
        self.options = dict(self.options)
        self._template = self._choose(self.options.pop(_NAME, None))
        for name in self.options:
            if name in _RESERVED or not re.search(rf"\b{re.escape(name)}\b", self._template):
                raise UsageError(
                    "chat_template_kwargs must hold what the chat template of the tokenizer "
                    f"{self.tokenizer.name_or_path} reads, but got {name!r}: leave it out."
                )
        self._dated = _dated(self._template)
        self._in_parts = False
        self.takes_system = True
        """Whether the template writes a turn of the system."""
        self._folded = False
        self._examine()

    @property
    def identity(self) -> dict[str, Any]:
        """See `Writer`."""
        read = re.search(r"\b(strftime_now|date_string)\b", self._template)
        return _identity(
            template=hashlib.sha256(self._template.encode()).hexdigest(),
            options=dict(self.options) or None,
            system_prompt=self.system_prompt,
            date=DATE.date().isoformat() if read else None,
        )

    @property
    def notes(self) -> list[str]:
        """See `Writer`."""
        notes = []
        turns = [Turn(USER, "Who?"), Turn(ASSISTANT, "Me.")]
        text, ((start, _),) = self.write(turns, [1])
        asked, answered = self._prompt(turns[:1]), text[:start]
        if asked.rstrip() != answered.rstrip():
            notes.append(
                f"The chat template asks for a reply with {_ending(asked)!r}, but writes an "
                f"answer after {_ending(answered)!r}: the model is asked as it is trained, with "
                "the latter, and its replies to the former are not measured."
            )
        if self._folded or not (self.takes_system or self.system_prompt is None):
            notes.append(
                "The chat template takes no system prompt, so it stands at the beginning of the "
                "first question."
            )
        return notes

    def asked_and_whole(self, turns: Sequence[Turn]) -> tuple[str, str]:
        """See `Writer`."""
        return self._prompt(turns[:-1]), self._render(self._with_system(turns))

    def asked(self, turns: Sequence[Turn], before: str) -> str:
        """See `Writer`: all but spaces, which are the model's to write, if it is not told them."""
        prompt = self._prompt(turns[:-1])
        if before.startswith(prompt) and not before[len(prompt) :].strip():
            return prompt
        return before.rstrip(" ")

    def write(self, turns: Sequence[Turn], answers: Sequence[int]) -> tuple[str, list[Span]]:
        """See `Writer`."""
        written = self._with_system(turns)
        shift = len(written) - len(turns)  # of turns that follow a question
        places = [place + shift for place in answers]
        if len(places) == 1 and not written[places[0]].content.strip():
            # A template may leave out the turn of an answer that is blank.
            before, after = self._around(written, places[0], 0)
            return before + after, [(len(before), len(before))]
        text = self._render(written)
        return text, [self._find(text, written, place) for place in places]

    def _with_system(self, turns: Sequence[Turn]) -> list[Turn]:
        written = _with_system(_with_prefix(turns, self.prefix), self.system_prompt)
        if self.takes_system or written[0].role != SYSTEM:
            return written
        self._folded = True
        system, first, *rest = written
        if first.role != USER:
            return [Turn(USER, system.content), first, *rest]
        return [Turn(USER, f"{system.content}\n\n{first.content}"), *rest]

    def _find(self, text: str, turns: Sequence[Turn], place: int) -> Span:
        """Where the turn stands in the text that it was rendered to."""
        answer = turns[place].content
        thought, cut = _thought_of(answer)
        for kept in (0, cut) if cut else (0,):
            before, after = self._around(turns, place, kept)
            start, end = len(before), len(text) - len(after)
            if start > end or not (text.startswith(before) and text.endswith(after)):
                continue
            if not text[start:end].strip():
                break
            known = text.rfind(thought, 0, start) if kept and thought else -1
            return (start if known < 0 else known), end
        raise UsageError(
            f"the chat template of the tokenizer {self.tokenizer.name_or_path} must write every "
            f"answer, but it leaves out {answer[:60]!r}, or writes other words around it than "
            "around others: change the answer or leave it out."
        )

    def _around(self, turns: Sequence[Turn], place: int, kept: int) -> tuple[str, str]:
        """What the template writes before and after a turn, of which `kept` characters stay."""
        mark = _unused_mark(turns)
        marked = list(turns)
        marked[place] = Turn(turns[place].role, turns[place].content[:kept] + mark)
        before, found, after = self._render(marked).partition(mark)
        if not found:
            self._refuse(turns[place].role)
        return before, after

    def _render(self, turns: Sequence[Turn], **options: bool) -> str:
        from jinja2 import TemplateError

        messages = [
            {
                "role": turn.role,
                "content": [{"type": "text", "text": turn.content}]
                if self._in_parts
                else turn.content,
            }
            for turn in turns
        ]
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, chat_template=self._dated, tokenize=False, **self.options, **options
            )
        except (TemplateError, *TEMPLATE_FAILURES) as error:
            raise UsageError(
                f"the chat template of the tokenizer {self.tokenizer.name_or_path} must write a "
                f"question and an answer, but it fails: {error}: put another into its "
                "chat_template."
            ) from error
        return text

    def _prompt(self, turns: Sequence[Turn]) -> str:
        """The generation prompt: with what the template asks for a reply."""
        return self._render(self._with_system(turns), add_generation_prompt=True)

    def _choose(self, name: Any) -> str:
        """The template itself, of several the one of that name."""
        own: Any = self.tokenizer.chat_template
        if not isinstance(own, Mapping):
            if name is None:
                return str(own)
            raise UsageError(
                f"the tokenizer {self.tokenizer.name_or_path} must have named chat templates for "
                f"a chat_template to be chosen, but it has one without a name, and got {name!r}."
            )
        chosen = name if name is not None else next(iter(own)) if len(own) == 1 else "default"
        if chosen not in own:
            raise UsageError(
                f"the tokenizer {self.tokenizer.name_or_path} has the chat templates "
                f"{', '.join(sorted(own))}, but none of the name {chosen!r}: choose one with "
                "chat_template_kwargs={chat_template: NAME}."
            )
        return str(own[chosen])

    def _examine(self) -> None:
        """Finds out what the template can do; refuses one that cannot be used."""
        question, answer, system = (f"{word}Mark7" for word in ("Question", "Answer", "System"))
        bare = [Turn(USER, question), Turn(ASSISTANT, answer)]
        led = [Turn(SYSTEM, system), *bare]

        def missing(turns: Sequence[Turn]) -> str | None:
            text = self._render(turns)
            return next((turn.role for turn in turns if turn.content not in text), None)

        lost, failure = None, None
        for self._in_parts, turns in itertools.product((False, True), (bare, led)):
            # Templates of models for images and text may want a list of parts, and some a system.
            try:
                left_out = missing(turns)
            except UsageError as error:
                failure = failure or error
                continue
            if left_out is None:
                break
            lost = lost or left_out
        else:
            if failure is not None:
                raise failure
            self._refuse(lost or USER)
        if turns is led and self.system_prompt is None:
            raise UsageError(
                f"the chat template of the tokenizer {self.tokenizer.name_or_path} must have a "
                "turn of the system before a question, without which it fails: give a "
                "system_prompt."
            ) from failure
        try:
            self.takes_system = system in self._render(led)
        except UsageError:
            self.takes_system = False

    def _refuse(self, role: str) -> None:
        lost = {USER: "question", ASSISTANT: "answer"}.get(role, role)
        raise UsageError(
            f"the chat template of the tokenizer {self.tokenizer.name_or_path} must write a "
            f"question and an answer, but it leaves out the {lost}: put another into its "
            "chat_template."
        )


def _identity(
    *,
    template: str | None = None,
    options: Mapping[str, Any] | None = None,
    system_prompt: str | None = None,
    date: str | None = None,
) -> dict[str, Any]:
    return {
        "chat template": template,
        "chat_template_kwargs": options,
        "system_prompt": system_prompt,
        "date in the chat template": date,
    }


def _with_system(turns: Sequence[Turn], prompt: str | None) -> list[Turn]:
    """The conversation with a system prompt, unless it has one of its own."""
    if prompt is None or turns[0].role == SYSTEM:
        return list(turns)
    return [Turn(SYSTEM, prompt), *turns]


def _with_prefix(turns: Sequence[Turn], prefix: str) -> list[Turn]:
    """The conversation with a text before its first question."""
    first = next((i for i, turn in enumerate(turns) if turn.role == USER), None)
    if not prefix or first is None:
        return list(turns)
    asked = Turn(USER, prefix + turns[first].content)
    return [*turns[:first], asked, *turns[first + 1 :]]


def _thought_of(answer: str) -> tuple[str, int]:
    """The words of the thought with which an answer begins, and where it ends; 0 for none."""
    for opening, closing in THOUGHTS:
        thought, found, _ = answer.rpartition(closing)
        if found:
            return thought.strip().removeprefix(opening).strip(), len(thought) + len(closing)
    return "", 0


def _unused_mark(turns: Sequence[Turn]) -> str:
    mark = "AnswerMark7"
    while any(mark in turn.content for turn in turns):
        mark += "x"
    return mark


def _ending(text: str) -> str:
    return text[-32:]


def _dated(template: str) -> str:
    """The template with its clock stopped at DATE.

    Jinja finds a macro before a global function of the same name. What the macro is called with is,
    nearly always, a text of the template, and known then; of others it replaces what is usual.
    """
    if "strftime_now" not in template:
        return template
    days = {f"%{d}": DATE.strftime(f"%{d}") for d in _DIRECTIVES}
    bare = {f"%-{d[1:]}": text.lstrip("0") or "0" for d, text in days.items()}
    filters = "".join(
        f' | replace("{directive}", "{text}")'
        for directive, text in {**bare, **days, "%%": "%"}.items()
    )
    known = _dates_in(template)
    macro = (
        f"{{%- macro strftime_now(format) -%}}{{%- set known = {known!r} -%}}"
        f"{{{{ known[format] if format in known else format{filters} }}}}{{%- endmacro %}}"
    )
    return f"{macro}\n{template}"


def _dates_in(template: str) -> dict[str, str]:
    """DATE as the texts in the expressions of a template say to write it, by those texts."""
    from jinja2 import Environment, TemplateSyntaxError

    found = {}
    with contextlib.suppress(TemplateSyntaxError):  # said when it is rendered
        for _, kind, value in Environment(autoescape=False).lex(template):
            if kind != "string" or "%" not in value:
                continue
            with contextlib.suppress(ValueError):  # no text, or none that a date can be written in
                text = value[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")
                found[text] = DATE.strftime(text)
    return found
