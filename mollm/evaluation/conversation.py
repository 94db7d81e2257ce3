"""A reply as it is written, token by token, for a person who waits for it."""

from __future__ import annotations

import contextlib
import contextvars
import math
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mollm.data.chat import ChatFormat, Example, context_of, ends_of
from mollm.errors import UsageError
from mollm.evaluation.generation import MAX_NEW_TOKENS, Reply, written_by
from mollm.models.forward import in_evaluation_mode
from mollm.system.precision import autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNFINISHED_LETTER = "\ufffd"


_COLDEST = 1e-3
"""Below it one token is left anyway, and logits divided by it are beyond any number."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest one at temperature 0.

    Raises:
        UsageError: A value is out of range.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """Of how many tokens one is drawn; 0 for all."""
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, right, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            (
                "temperature",
                self.temperature == 0 or _COLDEST <= self.temperature < math.inf,
                f"0, or at least {_COLDEST}",
            ),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a positive number"),
        ):
            if not right:
                raise UsageError(f"{name} must be {rule}, but got {getattr(self, name)}.")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            raise UsageError("top_p and top_k need a temperature above 0: give one, such as 0.7.")

    def options(self) -> dict[str, Any]:
        """Those of `generate`, the model's own defaults overruled."""
        drawn = self.temperature > 0
        found: dict[str, Any] = {
            "do_sample": drawn,
            "repetition_penalty": self.repetition_penalty,
            "num_beams": 1,
        }
        if drawn:
            found |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return found


class ReplyStream:
    """The pieces of a reply; when they have all been read, `reply` is the whole.

    The model writes a token when the next piece is asked for, and waits in between: several
    replies, read in turn, are written in turn.

    Args:
        model: A causal language model.
        chat: The format of its tokenizer.
        question: What to ask; of an example all but the answer.
        sampling: How tokens are chosen.

    Raises:
        UsageError: The question leaves no room for a reply in the model's context, or has tokens
            that the model has no embeddings for.
    """

    def __init__(
        self, model: PreTrainedModel, chat: ChatFormat, question: str | Example, sampling: Sampling
    ) -> None:
        self._model, self._chat, self._sampling = model, chat, sampling
        asked = chat.encode_prompt(question)
        chat.refuse_unknown(asked, "the question")
        self._prompt = asked.ids
        self._room = _room(model, len(self._prompt), sampling.max_new_tokens)
        self.reply: Reply | None = None

    def __iter__(self) -> Iterator[str]:
        stops = self._chat.stop_ids | ends_of(getattr(self._model, "generation_config", None))
        form = self._chat.format
        ids: list[int] = []
        said, complete = "", False
        with contextlib.closing(self._tokens(stops)) as tokens:
            for token in tokens:
                complete = token in stops
                if complete:
                    break
                ids.append(token)
                text, complete = form.until_stop(self._chat.read_reply(ids)[0])
                held = 0 if complete else form.begun(text)
                text = text[: len(text) - held].lstrip().rstrip(_UNFINISHED_LETTER)
                if not text.startswith(said):  # what was said turned out to be a thought
                    yield "\n"
                    said = ""
                if len(text) > len(said):
                    yield text[len(said) :]
                    said = text
                if complete:
                    break
        text, thinking = self._chat.read_reply(ids)
        text, _ = form.until_stop(text)
        if not complete and len(text.strip()) > len(said) and text.strip().startswith(said):
            yield text.strip()[len(said) :]  # what could have been the beginning of a stop word
        self.reply = Reply(text.strip(), complete, thinking)

    def _tokens(self, stops: frozenset[int]) -> Generator[int, None, None]:
        device = self._model.device
        ids = torch.tensor([self._prompt], device=device)
        steps = _Steps()

        def write() -> None:
            steps.wait()
            with in_evaluation_mode(self._model), autocast(device):
                asked = {
                    "input_ids": ids,
                    "attention_mask": torch.ones_like(ids),
                    "max_new_tokens": self._room,
                    "pad_token_id": self._chat.pad_id,
                    "eos_token_id": sorted(stops) or None,
                    **self._sampling.options(),
                }
                written_by(self._model, asked, steps)

        yield from steps.run(write)


def _room(model: PreTrainedModel, asked: int, wanted: int) -> int:
    context = context_of(model.config)
    if asked >= context:
        raise UsageError(
            f"a question must leave room for a reply in the model's context of {context} tokens, "
            f"but it takes {asked} with all that was said before it: shorten it, or begin anew."
        )
    return int(min(wanted, context - asked))


class _Stopped(BaseException):
    pass


class _Steps:
    """A streamer of `generate` that hands out one token at a time, and waits to be asked."""

    def __init__(self) -> None:
        self._go = threading.Semaphore(0)
        self._out: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._stop = self._asked = False

    def put(self, value: torch.Tensor) -> None:
        if not self._asked:  # the prompt comes first
            self._asked = True
            return
        self._out.put(int(value.flatten()[0]))
        self.wait()

    def end(self) -> None:
        """Nothing is left to hand out."""

    def wait(self) -> None:
        self._go.acquire()
        if self._stop:
            raise _Stopped

    def run(self, write: Callable[[], None]) -> Iterator[int]:
        def guarded() -> None:
            try:
                write()
            except BaseException as error:
                self._out.put(error)
            else:
                self._out.put(None)

        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(guarded,), daemon=True)
        thread.start()
        try:
            while True:
                self._go.release()
                found = self._out.get()
                if found is None:
                    return
                if isinstance(found, BaseException):
                    raise found
                yield found
        finally:
            self._stop = True
            self._go.release()
            thread.join()
