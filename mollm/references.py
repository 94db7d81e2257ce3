"""The original model, as a training step asks for it: final hidden states, and a head.

    adapter   the model itself with its adapter switched off: no memory, a forward pass
    copy      a frozen copy: a second model, a forward pass
    cache     final hidden states, computed once and kept on disk: no memory, no forward pass

No logits are kept, which would be V / H times as large: the head makes them anew, a chunk of
tokens at a time.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mollm.chat import IGNORE_INDEX, Batch, Tokens, collate
from mollm.errors import UsageError
from mollm.folder import complete
from mollm.methods import Answers, answers_of, sequences_of
from mollm.models import answer_states, freeze, head_weights, in_evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFERENCES = ("auto", "adapter", "copy", "cache")

_SHARD_BYTES = 256 << 20
_INDEX = "index.json"


class Reference(Protocol):
    """The original model."""

    def answers(self, batch: Batch) -> Answers:
        """Its final hidden states at the answer tokens of a batch, and its head; no graph."""


class CopyReference:
    """A frozen copy, see `mollm.models.freeze`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = freeze(model).eval()

    @torch.no_grad()
    def answers(self, batch: Batch) -> Answers:
        """From a forward pass of the copy."""
        return answers_of(self.model, batch)


class AdapterReference:
    """The model without its adapter.

    Args:
        wrapped: a `peft.PeftModel`.
    """

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    @torch.no_grad()
    def answers(self, batch: Batch) -> Answers:
        """From a forward pass with the adapter switched off."""
        model = self.wrapped.get_base_model()
        with self.wrapped.disable_adapter(), in_evaluation_mode(model):
            return answers_of(model, batch)


class CachedReference:
    """Final hidden states from disk, found by what a row says, whatever its padding and place.

    Args:
        folder: what `cache_states` wrote.
        weight: the original's head [V, H].
        bias: its bias [V].
    """

    def __init__(self, folder: Path, weight: Tensor, bias: Tensor | None) -> None:
        self._folder = folder
        self._weight = weight
        self._bias = bias
        self._files = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        self._open: dict[str, Any] = {}

    def answers(self, batch: Batch) -> Answers:
        """From the disk.

        Raises:
            KeyError: a row that was not cached.
        """
        labels = batch.labels
        hidden = torch.cat([self._states(key) for key in _keys(batch)]).to(self._weight)
        target = labels[:, 1:][labels[:, 1:] != IGNORE_INDEX]
        return Answers(
            hidden, self._weight, self._bias, target, sequences_of(batch), len(batch.labels)
        )

    def _states(self, key: str) -> Tensor:
        from safetensors import safe_open

        if key not in self._files:
            raise KeyError(f"the row {key} must be among those that were cached, but it is not.")
        name = self._files[key]
        if name not in self._open:
            self._open[name] = safe_open(str(self._folder / name), framework="pt")
        states: Tensor = self._open[name].get_tensor(key)
        return states


def make_reference(
    kind: str,
    model: PreTrainedModel,
    wrapped: Any | None,
    rows: Sequence[Tokens],
    *,
    folder: Path,
    batch_size: int,
    pad_id: int,
) -> Reference:
    """The original of a model that has not been trained yet.

    Args:
        kind: One of REFERENCES; auto takes the adapter where there is one, else a copy.
        model: The model, without the wrapper of `peft`.
        wrapped: The same in its wrapper, if it has one.
        rows: What a cache is to hold.
        folder: Where a cache is to be; one that is there already, and whole, is used again.
        batch_size: Rows that pass through the model together for the cache.
        pad_id: The id that fills a batch.

    Raises:
        UsageError: There is no such kind, or there is no adapter to switch off.
    """
    if kind not in REFERENCES:
        raise UsageError(f"reference must be one of {', '.join(REFERENCES)}, but got {kind!r}.")
    if kind == "adapter" and wrapped is None:
        raise UsageError(
            "reference must be copy or cache where there is no adapter to switch off, but got "
            "'adapter': name a LoRA rank, or choose another reference."
        )
    if kind == "copy" or (kind == "auto" and wrapped is None):
        return CopyReference(model if wrapped is None else _without_adapter(wrapped))
    if kind != "cache":
        return AdapterReference(wrapped)
    off = contextlib.nullcontext() if wrapped is None else wrapped.disable_adapter()
    with off:
        if not (folder / _INDEX).is_file():
            cache_states(model, rows, folder, batch_size=batch_size, pad_id=pad_id)
        weight, bias = head_weights(model)
    if wrapped is None and weight.requires_grad:
        weight, bias = weight.clone(), None if bias is None else bias.clone()
    return CachedReference(folder, weight.detach(), None if bias is None else bias.detach())


def _without_adapter(wrapped: Any) -> PreTrainedModel:
    plain: PreTrainedModel = copy.deepcopy(wrapped).unload()
    return plain


@torch.no_grad()
def cache_states(
    model: PreTrainedModel,
    rows: Iterable[Tokens],
    folder: Path,
    *,
    batch_size: int,
    pad_id: int,
) -> None:
    """Writes the final hidden states at the answer tokens of `rows`, in the dtype of the head.

    `folder` appears when it is whole. It holds safetensors files of some 256 MiB and an index.

    Args:
        model: The original.
        rows: What to cache; rows that say the same are kept once.
        folder: Where to.
        batch_size: Rows that pass through the model together.
        pad_id: The id that fills a batch.
    """
    from safetensors.torch import save_file

    files: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    with complete(folder) as stage, in_evaluation_mode(model):

        def write() -> None:
            name = f"{len(set(files.values())):05}.safetensors"
            save_file(shard, stage / name)
            files.update(dict.fromkeys(shard, name))
            shard.clear()

        size = 0
        for batch in _batches(_distinct(rows), batch_size, pad_id):
            states, _ = answer_states(model, batch.to(model.device))
            counts = (batch.labels[:, 1:] != IGNORE_INDEX).sum(1).tolist()
            for key, part in zip(_keys(batch), torch.split(states.cpu(), counts), strict=True):
                shard[key] = part.clone()
                size += part.nbytes
            if size >= _SHARD_BYTES:
                write()
                size = 0
        if shard:
            write()
        (stage / _INDEX).write_text(json.dumps(files), encoding="utf-8")


def _distinct(rows: Iterable[Tokens]) -> list[Tokens]:
    return list({(tuple(row.ids), tuple(row.labels)): row for row in rows}.values())


def _batches(rows: Sequence[Tokens], batch_size: int, pad_id: int) -> Iterator[Batch]:
    for start in range(0, len(rows), batch_size):
        yield collate(rows[start : start + batch_size], pad_id)


def _keys(batch: Batch) -> list[str]:
    """What each row says, as a hash."""
    ids, mask, labels = (
        tensor.tolist() for tensor in (batch.input_ids, batch.attention_mask, batch.labels)
    )
    keys = []
    for row in zip(ids, mask, labels, strict=True):
        said = [(i, label) for i, real, label in zip(*row, strict=True) if real]
        keys.append(hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32])
    return keys


def cache_name(model: PreTrainedModel, rows: Iterable[Tokens], fingerprint: str) -> str:
    """A folder name that tells caches of other models and other rows apart."""
    digest = hashlib.sha256(fingerprint.encode())
    digest.update(str(model.dtype).encode())
    for row in rows:
        digest.update(json.dumps([row.ids, row.labels]).encode())
    return f"reference-{digest.hexdigest()[:12]}"
