"""A saved optimizer state, held against the parameters that it is to be loaded for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mollm.distributed.sharding import is_sharded, local
from mollm.errors import UsageError
from mollm.system.finite import all_finite

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_MAY_BE_NONE = "momentum_buffer"
"""Of Torch's SGD, which makes it in the first step with momentum."""

_OTHER_ALGORITHMS = {
    "amsgrad": (False, "amsgrad"),
    "maximize": (False, "maximize"),
    "dampening": (0, "dampening"),
}


def check_structure(state_dict: Any) -> None:
    """Refuses what is not built as the state of an optimizer is.

    Raises:
        UsageError: it is no dictionary with a state by parameter and a list of groups.
    """
    kinds = {"state": dict, "param_groups": list, "mollm": dict}
    for name, kind in kinds.items():
        found = state_dict.get(name) if isinstance(state_dict, dict) else None
        if name == "mollm" and isinstance(state_dict, dict) and name not in state_dict:
            continue  # that of the base alone
        if not isinstance(found, kind):
            raise UsageError(
                f"the state to load must hold {name} as a {kind.__name__}, but it holds "
                f"{type(found).__name__}: is it the state_dict() of an optimizer?"
            )
    for n, entry in state_dict["state"].items():
        if not isinstance(entry, dict):
            raise UsageError(
                f"the state of parameter {n} must be a dict, but the state to load has "
                f"{type(entry).__name__}."
            )
    for group in state_dict["param_groups"]:
        known = isinstance(group, dict) and isinstance(group.get("params"), list)
        if not known or not all(isinstance(n, int | str) for n in group["params"]):
            raise UsageError(
                "every group in the state to load must be a dict with the numbers of its params."
            )


def check_finite_state(state_dict: dict[str, Any]) -> None:
    """Refuses a state, of whatever optimizer, after which no step could be good.

    Raises:
        UsageError: a tensor or an option in it is not finite, or has no memory.
    """
    options = [((), group) for group in state_dict["param_groups"]]
    for n, named in [*state_dict["state"].items(), *options]:
        for name, value in named.items():
            if isinstance(value, Tensor):
                good = not value.is_meta and all_finite(local(value))
            else:
                good = not isinstance(value, float) or math.isfinite(value)
            if not good:
                whose = "" if n == () else f" of parameter {n}"
                raise UsageError(
                    f"{name}{whose} must be finite, but the state to load has something else: load "
                    "an earlier checkpoint."
                )


def check_options(group: dict[str, Any]) -> None:
    """Refuses numbers in a group, of whatever optimizer, with which no step could be good.

    Raises:
        ValueError: an option is NaN, or lr or weight_decay is not finite.
    """
    for name, value in group.items():
        some = value if isinstance(value, tuple | list) and name != "params" else (value,)
        for number in some:
            bad = isinstance(number, float) and not math.isfinite(number)
            if bad and (math.isnan(number) or name in ("lr", "weight_decay")):
                raise ValueError(f"{name} must be finite, but got {value}.")


def check_kinds(state: dict[Any, dict[str, Any]], own: list[dict[str, Any]]) -> None:
    """Refuses, of an optimizer that nothing is known of, a state in which something else stands
    where it keeps a tensor for other parameters, or has kept one so far.

    Args:
        state: By parameter, to be loaded.
        own: What the optimizer has, of each parameter that it has stepped.

    Raises:
        UsageError: there is one; it is named.
    """
    kept = {
        name
        for entry in (*state.values(), *own)
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }
    for n, entry in state.items():
        for name in kept & set(entry):
            value = entry[name]
            if not isinstance(value, Tensor) and not (value is None and name == _MAY_BE_NONE):
                raise UsageError(
                    f"{name} of parameter {n} must be a tensor, but the state to load has "
                    f"{type(value).__name__}: load an earlier checkpoint."
                )


