"""Chat-formatted examples as token ids, with a loss on the answer tokens alone.

Works with any tokenizer. A row is, token for token, what the tokenizer's chat template writes for
the conversation; one without a chat template gets the plain format

    Question: {question}
    Answer: {answer}

and rows without a question are plain text then. A `PromptFormat` has them written otherwise.

Labels come from where the answer stands in the text, never from the value of an id: in many
models the padding token is the token that ends a turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mollm.data.conversations import ASSISTANT, SYSTEM, USER, Turn
from mollm.data.prompt_format import (
    CHAT,
    OPEN_UNLEARNING_DATE,
    OPEN_UNLEARNING_SYSTEM,
    FormatOption,
    PromptFormat,
)
from mollm.data.templates import THOUGHTS, PlainWriter, Span, TemplateWriter, Writer
from mollm.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORE_INDEX = -100
TRAIN_ON_TURNS = ("last", "all")
"""Which of the assistant's turns in a conversation carry a loss."""

_ANSWER = Turn(ASSISTANT, "The")


@dataclass(frozen=True)
class Example:
    """One question with the answer that carries the loss."""

    question: str
    answer: str
    opening: str = ""
    """Words with which the assistant's turn has already begun: context without a loss."""
    closed: bool = True
    """Whether the turn ends after the answer; if so, the token that ends it carries a loss too."""
    history: tuple[Turn, ...] = ()
    """What was said before the question, a system prompt included."""
    is_text: bool = False
    """Whether this is running text, not a conversation: the answer follows the question as it is,
    and has no end."""
    is_question: bool = True
    """Whether the question is one: if not, it is running text to a model without a template."""


@dataclass(frozen=True)
class Tokens:
    """An example as ids; a label is the id itself where it carries a loss, else IGNORE_INDEX."""

    ids: list[int]
    labels: list[int]
    closed: bool = False
    """Whether the last label is that of the token that ends the turn."""
    alternative: Tokens | None = None
    """The same question with another answer, for methods that compare the two."""
    attention: list[int] | None = None
    """0 for a token that none attends to; None where all are seen."""


