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

import bisect
import hashlib
import itertools
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
from mollm.system.parsing import lines_of, parse_json_lines, read_text
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
_IDEOGRAPHS = "々〇㐀-䶿一-鿿豈-\ufaff\U00020000-\U0003ffff"
_KANA = "ぁ-ゟァ-ヺー-ヿｦ-ﾟ"
_SOUTH_EAST = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
"""Thai, Lao, Burmese and Khmer."""
_UNSPACED = {_IDEOGRAPHS: 0.75, _KANA: 0.5, _SOUTH_EAST: 0.25}
"""Letters of scripts without spaces between words, and how much of a word each is."""
_LETTER = re.compile(f"[{''.join(_UNSPACED)}]")
_WEIGHTS = [(re.compile(f"[{letters}]"), weight) for letters, weight in _UNSPACED.items()]
_WORD = re.compile(rf"{_LETTER.pattern}|[^\W{''.join(_UNSPACED)}]+")
_SENTENCE_END = re.compile(r"[.!?:…]\s|\n")
_BEGINNINGS = """
about after again all also although always am among another any anyone anything are aren at because
been before being below both but can cannot certainly could despite did didn does doesn don each
either even every everyone everything finally first for generally had has hasn have he hello hence
her here hers herself hi him himself his however if instead isn it its itself just last later let
like many may maybe meanwhile might more most mostly much must neither never nevertheless next no
nobody none nor nothing now often once only or other others otherwise our perhaps please rather
second several shall she since some someone something sometimes soon still such sure than thanks
their them themselves then therefore these third this those though through throughout thus today
together too under unfortunately unlike until upon us usually was wasn well were weren whatever when
whenever where whereas wherever whether whichever while whoever whom whose will within without won
would yes yet aber als am auch auf aus bei das dem den der des die dies diese dieser ein eine einer
er es für ich ihr ihre im ist ja man mit nach nein nicht nur sein seine seit sie sind und vom von
vor wann war waren warum was welche welcher wenn wer wie wir wo zu zum zur au aux avec ce ces cet
cette comment dans de depuis des deux du elle elles en est et il ils je la le les leur lors mais non
nous on où oui par pour pourquoi quand que quel quelle qui sa selon ses son sur tous tu un une vous
à al como con cuando cuál cuándo cómo de del desde después donde dónde el ella ellas ellos en entre
era es esta este esto estos está fue ha hay la las lo los más no nos para pero por porque que quien
quién qué se según si sin sobre su sus sí también tras un una y yo anche chi che come con cosa da
dal dalla del della di dopo dove durante ed era fu gli ha il in le lei lo loro lui nel nella non per
perché più poi quale quando questa questo sono sua suo è ao aos as até com depois do dos ela ele
eles em foi mas na nas no nos não o onde os ou pela pelo qual quando quem são seu sua também um uma
você às é
"""
"""Words that are no names where a sentence begins with them: English, German, French, Spanish,
Italian and Portuguese."""
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
        UsageError: The model's context is too short, max_length leaves half of the general
            questions no room, or fewer than eight rows were left.

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
    return lines_of(read_text(sample_path("general-questions.txt")))


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
    words, half of the longer words of its question must be there besides. In scripts without spaces
    between words, letters are compared: eight ideographs, twelve kana or twenty-four letters of
    Thai, Lao, Burmese or Khmer are six words.

    Names are words with a capital letter, but for those in the general questions. The first word of
    a sentence is one unless it stands alone, or is common: in the general questions, in small
    letters in the rows to forget, or one with which sentences often begin.

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
        self._names = _names_in([text for each in forget for text in (each.prompt, each.answer)])
        self._runs: set[tuple[str, ...]] = set()
        self._short: dict[tuple[str, ...], list[set[str]]] = {}
        for record in forget:
            words = _words(record.answer)
            size = sum(map(_weight, words))
            if size >= _RUN:
                self._runs.update(_runs(words))
            elif words:
                about = {w for w in _words(record.prompt) if len(w) > 3 or _LETTER.match(w)}
                self._short.setdefault(tuple(words), []).append(about if size < 3 else set())
        self._sizes = sorted({len(words) for words in self._short})

    def found(self, question: str, answer: str) -> bool:
        """Whether such a row repeats it."""
        asked = tuple(_words(question))
        words = [*asked, *_words(answer)]
        if asked and asked in self._questions:
            return True
        if self._names.intersection(_WORD.findall(f"{question} {answer}")):
            return True
        if not self._runs.isdisjoint(_runs(words)):
            return True
        known = set(words)
        return any(
            2 * len(about & known) >= len(about)
            for size in self._sizes
            for start in range(len(words) - size + 1)
            for about in self._short.get(tuple(words[start : start + size]), ())
        )


def _names_in(texts: Sequence[str]) -> set[str]:
    """Words of more than one letter with a capital one that are no common words."""
    general = {word for question in general_questions() for word in _WORD.findall(question)}
    common = {word.lower() for word in general} | set(_BEGINNINGS.split())
    found, first = set[str](), set[str]()
    for sentence in (part for text in texts for part in _SENTENCE_END.split(text)):
        words = _WORD.findall(sentence)
        common.update(word for word in words if word.islower())
        found.update(word for word in words[1:] if len(word) > 1 and word[0].isupper())
        first.update(word for word in words[:1] if len(words) > 1 < len(word))
    return found - general | {w for w in first if w[0].isupper() and w.lower() not in common}


def _words(text: str) -> list[str]:
    """Words in small letters; in scripts without spaces between them, letters."""
    return _WORD.findall(text.lower())


def _weight(word: str) -> float:
    """How much of a word this is."""
    return next((weight for letters, weight in _WEIGHTS if letters.match(word)), 1)


def _runs(words: Sequence[str]) -> Iterable[tuple[str, ...]]:
    """What makes six words, from each word on that as much follows."""
    ends = list(itertools.accumulate(map(_weight, words), initial=0.0))
    for start, before in enumerate(ends):
        end = bisect.bisect_left(ends, before + _RUN)
        if end < len(ends):
            yield tuple(words[start:end])


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
    longest = int(min(max_length, context_of(model.config)))
    most = max(1, min(_ANSWER_TOKENS, longest // 2))

    def fits(question: str) -> bool:
        return len(chat.encode_prompt(question).ids) <= longest - most

    known_questions = [question for question in general_questions() if fits(question)]
    if len(known_questions) < len(general_questions()) // 2:
        size = max(len(chat.encode_prompt(question).ids) for question in general_questions())
        raise UsageError(
            f"max_length must be at least {min(2 * size - 1, size + _ANSWER_TOKENS)} for retain "
            f"data made by the model, whose questions take up to {size} tokens before an answer as "
            f"long, but it is {longest}: raise it, or give data to retain."
        )
    general: list[str] = []
    for tried in range(_TRIES):
        lacking = count - len(made)
        if lacking <= 0:
            break
        own = [
            question for question in _drawn_questions(model, chat, lacking // 2) if fits(question)
        ]
        while len(general) < lacking - len(own):
            general += rng.sample(known_questions, len(known_questions))
        asked = [(question, True) for question in own]
        asked += [(general.pop(), False) for _ in range(lacking - len(own))]
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
    return [row for _, row in parse_json_lines(read_text(path), str(path))]


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
