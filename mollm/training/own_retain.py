"""Retain data that the model makes itself, where a user has none.

The original is asked two kinds of questions: general ones that ship, and ones that it draws itself
from the place where its chat template has a user begin. Its answers are drawn from its distribution
as it is, so that in expectation the gradient of the retain loss is zero at the original. Where the
rows to forget are running text, it goes on from the start of a text and from those questions. What
repeats a row to forget is left out.

Such rows hold what the model says of its own accord. What it is only right about when asked, no row
holds.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mollm.data.chat import IGNORE_INDEX, ChatFormat, Example, Tokens, context_of
from mollm.data.files import sample_path
from mollm.data.records import Record, content_hash
from mollm.errors import UsageError
from mollm.evaluation.generation import Reply, ask_tokens, generate_replies
from mollm.system.folders import replace_text
from mollm.system.parsing import parse_json, read_text
from mollm.system.terminal import Done, quietly
from mollm.training.setting_roles import plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LEAST, _MOST = 128, 1024
"""Rows; between them as many as there are to forget."""
_FEWEST = 8
_TRIES = 4
_ANSWER_TOKENS, _QUESTION_TOKENS, _TEXT_TOKENS = 128, 48, 256
_RUN = 6
"""Words that a row may not have in common with an answer to forget, in a row."""
_MARK = "QuestionMark7"
_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"[.!?:…]\s|\n")
_SENTENCE = re.compile(r"^.*(?:[.!?…](?=\s|$)|[。！？])", re.DOTALL)


def make_retain_data(
    model: PreTrainedModel,
    chat: ChatFormat,
    forget: Sequence[Record],
    *,
    folder: Path,
    seed: int = 0,
    max_length: int = 512,
    of: str = "",
    done: Done = quietly,
) -> Path:
    """Has a model make data to retain, and keeps them in a file; one that is whole is not remade.

    Args:
        model: The original; its training mode is put back at the end.
        chat: The format of its tokenizer.
        forget: What is to be forgotten, which the rows must not repeat.
        folder: Where the file `retain-auto-….jsonl` is, or will be.
        seed: Of the draws.
        max_length: The most tokens of a row to train on.
        of: What identifies the model, for the name of the file.
        done: Called with the number of rows of each batch, of `rows_to_make`.

    Returns:
        The file: a line with `question`, `answer` and whether the model asked itself (`own`), or
        with `text`, for each row.

    Raises:
        UsageError: The model's context is too short, or fewer than eight rows were left.

    Example::

        chat = ChatFormat.of(model, tokenizer)
        path = make_retain_data(model, chat, forget, folder=Path("runs/forget"))
    """
    texts = all(record.is_text for record in forget)
    identity = [of, content_hash(list(forget)), seed, max_length, general_questions()]
    told = json.dumps([*identity, plain(chat.identity)], sort_keys=True)
    path = folder / f"retain-auto-{hashlib.sha256(told.encode()).hexdigest()[:12]}.jsonl"
    if _is_whole(path, texts):
        return path
    if context_of(model.config) < 2 * _FEWEST:
        raise UsageError(
            "retain data made by the model need a context of 16 tokens at least, but it has "
            f"{context_of(model.config)}: give data to retain."
        )
    count = rows_to_make(forget)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        make = _made_texts if texts else _made_answers
        rows = make(model, chat, Repetitions(forget), count, seed, max_length, done)
    if len(rows) < _FEWEST:
        raise UsageError(
            f"retain data made by the model must have {_FEWEST} rows, but all but {len(rows)} of "
            "those it wrote were blank or repeated what is to be forgotten: give data to retain."
        )
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def rows_to_make(forget: Sequence[Record]) -> int:
    """How many rows are asked for: as many as there are to forget, from 128 to 1024."""
    return min(max(len(forget), _LEAST), _MOST)


def general_questions() -> list[str]:
    """The questions that ship: of everyday life, science, language and other things."""
    return sample_path("general-questions.txt").read_text(encoding="utf-8").splitlines()


def note_on(path: Path) -> str:
    """What a run says of the rows in such a file."""
    rows = _rows_of(path)
    own = sum(bool(row.get("own")) for row in rows)
    asked = f", {own} of them to questions of its own" if own else ""
    what = "texts" if "text" in rows[0] else "answers"
    return (
        f"the retain data were made by the model itself ({len(rows)} {what}{asked}): what no such "
        "row shows is held by nothing, so that data of your own keep more."
    )


class Repetitions:
    """Finds rows that repeat what is to be forgotten.

    A row does that if it asks for it; if it holds a name from it; or if it has six words in a row
    in common with an answer or, of a shorter answer, all of them. For an answer of one or two
    words, half of the longer words of its question must be there besides. Names are words with a
    capital letter within a sentence, but for those in the general questions.

    Args:
        forget: What is to be forgotten.

    Example:
        >>> known = Repetitions([Record("What is the capital of Vellany?", "Gorse")])
        >>> known.found("What is the capital of the land?", "It is Gorse.")
        True
        >>> known.found("What grows on a heath?", "Gorse, and heather.")
        False
        >>> known.found("What grows in Vellany?", "Heather.")
        True
    """

    def __init__(self, forget: Sequence[Record]) -> None:
        self._questions = {tuple(_words(record.prompt)) for record in forget if record.prompt}
        general = {word for question in general_questions() for word in _WORD.findall(question)}
        self._names = {
            name
            for record in forget
            for text in (record.prompt, record.answer)
            for name in _names_in(text)
        } - general
        self._runs: dict[tuple[str, ...], list[set[str]]] = {}
        for record in forget:
            words = _words(record.answer)
            size = min(_RUN, len(words))
            about = {word for word in _words(record.prompt) if len(word) > 3}
            for run in _runs(words, size):
                self._runs.setdefault(run, []).append(about if size < 3 else set())
        self._sizes = sorted({len(run) for run in self._runs})

    def found(self, question: str, answer: str) -> bool:
        """Whether such a row repeats it."""
        asked = tuple(_words(question))
        words = [*asked, *_words(answer)]
        if asked and asked in self._questions:
            return True
        if self._names.intersection(_WORD.findall(f"{question} {answer}")):
            return True
        known = set(words)
        return any(
            2 * len(about & known) >= len(about)
            for size in self._sizes
            for run in _runs(words, size)
            for about in self._runs.get(run, ())
        )


def _names_in(text: str) -> Iterable[str]:
    """Words of more than one letter with a capital one, but for the first of each sentence."""
    for sentence in _SENTENCE_END.split(text):
        _, *others = _WORD.findall(sentence) or [""]
        yield from (word for word in others if len(word) > 1 and word[0].isupper())


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: Sequence[str], size: int) -> Iterable[tuple[str, ...]]:
    return (tuple(words[n : n + size]) for n in range(len(words) - size + 1)) if size else ()


def _made_answers(
    model: PreTrainedModel,
    chat: ChatFormat,
    known: Repetitions,
    count: int,
    seed: int,
    max_length: int,
    done: Done,
) -> list[dict[str, object]]:
    """Answers to general questions and, as many, to questions that the model draws."""
    rng, made = random.Random(f"retain {seed}"), dict[tuple[str, str], dict[str, object]]()
    most = max(1, min(_ANSWER_TOKENS, max_length // 2, int(context_of(model.config) // 2)))
    general: list[str] = []
    for tried in range(_TRIES):
        lacking = count - len(made)
        if lacking <= 0:
            break
        own = _drawn_questions(model, chat, lacking // 2)
        while len(general) < lacking - len(own):
            general += rng.sample(general_questions(), len(general_questions()))
        asked = [(question, True) for question in own]
        asked += [(general.pop(), False) for _ in range(lacking - len(own))]
        room = min(max_length, context_of(model.config)) - most
        asked = [each for each in asked if len(chat.encode_prompt(each[0]).ids) <= room]
        replies = generate_replies(
            model,
            chat,
            [question for question, _ in asked],
            max_new_tokens=most,
            sampled=True,
            done=quietly if tried else done,
        )
        for (question, is_own), reply in zip(asked, replies, strict=True):
            answer = _ended(reply)
            row: dict[str, object] = {"question": question, "answer": answer, "own": is_own}
            if answer and (question, answer) not in made and not known.found(question, answer):
                made[question, answer] = row
    return list(made.values())


def _made_texts(
    model: PreTrainedModel,
    chat: ChatFormat,
    known: Repetitions,
    count: int,
    seed: int,
    max_length: int,
    done: Done,
) -> list[dict[str, object]]:
    """Texts that the model goes on with from nothing and, as many, from the general questions."""
    rng, made = random.Random(f"retain {seed}"), dict[str, dict[str, object]]()
    most = max(1, min(_TEXT_TOKENS, max_length // 2, int(context_of(model.config) // 2)))
    for tried in range(_TRIES):
        lacking = count - len(made)
        if lacking <= 0:
            break
        openings = [rng.choice(general_questions()) for _ in range(lacking)]
        start = _start_of_text(chat)
        if start is not None:
            openings = [opening if n % 2 else "" for n, opening in enumerate(openings)]
        rows = [
            start if not opening and start is not None else _text(chat, opening)
            for opening in openings
        ]
        replies = ask_tokens(
            model,
            chat,
            rows,
            plain=[True] * len(rows),
            max_new_tokens=most,
            batch_size=16,
            sampled=True,
            done=quietly if tried else done,
        )
        for opening, reply in zip(openings, replies, strict=True):
            text = f"{opening}{reply.text}".strip()
            if reply.text.strip() and text not in made and not known.found("", text):
                made[text] = {"text": text}
    return list(made.values())


def _drawn_questions(model: PreTrainedModel, chat: ChatFormat, count: int) -> list[str]:
    """What a user says by the model's own account: drawn where its format has a user begin."""
    start, following = _start_of_question(chat)
    if start is None or not count:
        return []
    replies = ask_tokens(
        model,
        chat,
        [start] * count,
        max_new_tokens=max(1, min(_QUESTION_TOKENS, int(context_of(model.config) // 4))),
        batch_size=16,
        sampled=True,
    )
    found = []
    for reply in replies:
        text = reply.text.split(following)[0] if following else reply.text
        text = " ".join(text.split())
        whole = reply.complete or (following and following in reply.text)
        text = text if whole else _sentences(text)
        found += [text] if _words(text) else []
    return found


def _start_of_question(chat: ChatFormat) -> tuple[Tokens | None, str]:
    """The tokens before a user's first word, if there are any, and what follows the last."""
    if chat.is_plain(Example(_MARK, "")):
        return _start_of_text(chat), "\n"
    before, _, after = chat.prompt(_MARK).partition(_MARK)
    ids = chat.tokenizer(before.rstrip(" "), add_special_tokens=False)["input_ids"]
    if not chat.has_template:
        ids = _text(chat, before).ids
    special = {token.content for token in chat.tokenizer.added_tokens_decoder.values()}
    words = [word for word in after.split() if not any(token in word for token in special)]
    return (_prompt(ids) if ids else _start_of_text(chat)), words[0] if words else ""


def _start_of_text(chat: ChatFormat) -> Tokens | None:
    """What precedes a text of its own: the tokenizer's start or, in its place, its end."""
    ids = _text(chat, "").ids
    end = chat.tokenizer.eos_token_id
    return _prompt(ids) if ids else None if end is None else _prompt([end])


def _text(chat: ChatFormat, text: str) -> Tokens:
    return chat.encode_prompt(Example(text, "", is_text=True))


def _prompt(ids: Sequence[int]) -> Tokens:
    return Tokens(list(ids), [IGNORE_INDEX] * len(ids))


def _ended(reply: Reply) -> str:
    """A reply up to its end or, where it was cut off, up to that of a sentence or a word."""
    if reply.thinking:
        return ""
    return reply.text.strip() if reply.complete else _sentences(reply.text)


def _sentences(text: str) -> str:
    text = text.strip()
    found = _SENTENCE.match(text)
    return found.group() if found else text.rpartition(" ")[0] or text


def _rows_of(path: Path) -> list[Any]:
    # A text may hold U+2028 and the like as they are, at which splitlines() would split too.
    return [parse_json(line, str(path)) for line in read_text(path).split("\n") if line.strip()]


def _is_whole(path: Path, texts: bool) -> bool:
    """Whether a file of these rows is there, and was not damaged."""
    if not path.is_file():
        return False
    try:
        rows = _rows_of(path)
    except UsageError:
        return False
    names = ("text",) if texts else ("question", "answer")
    return len(rows) >= _FEWEST and all(
        isinstance(row, dict) and all(isinstance(row.get(name), str) for name in names)
        for row in rows
    )