@dataclass(frozen=True)
class Batch:
    """Padded examples."""

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T], 1 for a token, 0 for padding
    labels: Tensor  # [B, T]
    padded_left: bool | None = None
    """Whether padding may come before a row; None if that must be read from the mask, for which
    a GPU has to be waited for."""
    alternative: Batch | None = None
    """The rows' alternatives, if all have one."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
            alternative=None if self.alternative is None else self.alternative.to(device),
        )


class ChatFormat:
    """Writes questions and answers the way a model's tokenizer wants them.

    Args:
        tokenizer: The tokenizer.
        template_kwargs: Keyword arguments of its `apply_chat_template`, such as
            {"enable_thinking": False}, or {"chat_template": NAME} to choose one of several.
        system_prompt: The system prompt of conversations that have none of their own.
        prompt_format: How prompts are written, see `PromptFormat.of`; None leaves it to the
            tokenizer.
        vocabulary: How many ids the model has embeddings for; None for as many as are asked.
        ends: Further ids that end a turn, such as those of the model's generation config.

    Raises:
        UsageError: The tokenizer's chat template fails or leaves out questions or answers, or the
            keyword arguments are not its.
    """

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
        prompt_format: FormatOption = None,
    ) -> ChatFormat:
        """The format of a model that is loaded: its vocabulary and its ends of a turn."""
        return cls(
            tokenizer,
            template_kwargs=template_kwargs,
            system_prompt=system_prompt,
            prompt_format=prompt_format,
            vocabulary=vocabulary_of(model.config),
            ends=ends_of(getattr(model, "generation_config", None)),
        )

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
        prompt_format: FormatOption = None,
        vocabulary: int | None = None,
        ends: Iterable[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.format = PromptFormat.of(prompt_format)
        self._writer = _writer(tokenizer, template_kwargs or {}, system_prompt, self.format)
        self._system_prompt = system_prompt
        self.has_template = isinstance(self._writer, TemplateWriter)
        self._start_ids = _start_of(tokenizer)
        added = tokenizer.added_tokens_decoder
        named = (tokenizer.eos_token_id, *tokenizer.all_special_ids, *ends)
        self._special = {i for i in named if i is not None}
        self._special |= {i for i, token in added.items() if token.special}
        self._added = set(added)
        self.end_id: int | None = self._find_turn_end()
        """The token that ends the assistant's turn; None where the template writes none."""
        stops = (self.end_id, self._find_end_between_turns(), tokenizer.eos_token_id, *ends)
        self.stop_ids: frozenset[int] = frozenset(i for i in stops if i is not None)
        """The tokens that end a reply."""
        self.pad_id: int = pad_id_of(tokenizer, vocabulary)
        """The id that fills a batch; masked, so any id would do that the model has."""
        self._thoughts = _known_thoughts(tokenizer)

    @property
    def note(self) -> str | None:
        """What the user should know about the format, in sentences."""
        return None if self.format.plain else " ".join(self._writer.notes) or None

    @property
    def identity(self) -> dict[str, Any]:
        """What rows depend on besides data and tokenizer, by names.

        The hash of the template, its options, the system prompt, the format that was asked for
        and, where the template writes one, the date.
        """
        return {**self._writer.identity, "prompt_format": self.format.identity}

    def is_plain(self, example: Example) -> bool:
        """Whether an example is written as plain text, without template and end."""
        if example.is_text or self.format.plain:
            return True
        own = self.has_template or self.format.template or self.format.like
        return not (example.is_question or own)

    def prompt(self, question: str) -> str:
        """The text that ends where the assistant's answer begins."""
        text, ((start, _),) = self._writer.write([Turn(USER, question), _ANSWER], [1])
        return text[:start]

    def encode_prompt(self, question: str | Example) -> Tokens:
        """A question that waits for its answer; no token carries a loss.

        These are the tokens that stand in a row before the first one that holds a character of the
        answer: a space that a tokenizer joins with the answer's first word is the model's to write.

        Args:
            question: The question, or an example, whose answer is left out.
        """
        example = question if isinstance(question, Example) else Example(question, "")
        if self.format.like and not example.is_text:
            asked, _ = self._like_open_unlearning(replace(example, opening=""))
            return Tokens(asked, [IGNORE_INDEX] * len(asked), attention=self._unpadded(asked))
        example = self._settled(replace(example, answer="", opening=""))
        answer = _ANSWER.content
        if example.is_text and not example.question[-1:].isspace():
            answer = f" {answer}"
        text, ((start, end),) = self._write(replace(example, answer=answer, opening=""), "last")
        if not example.is_text:
            turns = [*example.history, Turn(USER, example.question), _ANSWER]
            start = len(self._writer.asked(turns, text[:start]))
        ids, ((first, _),) = self._tokenize(text[:end], [(start, end)])
        ids = self._start(example) + ids[:first]
        return Tokens(ids, [IGNORE_INDEX] * len(ids))

    def encode(self, example: Example, *, on_turns: str = "last") -> Tokens:
        """An example as the template writes it, but without white space around answers.

        The tokens that hold characters of the answer carry a loss, and so does the one that ends
        its turn.

        Args:
            example: What to encode.
            on_turns: "last", or "all" for a loss on the assistant's earlier turns too.

        Raises:
            UsageError: The template cannot write the conversation, or leaves out the answer; or
                earlier answers are to carry a loss where all is one plain text.
        """
        answered = any(turn.role == ASSISTANT for turn in example.history)
        if on_turns != "last" and answered and self.is_plain(example):
            raise UsageError(
                "train_on_turns must be last where a conversation is plain text, in which earlier "
                f"answers have no place of their own, but got {on_turns!r}: leave it out, or "
                "choose another prompt_format."
            )
        if not self.format.like or example.is_text:
            return self._encode(example, on_turns)
        if on_turns != "last":
            raise UsageError(
                f"train_on_turns must be last for rows like those of {self.format.like}, but got "
                f"{on_turns!r}."
            )
        asked, ids = self._like_open_unlearning(example)
        labels = [IGNORE_INDEX] * min(len(asked), len(ids)) + ids[len(asked) :]
        return Tokens(ids, labels, closed=True, attention=self._unpadded(ids))

    def _encode(self, example: Example, on_turns: str = "last") -> Tokens:
        example = self._settled(example)
        text, spans = self._write(example, on_turns)
        closed = example.closed and not example.is_text
        ids, places = self._tokenize(text if closed else text[: spans[-1][1]], spans)
        counted = {i for first, end in places for i in range(first, end)}
        ended = False
        for (_, end), following in zip(places, [*places[1:], (len(ids), 0)], strict=True):
            found = self._end_after(ids, end, following[0])
            ended = found is not None
            counted |= {found} if found is not None else set()
        nothing = example.is_text and not example.answer.strip()
        if not ended and (nothing or (closed and (not self.has_template or not counted))):
            final = self._final_id
            if final is not None:
                counted.add(len(ids))
                ids, ended = [*ids, final], True
        labels = [token if i in counted else IGNORE_INDEX for i, token in enumerate(ids)]
        start = self._start(example)
        return Tokens(start + ids, [IGNORE_INDEX] * len(start) + labels, ended)

    def encode_reply(self, example: Example, reply: str) -> Tokens:
        """What a model was asked and replied, with a loss on the reply, which plain text goes on
        with exactly as it was written."""
        asked = self._settled(replace(example, answer="", opening=""))
        return self._encode(replace(asked, answer=reply))

    def encode_text(self, text: str, max_length: int) -> list[Tokens]:
        """Running text, with a loss on every token that another one precedes.

        A text that is longer than a row is cut into windows. Each begins with the last tokens of
        the one before, a quarter of a window, as context without a loss: every token carries its
        loss exactly once.

        Args:
            text: The text.
            max_length: The most tokens of a window.

        Raises:
            UsageError: A window would have no room for two tokens.
        """
        start, ids = self._start_ids, self._ids(text)
        room = max_length - len(start)
        if room < 2:
            raise UsageError(
                f"max_length must leave room for two tokens of a text, but got {max_length}, of "
                f"which the start of a row takes {len(start)}."
            )
        shared = max(1, room // 4)
        windows, done = [], 0 if start else 1
        while done < len(ids):
            first = max(0, min(done - shared, len(ids) - room))
            part = ids[first : first + room]
            labels = [IGNORE_INDEX] * (done - first) + part[done - first :]
            windows.append(Tokens(start + part, [IGNORE_INDEX] * len(start) + labels))
            done = first + len(part)
        return windows

    def answer_length(self, tokens: Tokens) -> int:
        """How many tokens of a row carry a loss, without the one that ends the last turn."""
        return sum(label != IGNORE_INDEX for label in tokens.labels) - tokens.closed

    def beginning(self, example: Example, count: int) -> str:
        """The first tokens that carry a loss, at most `count` of them, as text."""
        carrying = [label for label in self.encode(example).labels if label != IGNORE_INDEX]
        text: str = self.tokenizer.decode(carrying[:count], skip_special_tokens=True)
        return text

    def refuse_unknown(self, tokens: Tokens, place: str) -> None:
        """Refuses a row with ids that the model has no embeddings for.

        Args:
            tokens: The row.
            place: What the message calls it.

        Raises:
            UsageError: It has such an id.
        """
        unknown = next((i for i in tokens.ids if not self._has(i)), None)
        if unknown is not None:
            raise UsageError(
                f"{place}: the tokenizer gives {self.tokenizer.convert_ids_to_tokens(unknown)!r} "
                f"the id {unknown}, but the model has embeddings for {self.vocabulary} ids alone: "
                "take the model's own tokenizer, or resize the model's embeddings."
            )

    def read_reply(self, ids: Sequence[int]) -> tuple[str, bool]:
        """What a reply says, without special tokens and without a thought that comes first.

        Returns:
            The text, and whether it ends within the thought.
        """
        added = self.tokenizer.get_added_vocab()
        marks = {added.get(mark) for pair in self._thoughts for mark in pair}
        kept = [i for i in ids if i in marks or i not in self._special]
        text: str = self.tokenizer.decode(kept, skip_special_tokens=False)
        for opening, closing in self._thoughts:
            text = text.rpartition(closing)[2]
            answer, found, _ = text.partition(opening)
            if found:
                return answer, not answer.strip()
        return text, False

    def _write(self, example: Example, on_turns: str) -> tuple[str, list[Span]]:
        """The text of an example, and where what carries a loss stands in it."""
        if example.is_text:
            text = example.question + example.answer
            return text, [(len(example.question), len(text))]
        answer = f"{example.opening} {example.answer.strip()}".strip()
        said = [*example.history, Turn(USER, example.question), Turn(ASSISTANT, answer)]
        turns = [
            turn._replace(content=turn.content.strip()) if turn.role == ASSISTANT else turn
            for turn in said
        ]
        answers = [len(turns) - 1]
        if on_turns == "all":
            answers = [place for place, turn in enumerate(turns) if turn.role == ASSISTANT]
        text, spans = self._writer.write(turns, answers)
        if example.opening:  # the space before the answer is the model's to write
            end = spans[-1][1]
            spans[-1] = end - len(example.answer.strip()) - 1, end
        return text, spans

    def scored_text(self, tokens: Tokens) -> str:
        """What of a row carries a loss, as text without special tokens."""
        carrying = [label for label in tokens.labels if label != IGNORE_INDEX]
        text: str = self.tokenizer.decode(carrying, skip_special_tokens=True)
        return text

    def _like_open_unlearning(self, example: Example) -> tuple[list[int], list[int]]:
        """The ids that ask for an answer, and those of the row, as open-unlearning has them."""
        answer = f"{example.opening} {example.answer}" if example.opening else example.answer
        turns = [*example.history, Turn(USER, example.question), Turn(ASSISTANT, answer)]
        texts = self._writer.asked_and_whole(turns)
        asked, ids = (
            list(self.tokenizer(text, add_special_tokens=not self.has_template)["input_ids"])
            for text in texts
        )
        end = self.tokenizer.eos_token_id
        return asked, ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _unpadded(self, ids: Sequence[int]) -> list[int]:
        """0 for every id that its collator takes for padding."""
        padding = self.tokenizer.pad_token_id
        padding = self.tokenizer.eos_token_id if padding is None else padding
        return [int(token != padding) for token in ids]

    def _settled(self, example: Example) -> Example:
        """The example as it is written: one that is plain text is two halves of a running text."""
        if example.is_text or not self.is_plain(example):
            return example
        system = [] if self._system_prompt is None else [Turn(SYSTEM, self._system_prompt)]
        has_own = any(turn.role == SYSTEM for turn in example.history)
        said = [*(() if has_own else system), *example.history]
        before = "\n\n".join(turn.content for turn in said)
        prompt = _continued(self.format.prefix + example.question, example.opening)
        prompt = f"{before}\n\n{prompt}" if before else prompt
        whole = _continued(prompt, example.answer)
        return Example(prompt, whole[len(prompt) :], is_text=True)

    def _start(self, example: Example) -> list[int]:
        """The ids before the text of an example; a chat template writes its own."""
        return self._start_ids if example.is_text or not self.has_template else []

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _tokenize(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[Span]]:
        """The ids of a text, and from which to before which one they hold characters of each span.

        The text is tokenised in one piece, as the model would write it itself: some tokenizers
        would put a word-start mark of their own before a lone answer.
        """
        if not self.tokenizer.is_fast:
            ids = self._ids(text)
            return ids, [self._place_by_agreement(ids, text, span) for span in spans]
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        if _leaves_out(offsets, text):
            return ids, [self._place_by_agreement(ids, text, span) for span in spans]
        return ids, [_place(offsets, span) for span in spans]

    def _place_by_agreement(self, ids: list[int], text: str, span: Span) -> Span:
        """Of a tokenizer that does not say where its tokens stand, or not rightly."""
        heads = [self._ids(text[:boundary]) for boundary in span]
        first, end = (
            next((i for i, (a, b) in enumerate(zip(ids, head, strict=False)) if a != b), None)
            for head in heads
        )
        first = min(len(heads[0]), len(ids)) if first is None else first
        end = min(len(heads[1]), len(ids)) if end is None else end + 1
        return first, max(first, end)

    def _end_after(self, ids: Sequence[int], start: int, stop: int) -> int | None:
        """Where, from `start` and before `stop`, the token stands that ends a turn.

        It is the first special one, or an added one if that comes first of all.
        """
        after = range(start, stop)
        word = next((i for i in after if self.tokenizer.decode(ids[i : i + 1]).strip()), None)
        if word is not None and ids[word] in self._added:
            return word
        return next((i for i in after if ids[i] in self._special), None)

    def _find_turn_end(self) -> int | None:
        """The token that ends a turn of the assistant."""
        self._final_id: int | None = self.tokenizer.eos_token_id
        tokens = self._encode(Example("Hi", _ANSWER.content))
        end = next((i for i in reversed(tokens.labels) if i != IGNORE_INDEX), None)
        return end if tokens.closed else None

    def _find_end_between_turns(self) -> int | None:
        """The token that ends such a turn where the user goes on.

        Some templates write nothing after the last answer, and the model ends it with the token
        that begins the user's turn.
        """
        if not self.has_template:
            return None
        mark = "QuestionMark7"
        turns = [Turn(USER, "Hi"), Turn(ASSISTANT, "AnswerMark7"), Turn(USER, mark)]
        try:
            text, spans = self._writer.write(turns, [1])
        except UsageError:  # a template for single questions
            return None
        asked = text.find(mark)
        ids, (answer, following) = self._tokenize(text, [*spans, (asked, asked + len(mark))])
        found = None if asked < 0 else self._end_after(ids, answer[1], following[0])
        return None if found is None else ids[found]

    def _has(self, token: int) -> bool:
        return self.vocabulary is None or token < self.vocabulary


def ends_of(generation_config: Any) -> frozenset[int]:
    """The ids that end a turn by a model's generation config; empty where there is none."""
    ends = getattr(generation_config, "eos_token_id", None)
    listed = ends if isinstance(ends, list | tuple) else [ends]
    return frozenset(i for i in listed if type(i) is int and i >= 0)


def pad_id_of(tokenizer: PreTrainedTokenizerBase, vocabulary: int | None) -> int:
    """An id that may fill a batch: one that the model has, of so many.

    Args:
        tokenizer: The tokenizer.
        vocabulary: How many ids the model has, see `vocabulary_of`; None for all.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    known = (i for i in candidates if i is not None and (vocabulary is None or i < vocabulary))
    return int(next(known))


def vocabulary_of(config: Any) -> int | None:
    """How many ids a model has embeddings for, by its configuration; None where that says none."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def context_of(config: Any) -> float:
    """The most tokens that a model takes, by its configuration; inf where that says none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def _writer(
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
    system: str | None,
    form: PromptFormat,
) -> Writer:
    has_template = tokenizer.chat_template is not None
    if form.template == CHAT and not has_template:
        raise UsageError(
            f"the tokenizer {tokenizer.name_or_path} must have a chat template for the "
            "prompt_format chat, but it has none: leave prompt_format out, or give a template."
        )
    if form.template in (None, CHAT) and has_template:
        if form.like:
            return _open_unlearning_writer(tokenizer, template_kwargs, system, form.prefix)
        return TemplateWriter(tokenizer, system, template_kwargs, form.prefix)
    if template_kwargs:
        other = f"the prompt_format is {form.template!r}" if form.template else "it has none"
        raise UsageError(
            f"chat_template_kwargs must go with a chat template, but got {dict(template_kwargs)} "
            f"for the tokenizer {tokenizer.name_or_path}, and {other}: leave them out."
        )
    return PlainWriter(tokenizer, system, None if form.plain else form.template, form.prefix)


def _open_unlearning_writer(
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
    system: str | None,
    prefix: str,
) -> Writer:
    """The chat template with the system prompt and the date of open-unlearning's configurations."""
    options = dict(template_kwargs)
    if "date_string" in str(tokenizer.chat_template):
        options.setdefault("date_string", OPEN_UNLEARNING_DATE)
    prompt = OPEN_UNLEARNING_SYSTEM if system is None else system
    writer = TemplateWriter(tokenizer, prompt, options, prefix)
    if system is None and not writer.takes_system:
        writer.system_prompt = None
    return writer


def _continued(text: str, more: str) -> str:
    """A text that goes on, after a space where neither has one."""
    apart = not text or not more or text[-1].isspace() or more[0].isspace()
    return text + more if apart else f"{text} {more}"


def _start_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before every text by itself; a chat template writes its own.

    Such as a BOS token, or GLM's [gMASK]<sop>.
    """
    ids: list[int] = tokenizer("x")["input_ids"]
    bare: list[int] = tokenizer("x", add_special_tokens=False)["input_ids"]
    found = (i for i in range(len(ids)) if ids[i : i + len(bare)] == bare)
    return ids[: next(found, 0)]


def _known_thoughts(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """The marks of thoughts that the tokenizer or its template knows."""
    known = f"{tokenizer.chat_template} {' '.join(tokenizer.get_added_vocab())}"
    return [pair for pair in THOUGHTS if any(mark in known for mark in pair)]


def _place(offsets: Sequence[Span], span: Span) -> Span:
    """From which to before which token a span of characters reaches."""
    begins, ends = span
    first = next((i for i, (_, end) in enumerate(offsets) if end > begins), len(offsets))
    rest = range(first, len(offsets))
    return first, next((i for i in rest if offsets[i][0] >= ends), len(offsets))


def _leaves_out(offsets: Sequence[Span], text: str) -> bool:
    """Whether letters of the text are in no token: one that a tokenizer drops, for want of an id
    for it, moves the places that it gives for those that follow."""
    reached = 0
    for begins, ends in [*offsets, (len(text), len(text))]:
        if text[reached:begins].strip():
            return True
        reached = max(reached, ends)
    return False


def collate(rows: Sequence[Tokens], pad_id: int, side: Literal["left", "right"] = "right") -> Batch:
    """Pads `rows` to one length on the given side.

    Raises:
        ValueError: There is no row.
    """
    if not rows:
        raise ValueError("rows must hold at least one example, but got none.")
    width = max(len(row.ids) for row in rows)

    def pad(values: list[int], filler: int) -> list[int]:
        padding = [filler] * (width - len(values))
        return values + padding if side == "right" else padding + values

    others = [row.alternative for row in rows if row.alternative is not None]
    return Batch(
        input_ids=torch.tensor([pad(row.ids, pad_id) for row in rows]),
        attention_mask=torch.tensor([pad(row.attention or [1] * len(row.ids), 0) for row in rows]),
        labels=torch.tensor([pad(row.labels, IGNORE_INDEX) for row in rows]),
        padded_left=side == "left" and any(len(row.ids) < width for row in rows),
        alternative=collate(others, pad_id, side) if len(others) == len(rows) else None,
    )
