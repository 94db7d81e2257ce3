"""Losses and gradients of the training step beside those of what a model itself returns.

The truth is each row alone, without padding, through the whole model, in float64 from its logits
on. Weights are made so large that attention is sharp and logits differ: a row that sees its
padding, or a cap that is missed, then shows.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import zoo
from torch import Tensor

from mollm.data.chat import Tokens, collate
from mollm.models.adapters import adapted, checkpoint_activations
from mollm.models.logits import check_logits
from mollm.system.precision import computing_in
from mollm.training.objectives import Objectives
from mollm.training.reference_model import AdapterReference, CopyReference

LENGTHS = 19, 12
EPS = 1e-4


@dataclass(frozen=True)
class Way:
    """To train."""

    lora: bool = False
    checkpointing: bool = False
    side: str = "right"
    dtype: str = "float32"
    """Of the weights; with "autocast", float32 of which matrix products are bfloat16."""

    def __str__(self) -> str:
        words = ["LoRA" if self.lora else "full", self.dtype, f"padded {self.side}"]
        return ", ".join(words + ["checkpointed"] * self.checkpointing)


FAST = (Way(), Way(lora=True, side="left"))
ALL = tuple(
    Way(lora, checkpointing, side, dtype)
    for dtype in ("float32", "bfloat16", "autocast")
    for lora in (False, True)
    for checkpointing in (False, True)
    for side in ("right", "left")
)


def rows(seed: int) -> list[Tokens]:
    """Two rows of different length, of which the second half carries a loss."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in LENGTHS:
        ids = torch.randint(3, 75, (length,), generator=generator).tolist()
        made.append(Tokens(ids, [-100] * (length // 2) + ids[length // 2 :]))
    return made


FORGET, RETAIN = rows(1), rows(2)


@torch.no_grad()
def sharpen(model: Any) -> Any:
    """Makes weights so large that attention and logits differ from token to token."""
    before = copy.deepcopy(model.state_dict())
    for name, p in model.named_parameters():
        if p.ndim >= 2 and p.std() > 0 and "norm" not in name:
            p.mul_(min(0.5, p[0].numel() ** -0.5) / float(p.std()))
    head = model.get_output_embeddings()
    try:
        for _ in range(3):
            spread = float(_own(model, FORGET[0]).float().std())
            if not 0 < spread < 1e6:
                raise ValueError
            if head is not None and abs(math.log(spread)) > 1:
                head.weight.mul_(1 / spread)
    except ValueError:
        model.load_state_dict(before)
    return model


def moved(model: Any) -> Any:
    """Another model near it, at some distance."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.is_floating_point():
                size = float(p.float().std()) if p.numel() > 1 else 0.1
                size = size if size > 0 else 0.1
                p.add_((0.05 * size * torch.randn(p.shape, generator=generator)).to(p.dtype))
    return model


def _own(model: Any, row: Tokens) -> Tensor:
    cache = "use_cache" in inspect.signature(model.forward).parameters
    output = model(input_ids=torch.tensor([row.ids]), **({"use_cache": False} if cache else {}))
    return output.logits if hasattr(output, "logits") else output[0]


def _logits(model: Any, row: Tokens) -> tuple[Tensor, Tensor]:
    counted = torch.tensor(row.labels)[1:] != -100
    return _own(model, row)[0, :-1][counted].double(), torch.tensor(row.ids)[1:][counted]


def own_losses(model: Any, original: Any) -> Iterator[tuple[str, Tensor]]:
    """The three losses from the logits of each row by itself."""
    found = [_logits(model, row) for row in FORGET]
    z, target = (torch.cat(parts) for parts in zip(*found, strict=True))
    p = z.log_softmax(-1).gather(-1, target[:, None]).exp()
    yield "forget", -torch.log1p(-(1 - EPS) * p).mean()
    with torch.no_grad():
        reference = torch.cat([original(row) for row in RETAIN])
    found = [_logits(model, row) for row in RETAIN]
    z, target = (torch.cat(parts) for parts in zip(*found, strict=True))
    logs = z.log_softmax(-1)
    yield (
        "kl",
        F.kl_div(logs, reference.log_softmax(-1), log_target=True, reduction="batchmean"),
    )
    yield "retain", F.cross_entropy(z, target)


def _gradients(losses: Any, params: list[Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, loss in losses:
        parts = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        found[name] = torch.cat(
            [
                (torch.zeros_like(p) if part is None else part).flatten().double()
                for p, part in zip(params, parts, strict=True)
            ]
        )
    return found


@dataclass(frozen=True)
class Errors:
    """Of the losses, relative, and of the gradients, by their length."""

    losses: float
    gradients: float
    own: Errors | None = None
    """Those of the model's own logits in the same dtype, where that is narrow."""

    @property
    def right(self) -> bool:
        if self.own is None:
            return self.losses < 1e-3 and self.gradients < 1e-2
        losses, gradients = max(5e-2, 2 * self.own.losses), max(5e-2, 2 * self.own.gradients)
        return self.losses < losses and self.gradients < gradients


Found = tuple[dict[str, float], dict[str, Tensor]]


def _errors(found: Found, truth: Found, own: Errors | None = None) -> Errors:
    (losses, gradients), (true, exact) = found, truth
    off = max(abs(losses[n] - true[n]) / max(abs(true[n]), 1e-3) for n in true)
    turned = max(
        float((gradients[n] - g).norm()) / (float(g.norm()) or 1.0) for n, g in exact.items()
    )
    return Errors(off, turned, own)


class Walk:
    """The ways to train one kind of model; the truth is computed once for those that share it."""

    def __init__(self, kind: str) -> None:
        self.made = sharpen(zoo.model(kind))
        self._known: dict[tuple[bool, str, bool], Found] = {}

    def errors(self, way: Way) -> Errors:
        """How far losses and gradients are from the truth.

        Raises:
            UsageError: The model is refused.
        """
        with computing_in("bfloat16" if way.dtype == "autocast" else "float32"):
            model, reference, params = self._set_up(way)
            objectives = Objectives(model, reference)
            side: Any = way.side
            losses = objectives(collate(FORGET, 0, side), collate(RETAIN, 0, side))
            found = _found(losses, params)
        truth = self._of_own_logits(way, narrow=False)
        if way.dtype == "float32":
            return _errors(found, truth)
        own = _errors(self._of_own_logits(way, narrow=True), truth)
        return _errors(found, truth, own)

    def _set_up(self, way: Way) -> tuple[Any, Any, list[Tensor]]:
        model = copy.deepcopy(self.made)
        if way.dtype == "bfloat16":
            model = model.bfloat16()
        check_logits(model)
        reference: Any
        if way.lora:
            from peft import LoraConfig

            torch.manual_seed(5)
            reference = AdapterReference(
                adapted(model, LoraConfig(r=4, target_modules="all-linear"))
            )
        else:
            reference = CopyReference(model)
        moved(model)
        if way.checkpointing:
            checkpoint_activations(model, None)
        return model, reference, [p for p in model.parameters() if p.requires_grad]

    def _of_own_logits(self, way: Way, *, narrow: bool) -> Found:
        """In float32, which holds bfloat16 weights for this, or as the way has it."""
        key = way.lora, way.dtype, narrow
        if key in self._known:
            return self._known[key]
        with computing_in("float32"):
            model, reference, params = self._set_up(replace(way, checkpointing=False))
        model.eval()
        if not narrow:
            model.float()
        first = model if way.lora else reference.model.eval()
        if not narrow:
            first.float()

        def original(row: Tokens) -> Tensor:
            with reference.original.restored() if way.lora else contextlib.nullcontext():
                return _logits(first, row)[0]

        enabled = narrow and way.dtype == "autocast"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses = dict(own_losses(model, original))
        self._known[key] = _found(losses, params)
        return self._known[key]


def _found(losses: dict[str, Tensor], params: list[Tensor]) -> Found:
    gradients = _gradients(losses.items(), params)
    return {name: float(loss.detach()) for name, loss in losses.items()}, gradients
