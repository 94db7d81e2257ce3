"""Losses and gradients of the training step beside those of what a model itself returns.

The truth is each row alone, without padding, through the whole model, in float64 from its logits
on. Weights are made so large that attention is sharp and logits differ: a row that sees its
padding, or a cap that is missed, then shows.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
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

    @property
    def right(self) -> bool:
        return self.losses < 1e-3 and self.gradients < 1e-2


class Walk:
    """The ways to train one kind of model; the truth is computed once for those that share it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.made = sharpen(zoo.model(kind))
        self._truth: dict[tuple[bool, str], Any] = {}

    def errors(self, way: Way) -> Errors:
        """How far losses and gradients are from the truth.

        Raises:
            UsageError: The model is refused.
        """
        with computing_in("bfloat16" if way.dtype == "autocast" else "float32"):
            model, reference, params = self._set_up(way)
            losses, gradients = self._true(way)
            objectives = Objectives(model, reference)
            side: Any = way.side
            ours = objectives(collate(FORGET, 0, side), collate(RETAIN, 0, side))
            found = _gradients(ours.items(), params)
        off = max(abs(float(ours[n]) - losses[n]) / max(abs(losses[n]), 1e-3) for n in losses)
        lengths = {n: float(g.norm()) for n, g in gradients.items()}
        turned = max(
            float((found[n] - g).norm()) / lengths[n] if lengths[n] > 0 else float(found[n].norm())
            for n, g in gradients.items()
        )
        return Errors(off, turned)

    def _set_up(self, way: Way, *, plain: bool = False) -> tuple[Any, Any, list[Tensor]]:
        model = copy.deepcopy(self.made)
        if way.dtype == "bfloat16":
            model = model.bfloat16()
        check_logits(model)
        if way.lora:
            from peft import LoraConfig

            torch.manual_seed(5)
            wrapped = adapted(model, LoraConfig(r=4, target_modules="all-linear"))
            reference: Any = AdapterReference(wrapped)
            moved(model)
        else:
            reference = CopyReference(model)
            moved(model)
        if way.checkpointing and not plain:
            checkpoint_activations(model, None)
        return model, reference, [p for p in model.parameters() if p.requires_grad]

    def _true(self, way: Way) -> tuple[dict[str, float], dict[str, Tensor]]:
        """From float32, in which a model of narrow weights is held for this."""
        key = way.lora, "bfloat16" if way.dtype == "bfloat16" else "float32"
        if key not in self._truth:
            with computing_in("float32"):
                model, reference, params = self._set_up(way, plain=True)
            model.float().eval()
            if way.lora:

                def original(row: Tokens) -> Tensor:
                    with reference.original.restored():
                        return _logits(model, row)[0]
            else:
                first = reference.model.float().eval()

                def original(row: Tokens) -> Tensor:
                    return _logits(first, row)[0]

            losses = dict(own_losses(model, original))
            self._truth[key] = (
                {name: float(loss) for name, loss in losses.items()},
                _gradients(losses.items(), params),
            )
        return self._truth[key]
