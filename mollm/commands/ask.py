"""`mollm ask`: a model and its original answer the same questions."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mollm.commands.arguments import (
    NO_ORIGINAL,
    add_loading,
    chat_options,
    check_seed,
    device_of,
)
from mollm.errors import UsageError
from mollm.system.parsing import lines_of, read_text, user_path
from mollm.system.terminal import (
    has_colour,
    paint,
    printable,
    side_by_side,
    terminal_width,
    wrapped,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mollm.data.chat import ChatFormat, Example
    from mollm.data.conversations import Turn
    from mollm.evaluation.conversation import ReplyStream, Sampling
    from mollm.evaluation.generation import Reply

_SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers of `mollm`."""
    parser = commands.add_parser(
        "ask",
        help="ask a model and its original the same questions, side by side",
        description=(
            "Asks a model and the one that it was unlearned from the same question: once, from a "
            "file, or as a conversation with each where no question is given. The original is "
            "found in the folder of the run that made the model, else in its card."
        ),
    )
    parser.add_argument("model", metavar="MODEL", help="a run, model folder, .gguf file, hub name")
    parser.add_argument("question", metavar="QUESTION", nargs="*", help="what to ask")
    parser.add_argument(
        "--original",
        metavar="PATH_OR_HUB_NAME",
        help="the model before unlearning, or none (default: as the run says)",
    )
    parser.add_argument(
        "--file",
        type=user_path,
        metavar="PATH",
        help="questions: a .txt file with one a line, or data as for `mollm unlearn`",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="longest reply (default: 200)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0, the default, takes the likeliest token; more draws",
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among K tokens")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn")
    add_loading(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object for each question"
    )
    parser.set_defaults(run=_ask)


@dataclass
class _Speaker:
    """A model that is asked, and what it said."""

    name: str
    model: PreTrainedModel
    chat: ChatFormat
    sampling: Sampling
    history: list[Turn] = field(default_factory=list)

    def stream(self, question: str | Example) -> ReplyStream:
        from mollm.data.chat import Example
        from mollm.evaluation.conversation import ReplyStream

        if self.history:
            assert isinstance(question, str), "a conversation goes on with words"
            question = Example(question, "", history=tuple(self.history))
        return ReplyStream(self.model, self.chat, question, self.sampling)

    def remember(self, question: str, reply: Reply) -> None:
        from mollm.data.conversations import ASSISTANT, USER, Turn

        self.history += [Turn(USER, question), Turn(ASSISTANT, reply.text)]


def _ask(arguments: argparse.Namespace) -> int:
    import torch

    from mollm.evaluation.conversation import Sampling

    if arguments.question and arguments.file:
        raise UsageError("question and --file must not both be given: leave out one.")
    check_seed(arguments.seed)
    sampling = Sampling(**{name: getattr(arguments, name) for name in _SAMPLING})
    questions = _questions(arguments)
    speakers = _speakers(arguments, sampling)
    torch.manual_seed(arguments.seed)
    if questions is None:
        _say_where_alone(arguments, speakers)
        _converse(speakers, arguments.json)
        return 0
    for number, (shown, question) in enumerate(questions):
        if len(questions) > 1 and not arguments.json:
            head = paint(printable(shown), "bold", colour=has_colour(sys.stdout))
            print(f"\n{head}" if number else head)
        _answer(speakers, shown, question, arguments.json)
    _say_where_alone(arguments, speakers)
    return 0


def _say_where_alone(arguments: argparse.Namespace, speakers: Sequence[_Speaker]) -> None:
    if len(speakers) == 1 and arguments.original is None:
        print(
            "The original of this model is not known: name it with --original to compare.",
            file=sys.stderr,
        )


