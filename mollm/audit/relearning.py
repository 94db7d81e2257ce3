"""Teaches a model examples again: what then comes back of the others was hidden, not gone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mollm.data.chat import Tokens, collate
from mollm.methods.answers import answers_of
from mollm.models.adapters import adapted
from mollm.models.forward import freeze_embeddings, in_evaluation_mode
from mollm.training.objectives import count_loss_tokens
from mollm.training.relearning import relearn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS = 10
"""Of AdamW, each on all of the examples, however many they are."""
LORA_RANK = 16

Kind = Literal["full", "LoRA"]
RATE_FACTOR: dict[Kind, float] = {"full": 1, "LoRA": 10}
"""An adapter takes about ten times the learning rate of the weights themselves."""


@contextlib.contextmanager
def put_back(model: nn.Module, changed: Iterable[Tensor] | None = None) -> Iterator[None]:
    """Afterwards parameters and buffers hold bit for bit what they did, and train or not as before.

    Args:
        model: Whose they are.
        changed: The parameters whose values may change inside, by default all of them.
    """
    trains = [(p, p.requires_grad) for p in model.parameters()]
    kept = [(p, p.detach().clone()) for p in (model.parameters() if changed is None else changed)]
    buffers = [(*each, each[2].clone()) for each in _buffers(model)]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.data.copy_(value)
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer.copy_(value))
            for p, did in trains:
                p.requires_grad_(did)
                p.grad = None


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, parameters and buffers of fewer bits are float32; afterwards they are as they were.

    A step of lr 5e-5 is less than half of what bfloat16 tells apart at a weight of 0.05.
    """
    small = (torch.bfloat16, torch.float16)
    kept = [(p, p.data) for p in model.parameters() if p.dtype in small]
    buffers = [each for each in _buffers(model) if each[2].dtype in small]
    try:
        for p, value in kept:
            p.data = value.float()
        for module, name, buffer in buffers:
            setattr(module, name, buffer.float())
        yield
    finally:
        for p, value in kept:
            p.grad = None  # of the other dtype
            p.data = value
        for module, name, buffer in buffers:
            setattr(module, name, buffer)


def _buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]


@contextlib.contextmanager
def taught(
    model: PreTrainedModel,
    rows: Sequence[Tokens],
    *,
    pad_id: int,
    kind: Kind,
    lr: float,
    batch_size: int = 8,
    seed: int = 0,
    after_step: Callable[[], object] = lambda: None,
) -> Iterator[None]:
    """Inside, the model has learnt `rows`, in STEPS steps; afterwards it is as it was.

    Its weights learn all but embeddings and head, see `freeze_embeddings`; an adapter, LoRA of rank
    16 with α = 32 beside every linear layer but the head, learns at ten times the rate. What learns
    is float32 at least, see `in_float32`.

    Args:
        model: What is taught.
        rows: What it is taught, all of it in every step.
        pad_id: The id that fills a batch.
        kind: "full" or "LoRA".
        lr: The learning rate of weights.
        batch_size: Rows that pass through the model together; it does not change the step.
        seed: Of the adapter's beginning.
        after_step: Called after each step.
    """
    totals = count_loss_tokens(rows)

    def backward() -> None:
        for start in range(0, len(rows), batch_size):
            batch = collate(rows[start : start + batch_size], pad_id).to(model.device)
            torch.autograd.backward(answers_of(model, batch, totals).cross_entropy())

    with in_evaluation_mode(model), _trainable(model, kind, seed) as parameters:
        rate = lr * RATE_FACTOR[kind]
        relearn(parameters, backward, steps=STEPS, lr=rate, after_step=after_step)
        yield


@contextlib.contextmanager
def _trainable(model: PreTrainedModel, kind: Kind, seed: int) -> Iterator[list[nn.Parameter]]:
    """What an attacker trains; afterwards the model is as it was."""
    if kind == "full":
        with put_back(model, changed=()):  # before they are frozen
            model.requires_grad_(True)
            freeze_embeddings(model)
            trained = [p for p in model.parameters() if p.requires_grad]
            with put_back(model, trained), in_float32(model):
                yield trained
        return
    with put_back(model, changed=()), in_float32(model):
        wrapped = _with_adapter(model, seed)
        try:
            yield [p for p in wrapped.parameters() if p.requires_grad]
        finally:
            wrapped.unload()
            # It stays behind, and would have transformers write an adapter in place of the model.
            vars(model).pop("peft_config", None)


def _with_adapter(model: PreTrainedModel, seed: int) -> Any:
    from peft import LoraConfig

    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear")
        return adapted(model, config)
