"""Losses of single tokens on the logits over the whole vocabulary, without those of all tokens.

A chunk of tokens at a time meets the head. Its gradients are taken in the forward pass, so that
neither its logits nor its graph outlive it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from mollm.methods.answers import AnswerTokens

RowLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [n, V] in float32 or float64, targets [n], places of the tokens [n]) → losses [n]."""

_CHUNK = 1 << 24
"""Logits of a chunk."""


def summed(answers: AnswerTokens, loss: RowLoss) -> Tensor:
    """Σ_t loss(z_t, y_t) over the answer tokens."""
    total: Tensor = _Summed.apply(  # type: ignore[no-untyped-call]
        answers.hidden, answers.weight, answers.bias, answers, loss, torch.is_grad_enabled()
    )
    return total


def logits_of(answers: AnswerTokens, places: Tensor) -> Tensor:
    """[n, V]: the logits of some tokens, in float32, or float64 where the head is in that."""
    return _logits(answers.hidden[places], answers.weight, answers.bias, answers)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, answers: AnswerTokens) -> Tensor:
    outputs = linear(hidden, weight, bias)
    wide = torch.promote_types(outputs.dtype, torch.float32)
    return answers.transform(outputs.to(wide))


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        answers: AnswerTokens,
        loss: RowLoss,
        graded: bool,
    ) -> Tensor:
        given = [hidden, weight, bias]
        needed = [graded and t is not None and t.requires_grad for t in given]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # dW is added up over chunks, which is not to round each time.
        sums = [
            torch.zeros_like(t, dtype=wide if n else None) if needs and t is not None else None
            for n, (t, needs) in enumerate(zip(given, needed, strict=True))
        ]
        total = hidden.new_zeros((), dtype=wide)
        step = max(1, _CHUNK // len(weight))
        for places in torch.split(torch.arange(len(hidden), device=hidden.device), step):
            with torch.set_grad_enabled(any(needed)):
                parts = [
                    None if t is None else t.detach().requires_grad_(needs)
                    for t, needs in zip((hidden[places], weight, bias), needed, strict=True)
                ]
                logits = _logits(parts[0], parts[1], parts[2], answers)  # type: ignore[arg-type]
                part = loss(logits, answers.target[places], places).sum()
            total += part.detach()
            leaves = [t for t in parts if t is not None and t.requires_grad]
            for leaf, grad in zip(
                leaves, torch.autograd.grad(part, leaves) if leaves else (), strict=True
            ):
                n = next(n for n, t in enumerate(parts) if t is leaf)
                known = sums[n]
                assert known is not None, "a leaf has a place for its gradient"
                if n:
                    known += grad
                else:
                    known[places] = grad
        ctx.grads = [
            None if g is None or t is None else g.to(t.dtype)
            for g, t in zip(sums, given, strict=True)
        ]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Any, ...]:
        grads = [None if g is None else g * d_total.to(g.dtype) for g in ctx.grads]
        return (*grads, None, None, None)