def _questions(arguments: argparse.Namespace) -> list[tuple[str, str | Example]] | None:
    """What is shown of each question, and what is asked; None for a conversation."""
    if arguments.question:
        text = " ".join(arguments.question)
        if not text.strip():
            raise UsageError("question must be a text that is not blank, but it is.")
        return [(text, text)]
    if arguments.file is None:
        return None
    if arguments.file.suffix == ".txt":
        lines = [line for line in lines_of(read_text(arguments.file)) if line.strip()]
        if not lines:
            raise UsageError(f"{arguments.file} must hold a question a line, but it holds none.")
        return [(line, line) for line in lines]
    from mollm.data.encoding import example_of
    from mollm.data.sets import records_of

    found = records_of(arguments.file, "forget")
    records = {(record.prompt, record.history): record for record in found}
    if any(record.prompt == "" for record in found):
        raise UsageError(f"{arguments.file} must hold questions, but it holds running text.")
    return [(record.prompt, example_of(record)) for record in records.values()]


def _speakers(arguments: argparse.Namespace, sampling: Sampling) -> list[_Speaker]:
    import torch

    from mollm.data.chat import ChatFormat
    from mollm.models import loading
    from mollm.report.run_file import model_of, original_of, run_of

    name = model_of(arguments.model)
    original = arguments.original or original_of(name)
    named = {"original": original} if original not in (None, NO_ORIGINAL) else {}
    device, dtype = device_of(arguments.device), getattr(torch, arguments.dtype)
    spoken = chat_options(vars(arguments), run_of(name))
    speakers = []
    for role, source in {**named, "result": name}.items():
        model, tokenizer = loading.load(loading.find_model(source), device, dtype)
        chat = ChatFormat.of(
            model,
            tokenizer,
            template_kwargs=spoken["chat_template_kwargs"],
            system_prompt=spoken["system_prompt"],
            prompt_format=spoken["prompt_format"],
        )
        speakers.append(_Speaker(role, model, chat, sampling))
    return speakers


def _answer(
    speakers: Sequence[_Speaker], shown: str, question: str | Example, as_json: bool
) -> list[Reply]:
    """Has all answer, shows it as it comes, and returns what they said."""
    streams = [speaker.stream(question) for speaker in speakers]
    if as_json:
        replies = [_whole(stream) for stream in streams]
        said = {s.name: vars(reply) for s, reply in zip(speakers, replies, strict=True)}
        print(json.dumps({"question": shown, **said}, ensure_ascii=False), flush=True)
        return replies
    if sys.stdout.isatty():
        space = 3 * (len(streams) - 1)
        width = (terminal_width() - space) // len(streams)
        columns = [_column(*pair, width) for pair in zip(speakers, streams, strict=True)]
        for line in side_by_side(columns, width):
            print(line, flush=True)
    else:
        for speaker, stream in zip(speakers, streams, strict=True):
            label = f"{speaker.name}: " if len(speakers) > 1 else ""
            print(f"{label}{printable(str(_whole(stream)))}", flush=True)
    return [_said(stream) for stream in streams]


def _column(speaker: _Speaker, stream: ReplyStream, width: int) -> Iterator[str]:
    yield speaker.name
    yield from wrapped(_with_end(stream), width)


def _with_end(stream: ReplyStream) -> Iterator[str]:
    yield from stream
    reply = _said(stream)
    if not reply.complete:
        yield " …"
    elif not reply.text:
        yield "(nothing)"


def _whole(stream: ReplyStream) -> Reply:
    for _ in stream:
        pass
    return _said(stream)


def _said(stream: ReplyStream) -> Reply:
    assert stream.reply is not None, "the stream has been read"
    return stream.reply


def _converse(speakers: Sequence[_Speaker], as_json: bool) -> None:
    """A conversation with each: every model sees its own replies."""
    asked = sys.stdin.isatty()
    if asked:
        import readline  # noqa: F401  # gives input() its history and its keys

        print("Ask something. /new begins anew, Ctrl-C stops a reply, Ctrl-D ends.")
    while True:
        try:
            question = input("\n> " if asked else "").strip()
        except EOFError:
            return
        if question == "/new":
            for speaker in speakers:
                speaker.history.clear()
        elif question:
            try:
                replies = _answer(speakers, question, question, as_json)
            except KeyboardInterrupt:
                print("\n(stopped)")
                continue
            except UsageError as error:
                if not asked:
                    raise
                print(error)
                continue
            for speaker, reply in zip(speakers, replies, strict=True):
                speaker.remember(question, reply)
