"""One optimizer step along Σ_k w_k g_k, with the sum never written to memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from mollm_ops import _cuda
from mollm_ops._checks import GradientLists, check_dtype, check_gradients, check_means
from mollm_ops._extension import (
    MAX_OBJECTIVES,
    addresses,
    dtype_codes,
    extension,
    has_kernels_for,
    listed,
)
from mollm_ops.operands import AdamWStep, RunningMeans, SgdStep, Targets
from mollm_ops.reference.update import update_reference

MAX_LISTS = MAX_OBJECTIVES + 1  # on a GPU; csrc/update.h, kMaxUpdateLists
METHODS = ("sgd", "adamw")  # the order of csrc/update.h, enum Method


# ---- reference: plain Torch, the definition


# ---- the extension


def _on_device(lr: float | Tensor) -> TypeGuard[Tensor]:
    """Whether the kernel must read the learning rate itself: the host would have to wait for it."""
    return isinstance(lr, Tensor) and lr.is_cuda


def _options(method: SgdStep | AdamWStep, rounding_seed: int | None) -> dict[str, object]:
    """The numbers of csrc/update.h, UpdateOptions."""
    return {
        "method": METHODS.index("adamw" if isinstance(method, AdamWStep) else "sgd"),
        "lr": 0.0 if _on_device(method.lr) else float(method.lr),
        "weight_decay": method.weight_decay,
        "momentum": getattr(method, "momentum", 0.0),
        "nesterov": getattr(method, "nesterov", False),
        "beta1": getattr(method, "beta1", 0.0),
        "beta2": getattr(method, "beta2", 0.0),
        "eps": getattr(method, "eps", 0.0),
        "rounding_seed": rounding_seed,
    }


def _update_cpu(
    rows: Sequence[Tensor | None],
    weights: Tensor,
    targets: Targets,
    method: SgdStep | AdamWStep,
    moving: RunningMeans | None,
    rounding_seed: int | None,
    track: bool,
) -> Tensor:
    assert extension is not None, "has_kernels_for(cpu) implies the extension"
    changes = torch.zeros(len(weights), dtype=torch.float64)
    second = getattr(method, "second_weights", None)
    extension.update_cpu(
        data=addresses(rows),
        dtypes=dtype_codes(rows),
        counts=[p.numel() for p in targets.params],
        weights=weights.tolist(),
        second_weights=None if second is None else second.tolist(),
        means=moving and (listed(_flat(moving.means)), moving.beta),
        params=listed(targets.params),
        first=None if targets.first is None else listed(targets.first),
        second=None if targets.second is None else listed(targets.second),
        steps=addresses(targets.steps),
        options=_options(method, rounding_seed),
        changes=changes.data_ptr() if track else 0,
        threads=torch.get_num_threads(),
    )
    return changes


def _flat(lists: GradientLists) -> list[Tensor | None]:
    return [t for tensors in lists for t in tensors]


def _has_kernels(device: torch.device, lists: int) -> bool:
    return has_kernels_for(device) and (device.type == "cpu" or lists <= MAX_LISTS)


def _dense(targets: Targets) -> bool:
    lists = (targets.params, targets.first or (), targets.second or ())
    return all(t.is_contiguous() for tensors in lists for t in tensors)


# ---- public function


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def update_(
    gradients: GradientLists,
    weights: Tensor,
    targets: Targets,
    method: SgdStep | AdamWStep,
    *,
    moving: RunningMeans | None = None,
    rounding_seed: int | None = None,
    proceed: Tensor | None = None,
    track: bool = False,
) -> Tensor | None:
    """One step of `method` along d = Σ_k w_k g_k, in place.

    Gradients, parameters and state are read once, parameters and state written once; d is never
    written. Everything is computed in float32 (float64 where one of a parameter's tensors is) and
    rounded once. On a GPU nothing waits for the device, except with more than 9 lists of gradients
    or where a parameter or its state is not contiguous: the step is then made in plain Torch.

    Args:
        gradients: K lists of N tensors or None, as for `gram`.
        weights: w, [K].
        targets: parameters and state; see `Targets`.
        method: `SgdStep` or `AdamWStep`.
        moving: running means that take the gradients' place and are moved on; see `RunningMeans`.
        rounding_seed: round every bfloat16 result up or down at random, so that its mean is exact:
            steps far smaller than a bfloat16's spacing are then not lost. The same seed, steps and
            tensors give the same bits on every device.
        proceed: a scalar on the parameters' device; where it is 0 nothing is written and the
            changes are 0. `targets.steps` must not count such a step.
        track: also return what the step did to each objective.

    Returns:
        float64 [K], g_k · (θ after − θ before) of the parameters as they are stored; None without
        `track`.

    Raises:
        ValueError: lists, weights and targets do not match.
        TypeError: a dtype that is not supported.

    Example:
        >>> import torch
        >>> p = torch.tensor([1.0, 1.0])
        >>> g = [[torch.tensor([2.0, 0.0])], [torch.tensor([-1.0, 1.0])]]
        >>> targets = Targets([p], first=None, second=None, steps=[torch.tensor(1.0)])
        >>> update_(g, torch.tensor([1.0, 2.0]), targets, SgdStep(lr=0.5), track=True)
        tensor([ 0., -1.], dtype=torch.float64)
        >>> p
        tensor([1., 0.])
    """
    _check(gradients, weights, targets, method)
    changed = [*targets.params, *(targets.first or ()), *(targets.second or ())]
    if moving is not None:
        check_means(gradients, moving.means)
        changed += [t for tensors in moving.means for t in tensors if t is not None]
    device = changed[0].device
    if not _has_kernels(device, len(gradients)) or not _dense(targets):
        if proceed is not None and not proceed.item():
            return torch.zeros_like(weights, dtype=torch.float64) if track else None
        changes = update_reference(
            gradients, weights, targets, method, moving=moving, rounding_seed=rounding_seed
        )
        return changes if track else None
    torch.autograd.graph.increment_version(changed)
    rows = [None if t is None else t.contiguous() for t in _flat(gradients)]
    if device.type == "cuda":
        changes = _cuda.update(
            rows,
            weights,
            targets,
            _options(method, rounding_seed),
            lr=method.lr if _on_device(method.lr) else None,
            second_weights=getattr(method, "second_weights", None),
            means=None if moving is None else _flat(moving.means),
            beta=0.0 if moving is None else moving.beta,
            proceed=proceed,
            track=track,
        )
    elif proceed is None or proceed.item():
        changes = _update_cpu(rows, weights, targets, method, moving, rounding_seed, track)
    else:
        changes = torch.zeros(len(weights), dtype=torch.float64)
    return changes if track else None


def _check(
    gradients: GradientLists, weights: Tensor, targets: Targets, method: SgdStep | AdamWStep
) -> None:
    check_gradients([*gradients, targets.params])
    if weights.shape != (len(gradients),):
        raise ValueError(
            f"weights must have one entry per list of gradients ({len(gradients)}), "
            f"but got shape {tuple(weights.shape)}."
        )
    if isinstance(method, AdamWStep) and targets.second is None:
        raise ValueError("targets.second must hold AdamW's second moments, but got None.")
    for name in ("first", "second", "steps"):
        tensors: Sequence[Tensor] | None = getattr(targets, name)
        if tensors is None:
            continue
        if len(tensors) != len(targets.params):
            raise ValueError(
                f"targets.{name} must have one tensor per parameter ({len(targets.params)}), "
                f"but got {len(tensors)}."
            )
        for n, (t, p) in enumerate(zip(tensors, targets.params, strict=True)):
            if t.device != p.device or (name != "steps" and t.shape != p.shape):
                raise ValueError(
                    f"targets.{name}[{n}] must have shape {tuple(p.shape)} on {p.device}, but got "
                    f"{tuple(t.shape)} on {t.device}."
                )
            if name != "steps":
                check_dtype(f"targets.{name}[{n}]", t)
            elif t.dtype != torch.float32:
                raise TypeError(f"targets.steps[{n}] must be float32, but got {t.dtype}.")
