"""Chat templates, which come with a model and are programs: whether they end."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING

from mollm.data.templates import TEMPLATE_FAILURES
from mollm.errors import UsageError
from mollm.system.child import why_not
from mollm.system.units import GIB

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DEFAULT = "default"
_SECONDS = 5.0
_BYTES = GIB
_SYSTEM = {"role": "system", "content": "You are kind."}
_QUESTION = {"role": "user", "content": "What is the capital of Peru, and who said so in 1821?"}
_ANSWER = {"role": "assistant", "content": "It is Lima.\n"}


def _written(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    turns: list[dict[str, str]],
    *,
    opened: bool,
) -> str:
    """A conversation by a template; with a turn of the system where it fails without one."""

    def write(turns: list[dict[str, str]]) -> str:
        return str(
            tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=opened
            )
        )

    try:
        return write(turns)
    except Exception:
        with contextlib.suppress(Exception):
            return write([_SYSTEM, *turns])
        raise


def vet_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Tries a tokenizer out on a short conversation, in a process with a limit of time and memory.

    A template can loop for ever, and so can the patterns of a tokenizer. Where this returns, both
    have ended once, on a question alone and on one with its answer.

    Raises:
        UsageError: The template or the tokenizer fails or takes too long or too much memory.
    """
    template = tokenizer.chat_template

    def write() -> None:
        texts = ["Question: What is it?\nAnswer: It is Lima."]
        if template is not None:
            talks = ([_QUESTION], True), ([_QUESTION, _ANSWER], False)
            named = template if isinstance(template, dict) else {_DEFAULT: template}
            for (name, one), (turns, opened) in itertools.product(named.items(), talks):
                try:
                    texts.append(_written(tokenizer, one, turns, opened=opened))
                except (TemplateError, *TEMPLATE_FAILURES):
                    if name == _DEFAULT or len(named) == 1:
                        raise  # others may want documents or tools, and may never be chosen
        for text in texts:
            if not tokenizer(text, add_special_tokens=False)["input_ids"]:
                raise ValueError("it writes nothing")

    import jinja2.sandbox  # noqa: F401  # not in the copy of this process, which has no locks
    from jinja2 import TemplateError

    reason = why_not(write, _SECONDS, _BYTES)
    if reason is not None:
        what = "tokenizer" if template is None else "chat template of the tokenizer"
        raise UsageError(
            f"the {what} {tokenizer.name_or_path} must write a question and an answer, but it "
            f"fails: {reason}: put another into its chat_template, or choose another model."
        )
