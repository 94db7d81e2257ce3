"""Simulated relearning: the forget loss where an attacker would be after a few steps of training.

What a model no longer says may be a few rows away: taught ten of its forgotten answers, it gives
the others too. So the forget loss is taken at weights that were moved towards relearning,

    θ′ = θ;  n times:  θ′ ← AdamW(θ′, ∇ CE(θ′; B′), η)        B′: rows to forget, apart from B
    g_forget = ∇ L_forget(θ′; B)                             to first order: at θ′, applied at θ

and the weights are put back, bit for bit, before any other loss is computed. A step along g_forget
makes the model at θ′ forget: it is then not enough to hide an answer where θ is.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import AdamW

from mollm.data.chat import Tokens


def rows_to_relearn(
    rows: Sequence[Tokens], outer: Sequence[Tokens], *, seed: int, step: int
) -> list[Tokens]:
    """Rows of the forget set that the forget loss of this step does not see, as many as it sees.

    They depend on the rows, `seed` and `step` alone, so that a run that resumes draws the same.

    Args:
        rows: All rows to forget.
        outer: Those of the step.
        seed: Of the order of the data.
        step: From 0.

    Returns:
        Fewer where there are not as many; those of the step themselves where there are no others.
    """
    seen = {id(row) for row in outer}
    others = [row for row in rows if id(row) not in seen]
    count = min(len(outer), len(others))
    return random.Random(f"relearn {seed} {step}").sample(others, count) or list(outer)


@contextlib.contextmanager
def relearnt(
    params: Sequence[Tensor], backward: Callable[[], None], *, steps: int, lr: float
) -> Iterator[None]:
    """Within it the parameters are those of a model that has begun to relearn.

    Args:
        params: What trains; without gradients, and without them again where it begins and ends.
        backward: Adds to `.grad` of the parameters the gradient of the cross-entropy on rows to
            forget, that of all processes.
        steps: n, the attacker's steps of AdamW, without weight decay.
        lr: η, its learning rate.
    """
    saved = [p.detach().clone() for p in params]
    try:
        relearn(params, backward, steps=steps, lr=lr)
        yield
    finally:
        with torch.no_grad():
            for p, before in zip(params, saved, strict=True):
                p.grad = None
                p.copy_(before)


def relearn(
    params: Sequence[Tensor],
    backward: Callable[[], None],
    *,
    steps: int,
    lr: float,
    after_step: Callable[[], object] = lambda: None,
) -> None:
    """θ ← AdamW(θ, ∇ L(θ), lr), `steps` times, without weight decay.

    Args:
        params: What is taught.
        backward: Adds the gradient of the loss of a step to `.grad` of the parameters.
        steps: How many steps.
        lr: The learning rate, the same in every step.
        after_step: Called after each.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> relearn([w], lambda: (w - 3).square().sum().backward(), steps=10, lr=0.5)
        >>> bool(abs(w - 3) < 1)
        True
    """
    attacker = AdamW(params, lr=lr, weight_decay=0.0)
    attacker.zero_grad()
    for _ in range(steps):
        backward()
        attacker.step()
        attacker.zero_grad()
        after_step()
