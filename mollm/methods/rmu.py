"""RMU: inside the model, what it makes of the forget set becomes noise, and the rest stays.

    L = mean_i mean_t |h_t − c u|² / H + α mean_i mean_t |h_t − h_ref,t|² / H

with h the output of the block `layer` at the places from which the tokens of sequence i are
predicted, in the first term those of the forget set, in the second those of the retain set, and u a
random vector of norm 1 with elements ≥ 0, drawn by `vector_seed`. Only one matrix each of the
blocks `update_layers` trains (`update_parameters`, a pattern of names within a block); with an
adapter, all of it. Blocks count from 0.

Defaults are those of the paper for Zephyr 7B: layer 7, blocks 5, 6 and 7, c = 6.5, and 1200 for α,
the preference of the retain set. Of other models the layer lies in the first third, and c is of the
size of |h|.

Source: Li et al., WMDP, arXiv 2403.03218, section 4.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mollm.errors import UsageError
from mollm.methods.answers import AnswerTokens
from mollm.methods.method import Method
from mollm.models.forward import check_layer, layers


def misdirection_loss(
    answers: AnswerTokens,
    reference: Callable[[], AnswerTokens],
    *,
    steering_coeff: float = 6.5,
    vector_seed: int = 0,
) -> Tensor:
    """The first term of the equation above."""
    states = _states(answers)
    return _distance(answers, states, steering_coeff * random_direction(states, vector_seed))


def activation_loss(answers: AnswerTokens, original: AnswerTokens) -> Tensor:
    """The second term of the equation above, without α."""
    return _distance(answers, _states(answers), _states(original))


def random_direction(states: Tensor, seed: int) -> Tensor:
    """u, the same on every device: [H]."""
    drawn = torch.rand(
        states.shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    unit: Tensor = drawn / drawn.norm()
    return unit.to(states)


def train_some_matrices(
    model: Any,
    *,
    layer: int = 7,
    update_layers: list[int] | int | None = None,
    update_parameters: str = r"mlp\.down_proj\.weight",
) -> None:
    """Takes all but `update_parameters` of the blocks `update_layers` out of training.

    Raises:
        UsageError: There is no such block, or no such parameter in it.
    """
    blocks = layers(model)
    some = list(range(max(0, layer - 2), layer + 1)) if update_layers is None else update_layers
    some = [some] if isinstance(some, int) else some
    check_layer(model, layer)
    if not some or min(some) < 0 or max(some) > layer:
        raise UsageError(
            f"update_layers of rmu must be blocks from 0 to layer {layer}, whose output the loss "
            f"reads, but got {some}."
        )
    model.requires_grad_(False)
    for number in some:
        names = dict(blocks[number].named_parameters())
        found = [p for name, p in names.items() if re.fullmatch(update_parameters, name)]
        if not found:
            raise UsageError(
                f"update_parameters of rmu must match a parameter of block {number}, but got "
                f"{update_parameters!r}, and it has {', '.join(names)}."
            )
        for p in found:
            p.requires_grad_(True)


def check_blocks(numbers: Any) -> None:
    """Says that these are no numbers of blocks.

    Raises:
        UsageError: They are not.
    """
    some = numbers if isinstance(numbers, list | tuple) else [numbers]
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in some)
    if numbers is not None and not (some and whole):
        raise UsageError(
            "update_layers of rmu must be the number of a block from 0, or a list of such, but got "
            f"{numbers!r}."
        )


def check_pattern(pattern: str) -> None:
    """Says that this is no pattern of names.

    Raises:
        UsageError: It is not.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"update_parameters of rmu must be a regular expression, but got {pattern!r}: {error}."
        ) from error


def _states(answers: AnswerTokens) -> Tensor:
    if answers.states is None:
        raise ValueError("answers must hold the states of an inner block: give answers_of a layer.")
    wide = torch.promote_types(answers.states.dtype, torch.float32)
    return answers.states.to(wide)


def _distance(answers: AnswerTokens, states: Tensor, other: Tensor) -> Tensor:
    squares = (states - other).square().mean(1)
    sums = squares.new_zeros(answers.count).index_add(0, answers.sequence, squares)
    return (sums / answers.lengths()).sum() / answers.sequences


RMU = Method(
    "rmu",
    misdirection_loss,
    "sum",
    (1.0, 0.0, 1200.0),
    retain_loss=activation_loss,
    freeze=train_some_matrices,
    positive=("steering_coeff",),
    checks={"update_layers": check_blocks, "update_parameters": check_pattern},
)
