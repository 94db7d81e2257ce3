"""Evaluations kept for the next time: those of an original, which many results compare with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mollm.errors import UsageError
from mollm.evaluation.suite import Suite
from mollm.evaluation.summary import Evaluation
from mollm.models.forward import own_tensors
from mollm.system import machine
from mollm.system.folders import complete

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PART = 1 << 24
_PACKAGES = ("mollm", "torch", "transformers")


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
    """A hash of all that figures depend on: every weight, the tokenizer, the data, the settings,
    and the releases that compute them.

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
        "vocabulary": tokenizer.get_vocab(),
        "template": tokenizer.chat_template,
        "sets": sets,
        "logs": logs,
        "settings": dict(settings),
        "versions": {n: v for n, v in machine.versions().items() if n in _PACKAGES},
    }
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def cached(key: str, make: Callable[[], Evaluation]) -> tuple[Evaluation, bool]:
    """The evaluation of that key, made where it is not kept; and whether it was.

    A cache that cannot be read or written is as one that is empty.
    """
    folder = cache_folder() / key
    try:
        return Evaluation.read(folder), True
    except UsageError:
        pass
    made = make()
    try:
        with complete(folder) as stage:
            made.write(stage)
    except (UsageError, OSError):
        pass
    return made, False


def _hash_of(model: PreTrainedModel) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in sorted(own_tensors(model).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().contiguous().view(-1)
        for start in range(0, len(flat), _PART):
            part = flat[start : start + _PART].cpu()
            digest.update(part.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
