"""The original model, as a training step asks for it: final hidden states, and a head.

    adapter   the model itself with its adapter switched off: no memory, a forward pass; of biases
              that train besides, and of an adapter that the model was given with, a copy is kept
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
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from mollm.data.chat import IGNORE_INDEX, Batch, Tokens, collate
from mollm.distributed import processes
from mollm.errors import UsageError
from mollm.methods import AnswerTokens, answers_of, sequences_of
from mollm.models.adapters import Original
from mollm.models.dropout import without_dropout
from mollm.models.forward import frozen_copy, head_weights, in_evaluation_mode
from mollm.models.logits import logit_transform
from mollm.system.folders import clear_unfinished, complete, remove
from mollm.system.parsing import is_file
from mollm.system.precision import compute_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFERENCES = ("auto", "adapter", "copy", "cache")

_SHARD_BYTES = 256 << 20
_STATES = "states.safetensors"
_MODEL = "model"

logger = logging.getLogger(__name__)


class Reference(Protocol):
    """The original model."""

    def answers(self, batch: Batch) -> AnswerTokens:
        """Its final hidden states at the answer tokens of a batch, and its head; no graph."""


class CopyReference(nn.Module):
    """A frozen copy, see `mollm.models.forward.frozen_copy`.

    Args:
        model: The original.
        layer: The block whose output losses compare with, if any.
    """

    def __init__(self, model: PreTrainedModel, *, layer: int | None = None) -> None:
        super().__init__()
        logit_transform(model)  # known to the copy then
        self.layer = layer
        self.model = frozen_copy(model).eval()

    @torch.no_grad()
    def answers(self, batch: Batch) -> AnswerTokens:
        """From a forward pass of the copy."""
        without_dropout(self.model, training=False)  # train() of what holds it reaches it
        return answers_of(self.model, batch, layer=self.layer)


class AdapterReference:
    """The model without its adapter, or with it as it was, see `mollm.models.adapters.Original`.

    Args:
        wrapped: a `peft.PeftModel` that has not been trained since it is to be the reference.
        with_adapter: Whether its adapter, as it is now, is part of the reference model.
        layer: The block whose output losses compare with, if any.
    """

    def __init__(
        self, wrapped: Any, *, with_adapter: bool = False, layer: int | None = None
    ) -> None:
        self.original = Original(wrapped, with_adapter=with_adapter)
        self.layer = layer

    @torch.no_grad()
    def answers(self, batch: Batch) -> AnswerTokens:
        """From a forward pass with the adapter switched off, or as it was."""
        model = self.original.wrapped.get_base_model()
        with self.original.restored(), in_evaluation_mode(model):
            return self._kept(answers_of(model, batch, layer=self.layer))

    def _kept(self, answers: AnswerTokens) -> AnswerTokens:
        bias, other = answers.bias, answers.alternative
        return replace(
            answers,
            weight=self.original.tensor(answers.weight),
            bias=None if bias is None else self.original.tensor(bias),
            alternative=None if other is None else self._kept(other),
        )


class CachedReference(nn.Module):
    """Final hidden states from disk, found by what a row says, whatever its padding and place.

    The folder holds one folder for each piece that a process wrote, of some 256 MiB and with its
    states as safetensors. A piece appears when it is whole, so that a run that was killed while it
    wrote them goes on.

    Args:
        folder: Where the states are, or will be.
        model: The original, whose head is used.
        original: The same as it is without what an adapter changes, if it has one.
        of: What identifies the model; pieces that other models wrote are computed anew.
    """

    weight: Tensor | None
    """Of a head that trains, as it was: [V, H]; any other is read where it stands."""
    bias: Tensor | None

    def __init__(
        self, folder: Path, model: PreTrainedModel, original: Original | None, *, of: str = ""
    ) -> None:
        super().__init__()
        self._folder = folder
        self._of = of
        self._original = original
        self._read_head: Callable[[], tuple[Tensor, Tensor | None]] = lambda: head_weights(model)
        self._transform = logit_transform(model)
        weight, bias = head_weights(model)
        self._width = weight.shape[1]
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        changes = trains and original is None
        for name, tensor in (("weight", weight), ("bias", bias)):
            kept = tensor.detach().clone() if changes and tensor is not None else None
            self.register_buffer(name, kept, persistent=False)
        self._files: dict[str, Any] = {}

    def answers(self, batch: Batch) -> AnswerTokens:
        """From the disk.

        Raises:
            UsageError: A row was not cached.
        """
        labels = batch.labels
        weight, bias = self._head()
        hidden = torch.cat([self._states(key) for key in _keys(batch)]).to(weight)
        target = labels[:, 1:][labels[:, 1:] != IGNORE_INDEX]
        rows = sequences_of(batch)
        other = batch.alternative
        return AnswerTokens(
            hidden,
            weight,
            bias,
            target,
            rows,
            len(labels),
            transform=self._transform,
            alternative=None if other is None else self.answers(other),
        )

    def _head(self) -> tuple[Tensor, Tensor | None]:
        if self.weight is not None:
            return self.weight, self.bias
        if self._original is None:
            weight, bias = self._read_head()
            return weight.detach(), None if bias is None else bias.detach()
        with self._original.restored():
            weight, bias = self._read_head()
            kept = self._original.tensor
            return kept(weight), None if bias is None else kept(bias)

    def _states(self, key: str) -> Tensor:
        if key not in self._files:
            raise UsageError(
                "a cached reference must be asked about rows of its cache alone, but got another "
                "one: give all data to the trainer, or choose the reference adapter or copy."
            )
        states: Tensor = self._files[key].get_tensor(key)
        return states

    def fill(
        self,
        rows: Iterable[Tokens],
        states: Callable[[Batch], Tensor],
        *,
        device: torch.device,
        batch_size: int,
        pad_id: int,
    ) -> None:
        """Computes and writes what is not there yet, each process its share; all must call it.

        Args:
            rows: What to cache; rows that say the same are kept once.
            states: The model's final hidden states at the answer tokens of a batch, [N, H].
            device: Where the model computes.
            batch_size: Rows that pass through the model together.
            pad_id: The id that fills a batch.
        """
        distinct = {_key(zip(row.ids, row.labels, strict=True)): row for row in rows}
        with processes.raise_on_all_ranks():
            if processes.rank() == 0:
                clear_unfinished(self._folder)
                self._remove_damaged(distinct)
        self._open()
        missing = [row for key, row in distinct.items() if key not in self._files]
        processes.barrier()  # all have seen the same
        piece: dict[str, Tensor] = {}
        cuts = range(0, len(missing), batch_size)
        batches = [missing[start : start + batch_size] for start in cuts]
        with contextlib.nullcontext() if self._original is None else self._original.restored():
            for some, mine in processes.shares(batches):
                batch = collate(some, pad_id)
                found = states(batch.to(device)).cpu()
                counts = (batch.labels[:, 1:] != IGNORE_INDEX).sum(1).tolist()
                if mine:
                    parts = (part.clone() for part in torch.split(found, counts))
                    piece |= zip(_keys(batch), parts, strict=True)
                if sum(part.nbytes for part in piece.values()) >= _SHARD_BYTES:
                    self._write(piece)
                    piece = {}
        if piece:
            self._write(piece)
        processes.barrier()
        self._open()

    def _write(self, piece: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        with complete(self._folder / next(iter(piece))) as stage:
            save_file(dict(piece), stage / _STATES, metadata={_MODEL: self._of})

    def _remove_damaged(self, rows: Mapping[str, Tokens]) -> None:
        """Takes out what was cut short, or is of another model or other rows, to be made again."""
        for path in sorted(self._folder.glob(f"*/{_STATES}")):
            if not self._is_whole(path, rows):
                logger.warning(
                    f"the cached states in {path.parent} are damaged or of another model: they "
                    "are computed again."
                )
                remove(path.parent)

    def _is_whole(self, path: Path, rows: Mapping[str, Tokens]) -> bool:
        from safetensors import SafetensorError, safe_open

        if not is_file(path):
            return False
        try:
            with safe_open(str(path), framework="pt") as file:
                if (file.metadata() or {}).get(_MODEL, "") != self._of:
                    return False
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
        except (OSError, SafetensorError):
            return False
        expected = {
            key: (sum(label != IGNORE_INDEX for label in row.labels[1:]), self._width)
            for key, row in rows.items()
            if key in shapes
        }
        return expected == shapes

    def _open(self) -> None:
        from safetensors import safe_open

        self._files = {}
        for path in sorted(self._folder.glob(f"*/{_STATES}")):
            file: Any = safe_open(str(path), framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)


def make_reference(
    kind: str,
    model: PreTrainedModel,
    wrapped: Any | None,
    *,
    folder: Path,
    with_adapter: bool = False,
    of: str = "",
    layer: int | None = None,
) -> Reference:
    """The original of a model that has not been trained yet.

    Args:
        kind: One of REFERENCES; auto takes the adapter where there is one, else a copy.
        model: The model, without the wrapper of `peft`.
        wrapped: The same in its wrapper, if it has one.
        folder: Where a cache is, or will be once it is filled.
        with_adapter: Whether the adapter, as it is now, is part of the original.
        of: What identifies the model of a cache.
        layer: The block whose output losses compare with, if any; no cache has that.

    Raises:
        UsageError: There is no such kind, there is no adapter to switch off, or a cache is asked
            for the output of a block.
    """
    if kind not in REFERENCES:
        raise UsageError(f"reference must be one of {', '.join(REFERENCES)}, but got {kind!r}.")
    if kind == "adapter" and wrapped is None:
        raise UsageError(
            "reference must be copy or cache where there is no adapter to switch off, but got "
            "'adapter': name a LoRA rank, or choose another reference."
        )
    if kind == "cache" and layer is not None:
        raise UsageError(
            "reference must be copy or adapter for a method whose loss reads inner blocks, but got "
            "'cache', which holds final states alone."
        )
    if kind == "copy" or (kind == "auto" and wrapped is None):
        plain = wrapped is None or with_adapter
        return CopyReference(model if plain else _without_adapter(wrapped), layer=layer)
    if kind == "cache":
        original = None if wrapped is None else Original(wrapped, with_adapter=with_adapter)
        return CachedReference(folder, model, original, of=of)
    return AdapterReference(wrapped, with_adapter=with_adapter, layer=layer)


def _without_adapter(wrapped: Any) -> PreTrainedModel:
    plain: PreTrainedModel = copy.deepcopy(wrapped).unload()
    return plain


def _keys(batch: Batch) -> list[str]:
    ids, mask, labels = (
        tensor.tolist() for tensor in (batch.input_ids, batch.attention_mask, batch.labels)
    )
    return [
        _key((i, label) for i, real, label in zip(*row, strict=True) if real)
        for row in zip(ids, mask, labels, strict=True)
    ]


def _key(said: Iterable[tuple[int, int]]) -> str:
    """What a row says, token by token with its label, as a hash."""
    return hashlib.sha256(json.dumps(list(said)).encode()).hexdigest()[:32]


def cache_name(model: PreTrainedModel, rows: Iterable[Tokens], fingerprint: str) -> str:
    """A folder name that tells caches of other models, dtypes and rows apart."""
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    digest = hashlib.sha256(fingerprint.encode())
    digest.update(f"{model.dtype} {compute_dtype(device).name}".encode())
    for row in rows:
        digest.update(json.dumps([row.ids, row.labels]).encode())
    return f"reference-{digest.hexdigest()[:12]}"
