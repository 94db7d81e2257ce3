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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from mollm.data.chat import IGNORE_INDEX, Batch, Tokens, collate
from mollm.distributed import processes
from mollm.errors import UsageError
from mollm.methods import Answers, answers_of, sequences_of
from mollm.models.forward import freeze, head_weights, in_evaluation_mode
from mollm.models.logits import logit_transform
from mollm.system.folders import clear_unfinished, complete

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFERENCES = ("auto", "adapter", "copy", "cache")

_SHARD_BYTES = 256 << 20
_STATES = "states.safetensors"


class Reference(Protocol):
    """The original model."""

    def answers(self, batch: Batch) -> Answers:
        """Its final hidden states at the answer tokens of a batch, and its head; no graph."""


class CopyReference(nn.Module):
    """A frozen copy, see `mollm.models.loading.freeze`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        logit_transform(model)  # known to the copy then
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
        with _switched_off(self.wrapped), in_evaluation_mode(model):
            return answers_of(model, batch)


class CachedReference(nn.Module):
    """Final hidden states from disk, found by what a row says, whatever its padding and place.

    The folder holds one folder for each piece that a process wrote, of some 256 MiB and with its
    states as safetensors. A piece appears when it is whole, so that a run that was killed while it
    wrote them goes on.

    Args:
        folder: Where the states are, or will be.
        model: The original, whose head is used.
        wrapped: The same in the wrapper of `peft`, if it has one; its adapter is switched off.
    """

    weight: Tensor | None
    """Of a head that trains, as it was: [V, H]; any other is read where it stands."""
    bias: Tensor | None

    def __init__(self, folder: Path, model: PreTrainedModel, wrapped: Any | None) -> None:
        super().__init__()
        self._folder = folder
        self._without_adapter: Callable[[], contextlib.AbstractContextManager[Any]] = lambda: (
            contextlib.nullcontext() if wrapped is None else _switched_off(wrapped)
        )
        self._read_head: Callable[[], tuple[Tensor, Tensor | None]] = lambda: head_weights(model)
        self._transform = logit_transform(model)
        weight, bias = head_weights(model)
        trains = wrapped is None and weight.requires_grad
        for name, tensor in (("weight", weight), ("bias", bias)):
            kept = tensor.detach().clone() if trains and tensor is not None else None
            self.register_buffer(name, kept, persistent=False)
        self._files: dict[str, Any] = {}

    def answers(self, batch: Batch) -> Answers:
        """From the disk.

        Raises:
            UsageError: A row was not cached.
        """
        labels = batch.labels
        weight, bias = self._head()
        hidden = torch.cat([self._states(key) for key in _keys(batch)]).to(weight)
        target = labels[:, 1:][labels[:, 1:] != IGNORE_INDEX]
        rows = sequences_of(batch)
        return Answers(hidden, weight, bias, target, rows, len(labels), transform=self._transform)

    def _head(self) -> tuple[Tensor, Tensor | None]:
        if self.weight is not None:
            return self.weight, self.bias
        with self._without_adapter():
            weight, bias = self._read_head()
        return weight.detach(), None if bias is None else bias.detach()

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
        if processes.rank() == 0:
            clear_unfinished(self._folder)
        self._open()
        distinct = {_key(zip(row.ids, row.labels, strict=True)): row for row in rows}
        missing = [row for key, row in distinct.items() if key not in self._files]
        processes.wait()  # all have seen the same
        piece: dict[str, Tensor] = {}
        cuts = range(0, len(missing), batch_size)
        batches = [missing[start : start + batch_size] for start in cuts]
        with self._without_adapter():
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
        processes.wait()
        self._open()

    def _write(self, piece: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        with complete(self._folder / next(iter(piece))) as stage:
            save_file(dict(piece), stage / _STATES)

    def _open(self) -> None:
        from safetensors import safe_open

        self._files = {}
        for path in sorted(self._folder.glob(f"*/{_STATES}")):
            file: Any = safe_open(str(path), framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)


def make_reference(
    kind: str, model: PreTrainedModel, wrapped: Any | None, *, folder: Path
) -> Reference:
    """The original of a model that has not been trained yet.

    Args:
        kind: One of REFERENCES; auto takes the adapter where there is one, else a copy.
        model: The model, without the wrapper of `peft`.
        wrapped: The same in its wrapper, if it has one.
        folder: Where a cache is, or will be once it is filled.

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
    if kind == "cache":
        return CachedReference(folder, model, wrapped)
    return AdapterReference(wrapped)


@contextlib.contextmanager
def _switched_off(wrapped: Any) -> Iterator[None]:
    asked = [(p, p.requires_grad) for p in wrapped.parameters()]
    with wrapped.disable_adapter():
        # FSDP2 learns in its first forward, which may be this one, what is to train.
        for p, trains in asked:
            p.requires_grad_(trains)
        yield


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
    """A folder name that tells caches of other models and other rows apart."""
    digest = hashlib.sha256(fingerprint.encode())
    digest.update(str(model.dtype).encode())
    for row in rows:
        digest.update(json.dumps([row.ids, row.labels]).encode())
    return f"reference-{digest.hexdigest()[:12]}"
