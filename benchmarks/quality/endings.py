"""What becomes of a model after its run: asked in other ways, taught again, rounded."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from mollm.audit.relearning import STEPS
from mollm.training.relearning import relearn
from quality.case import Case, likelihood, measure, share


def ending(case: Case, model: nn.Module, lr: float) -> dict[str, Any]:
    """What the checks say about the model of a run, for the run's row.

    Args:
        case: The case of the run.
        model: The unlearned model; it stays as it is.
        lr: AdamW's learning rate when the ten examples are learnt again, the same for every run.

    Returns:
        What is left of the original's likelihood of the rewordings, of the groups after rounding
        to 4 bits, of the forget set, the ten and the others, after relearning; and figures of the
        task's own.
    """
    rounded = copy.deepcopy(model)
    round_to_4_bits(rounded)
    found: dict[str, Any] = {
        "rewordings": measure(case, model, case.rewordings),
        "rounded": measure(case, rounded, case.groups),
    }
    del rounded
    taught = copy.deepcopy(model)
    learn_ten(case, taught, lr)
    parts = {"forget": case.groups["forget"], "ten": [case.ten], "others": case.others}
    found["relearned"] = {
        name: share(likelihood(case, taught, batches), likelihood(case, case.model, batches))
        for name, batches in parts.items()
        if batches
    }
    found = {
        what: {name: round(value, 5) for name, value in values.items()}
        for what, values in found.items()
    }
    return {**found, "figures": case.figures(model)}


def learn_ten(case: Case, model: nn.Module, lr: float) -> None:
    """The audit's relearning on the ten examples."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def backward() -> None:
        torch.autograd.backward(case.answers(model, case.ten).cross_entropy())

    relearn(trained, backward, steps=STEPS, lr=lr)


@torch.no_grad()
def round_to_4_bits(model: nn.Module, group: int = 32) -> None:
    """Rounds every matrix that was trained to 16 levels, with one scale for `group` weights of a
    row; the last group of a row may be smaller."""
    for p in model.parameters():
        if p.requires_grad and p.ndim == 2:
            for blocks in p.split(group, dim=1):
                scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
                blocks.copy_((blocks / scale).round().clamp(-8, 7) * scale)
