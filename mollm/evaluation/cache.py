"""Evaluations kept for the next time: those of an original, which many results compare with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mollm.errors import UsageError
from mollm.evaluation.records import Record
from mollm.evaluation.suite import Suite
from mollm.evaluation.summary import Evaluation
from mollm.models.forward import own_tensors
from mollm.system import machine
from mollm.system.folders import complete

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PART = 1 << 24
_PACKAGES = ("mollm", "torch", "transformers")
_PASSING = ("padding", "truncation")


def cache_folder() -> Path:
    """Where they are kept: mollm/evaluations in XDG_CACHE_HOME, or in ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "mollm" / "evaluations"


def key_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    settings: Mapping[str, Any],
) -> str:
    """A hash of all that figures depend on: every weight, how the model computes and generates,
    the tokenizer, the data, the settings, and the releases that compute them.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        suite: What it is asked.
        settings: Everything else that `evaluate` is given.
    """
    sets = {name: [asdict(row) for row in rows] for name, rows in suite.groups().items()}
    logs = None if suite.retain_logs is None else [asdict(r) for r in suite.retain_logs]
    about = {
        "weights": _hash_of(model),
        "config": _config_of(model.config),
        "generation": _config_of(getattr(model, "generation_config", None)),
        "tokenizer": _tokenizer_of(tokenizer),
        "sets": sets,
        "logs": logs,
        "settings": dict(settings),
        "versions": {n: v for n, v in machine.versions().items() if n in _PACKAGES},
    }
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def cached(key: str, suite: Suite, make: Callable[[], Evaluation]) -> tuple[Evaluation, bool]:
    """The evaluation of that key, made where it is not kept; and whether it was.

    Figures, scores and replies are kept, for this user's eyes alone; questions and answers are
    not, for the suite holds them. A cache that cannot be read or written is as one that is empty.
    """
    folder = cache_folder() / key
    try:
        kept = Evaluation.read(folder)
        return replace(kept, records=_with_texts(kept.records, suite)), True
    except UsageError:
        pass
    made = make()
    try:
        bare = replace(made, records=_without_texts(made.records, suite))
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.parent.chmod(0o700)
        with complete(folder, private=True) as stage:
            bare.write(stage)
    except (UsageError, OSError):
        pass
    return made, False


def _without_texts(records: Sequence[Record], suite: Suite) -> tuple[Record, ...]:
    """Records with the place of their row in its set in place of its texts.

    They follow the order of the rows, of which some may have been left out.
    """
    rows = {name: enumerate(rows) for name, rows in suite.groups().items()}
    bare = []
    for record in records:
        texts = record.question, record.answer
        place = next(
            (p for p, row in rows.get(record.group, ()) if (row.question, row.answer) == texts),
            None,
        )
        if place is None:
            raise UsageError("the records to keep must be about this suite, but are not.")
        bare.append(replace(record, question=str(place), answer=""))
    return tuple(bare)


def _with_texts(records: Sequence[Record], suite: Suite) -> tuple[Record, ...]:
    """What `_without_texts` was given."""
    groups = suite.groups()
    try:
        return tuple(
            replace(record, question=row.question, answer=row.answer)
            for record in records
            for row in [groups[record.group][int(record.question)]]
        )
    except (LookupError, ValueError) as error:
        raise UsageError("the records kept must be about this suite, but are not.") from error


def _config_of(config: Any) -> Any:
    """What a configuration says, but not where it was read from."""
    if config is None:
        return None
    return {name: v for name, v in config.to_dict().items() if name != "_name_or_path"}


def _tokenizer_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Everything by which a tokenizer turns text into ids; not how it last padded and cut."""
    about: dict[str, Any] = {
        "vocabulary": tokenizer.get_vocab(),
        "template": tokenizer.chat_template,
        "special": tokenizer.special_tokens_map,
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        about["serialised"] = {n: v for n, v in state.items() if n not in _PASSING}
    return about


def _hash_of(model: PreTrainedModel) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in sorted(own_tensors(model).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().contiguous().view(-1)
        for start in range(0, len(flat), _PART):
            part = flat[start : start + _PART].cpu()
            digest.update(part.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