def check_entry(what: str, value: Any, n: int, p: Tensor) -> None:
    """Refuses what is no state of parameter n.

    Raises:
        UsageError: it is not a tensor of a float dtype, or not of the shape and sharding of p; an
            element is not finite, or negative in exp_avg_sq.
    """
    if not isinstance(value, Tensor) or value.dtype not in _FLOATS:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(
            f"{what} of parameter {n} must be a tensor of a float dtype, but the state to load has "
            f"{got}."
        )
    if is_sharded(value) != is_sharded(p):
        raise UsageError(
            f"{what} of parameter {n} must be sharded as the parameter is, but in the state to "
            "load it is not: use torch.distributed.checkpoint.state_dict."
        )
    if value.shape != p.shape or local(value).shape != local(p).shape:
        raise UsageError(
            f"{what} of parameter {n} must have shape {tuple(p.shape)}, but the state to load has "
            f"{tuple(value.shape)}: it is of another model, or of other parameters."
        )

    mine = local(value)
    if not all_finite(mine):
        raise UsageError(
            f"{what} of parameter {n} must be finite, but the state to load has "
            f"{int((~mine.isfinite()).sum())} elements that are not: load an earlier checkpoint."
        )
    if what == "exp_avg_sq" and bool((mine < 0).any()):
        raise UsageError(
            f"{what} of parameter {n} must not be negative, but the state to load has "
            f"{float(mine.min())}: load an earlier checkpoint."
        )


def check_scales(what: str, codes: Tensor, scales: Any, count: int, n: int, p: Tensor) -> None:
    """Refuses what is no state of parameter n in 8 bits.

    Raises:
        UsageError: the codes have not the shape of p, or there are not `count` finite scales from 0
            up.
    """
    fits = isinstance(scales, Tensor) and scales.shape == (count,) and codes.shape == p.shape
    if not fits or not bool((scales.isfinite() & (scales >= 0)).all()):
        raise UsageError(
            f"{what} of parameter {n} must be {tuple(p.shape)} codes and {count} finite scales "
            "from 0 up, but the state to load has others: load an earlier checkpoint."
        )


def check_step(value: Any, n: int) -> float:
    """The number of steps behind a parameter.

    Raises:
        UsageError: it is no such number.
    """
    number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    steps = float(value) if number else -1.0
    if not 0 <= steps < 2**32:
        raise UsageError(f"step of parameter {n} must be in [0, 2³²), but got {value!r}.")
    return steps


def check_number(what: str, value: Any, *, whole: bool = False, positive: bool = False) -> None:
    """Refuses what is no finite number from 0 up, not whole or not above 0 where it must be.

    Raises:
        UsageError: it is none.
    """
    good = isinstance(value, int if whole else (int, float)) and 0 <= value < math.inf
    if not good or (positive and value == 0):
        kind = "an integer" if whole else "a finite number"
        kind = "a positive finite number" if positive else f"{kind} from 0 up"
        raise UsageError(f"{what} in the state to load must be {kind}, but is {value!r}.")


def check_narrowing(what: str, value: Tensor, n: int, dtype: torch.dtype) -> None:
    """Refuses a state that overflows in the dtype that it is to have.

    Raises:
        UsageError: it does.
    """
    mine = local(value)
    if torch.finfo(dtype).max >= torch.finfo(mine.dtype).max or not mine.numel():
        return
    if not all_finite(mine.to(dtype)):
        raise UsageError(
            f"{what} of parameter {n} overflows in {dtype}: choose a wider state_dtype, such as "
            "torch.float32."
        )


def check_same_algorithm(group: dict[str, Any], base: str) -> None:
    """Refuses options of Torch's own AdamW, Adam and SGD that the fused bases do not have.

    Raises:
        UsageError: one of them is on.
    """
    for name, (off, told) in _OTHER_ALGORITHMS.items():
        if group.get(name, off) != off:
            raise UsageError(
                f"the state to load was made with {told}={group[name]}, which base {base!r} does "
                "not have: pass base=torch.optim.AdamW or torch.optim.SGD."
            )
    coupled = not group.get("decoupled_weight_decay", True) or "dampening" in group
    if coupled and group.get("weight_decay", 0) != 0:
        raise UsageError(
            f"the state to load was made with weight_decay={group['weight_decay']} added to the "
            f"gradient, but that of base {base!r} is decoupled: set it to 0 in the state, or pass "
            "the optimizer that made it as base."
        )
