"""Which parameters of a model train, chosen by parts of their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mollm.errors import UsageError
from mollm.system.parsing import parse_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_parts(given: Any) -> tuple[str, ...]:
    """Parts of names as a list, one of them, or a list in YAML or JSON; none for None.

    Raises:
        UsageError: It is something else, or one of them is empty.

    Example:
        >>> read_parts(".mlp."), read_parts("[q_proj, k_proj]"), read_parts(None)
        (('.mlp.',), ('q_proj', 'k_proj'), ())
    """
    parts = given
    if isinstance(given, str):
        parts = parse_yaml(given, "trainable_parameters") if given.startswith("[") else [given]
    is_list = isinstance(parts, list | tuple | None)
    if not is_list or not all(isinstance(part, str) and part for part in parts or ()):
        raise UsageError(
            "trainable_parameters must be parts of names of parameters, such as ['.mlp.'], but got "
            f"{given!r}."
        )
    return tuple(parts or ())


def train_only(model: PreTrainedModel, parts: Sequence[str]) -> None:
    """Takes out of training what has none of `parts` in its name.

    Args:
        model: Whose parameters train or do not.
        parts: Parts of names, such as ".mlp.", "down_proj" or "layers.7.".

    Raises:
        UsageError: One of them is in no name of a parameter that trains.
    """
    trains = names_with(parts, {name: p.requires_grad for name, p in model.named_parameters()})
    for name, p in model.named_parameters():
        p.requires_grad_(name in trains)


def names_with(parts: Sequence[str], names: Mapping[str, bool]) -> set[str]:
    """The names that hold one of `parts`, of what may train.

    Args:
        parts: Of names of parameters.
        names: Of all parameters of a model, with whether each may train.

    Raises:
        UsageError: A part is in no name, or in those alone of what may not.

    Example:
        >>> sorted(names_with(["mlp"], {"0.mlp": True, "1.mlp": True, "0.norm": True}))
        ['0.mlp', '1.mlp']
    """
    for part in parts:
        found = [name for name in names if part in name]
        if not found:
            kinds = sorted({re.sub(r"\.\d+(?=\.)", ".N", name) for name in names})
            raise UsageError(
                f"trainable_parameters must be parts of names of parameters, but no name holds "
                f"{part!r}: take parts of {', '.join(kinds)}."
            )
        if not any(names[name] for name in found):
            raise UsageError(
                f"trainable_parameters must name what is not frozen, but {part!r} names "
                f"{found[0]}, which is: let it train, of embeddings and head with "
                "freeze_embeddings=False, or leave it out."
            )
    return {name for name, may in names.items() if may and any(part in name for part in parts)}
