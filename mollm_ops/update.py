"""One optimizer step along Σ_k w_k g_k, with the sum never written to memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from mollm_ops import _cuda, _plain
from mollm_ops._checks import (
    GradientLists,
    Named,
    check_apart,
    check_gradients,
    check_list,
    check_means,
    check_range,
    check_scalar,
    check_steps,
    check_weights,
    flattened,
    refuse_transforms,
    refuse_without_memory,
)
from mollm_ops._extension import (
    MAX_OBJECTIVES,
    MAX_ROWS,
    extension,
    has_kernels_for,
    listed,
    memory,
)
from mollm_ops.operands import AdamWStep, RunningMeans, SgdStep, Targets
from mollm_ops.reference.update import update_reference

MAX_LISTS = MAX_OBJECTIVES + 1  # on a GPU; csrc/update.h, kMaxUpdateLists
METHODS = ("sgd", "adamw")  # the order of csrc/update.h, enum Method


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
    device = torch.device("cpu")
    counts = [p.numel() for p in targets.params]
    changes = torch.zeros(len(weights), dtype=torch.float64, device="cpu")
    second = getattr(method, "second_weights", None)
    data, dtypes = listed("gradients", rows, counts, device)
    extension.update_cpu(
        data=data,
        dtypes=dtypes,
        counts=counts,
        weights=weights.tolist(),
        second_weights=None if second is None else second.tolist(),
        means=moving and (listed("means", flattened(moving.means), counts, device), moving.beta),
        params=listed("params", targets.params, counts, device),
        first=None if targets.first is None else listed("first", targets.first, counts, device),
        second=None if targets.second is None else listed("second", targets.second, counts, device),
        steps=listed("steps", targets.steps, [1] * len(counts), device)[0],
        options=_options(method, rounding_seed),
        changes=memory("changes", changes, torch.float64, device) if track else None,
        threads=torch.get_num_threads(),
    )
    return changes


def _update_plain(
    gradients: GradientLists,
    weights: Tensor,
    targets: Targets,
    method: SgdStep | AdamWStep,
    moving: RunningMeans | None,
    rounding_seed: int | None,
    proceed: Tensor | None,
    track: bool,
) -> Tensor | None:
    """g_k · Δθ after the step of plain tensors; None, with nothing written, for all others."""
    adam = isinstance(method, AdamWStep)
    if extension is None or not _plain.eager() or adam != (targets.second is not None):
        return None
    second_weights = getattr(method, "second_weights", None)
    rate = method.lr if isinstance(method.lr, Tensor) else None
    others = _plain.numbers(weights, rate, second_weights, proceed)
    params = _plain.walk([targets.params])
    if others is None or params is None or (proceed is not None and proceed.dtype != torch.bool):
        return None
    if proceed is not None and proceed.numel() != 1:
        return None
    going = proceed is None or bool(proceed)
    rows = _plain.walk(gradients, params, optional=True)
    steps = _plain.counters(targets.steps, len(params.counts), int(going and adam))
    state = [
        None if tensors is None else _plain.walk([tensors], params)
        for tensors in (targets.first, targets.second)
    ]
    means = None if moving is None else _plain.walk(moving.means, params, optional=True)
    if (
        rows is None
        or steps is None
        or (targets.first is not None and state[0] is None)
        or (targets.second is not None and state[1] is None)
        or (moving is not None and (means is None or not _plain.covers(means, rows)))
    ):
        return None
    written = [each for each in (params, *state, means) if each is not None]
    if not _plain.apart(written, [rows, steps], others):
        return None
    if moving is not None:
        check_range("beta", moving.beta, 0, 1)
    _check_numbers(len(gradients), weights, method, rounding_seed)
    changes = torch.zeros(len(weights), dtype=torch.float64, device="cpu")
    if not going:
        return changes
    torch.autograd.graph.increment_version(
        [t for each in written for tensors in each.held for t in tensors if t is not None]
    )
    extension.update_cpu(
        data=rows.data,
        dtypes=rows.dtypes,
        counts=rows.counts,
        weights=weights.tolist(),
        second_weights=None if second_weights is None else second_weights.tolist(),
        means=None if moving is None or means is None else (means.listed, moving.beta),
        params=params.listed,
        first=None if state[0] is None else state[0].listed,
        second=None if state[1] is None else state[1].listed,
        steps=steps.data,
        options=_options(method, rounding_seed),
        changes=memory("changes", changes, torch.float64, changes.device) if track else None,
        threads=torch.get_num_threads(),
    )
    return changes


def _has_kernels(device: torch.device, lists: int) -> bool:
    return has_kernels_for(device) and lists <= (MAX_ROWS if device.type == "cpu" else MAX_LISTS)


def _dense(targets: Targets) -> bool:
    lists = (targets.params, targets.first or (), targets.second or ())
    return all(t.is_contiguous() and not t.is_neg() for tensors in lists for t in tensors)


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
        proceed: a bool on the parameters' device; where it is False nothing is written and the
            changes are 0. `targets.steps` must not count such a step.
        track: also return what the step did to each objective.

    Returns:
        float64 [K], g_k · (θ after − θ before) of the parameters as they are stored; None without
        `track`.

    Raises:
        ValueError: lists, weights and targets do not match, a number of the method is out of its
            range, or what is written shares memory with another tensor.
        TypeError: a dtype that is not supported; a tensor without memory: this function cannot be
            traced.

        Nothing is written where an error is raised.

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
    if not isinstance(method, SgdStep | AdamWStep):
        raise TypeError(
            f"method must be an SgdStep or an AdamWStep, but got {type(method).__name__}."
        )
    done = _update_plain(gradients, weights, targets, method, moving, rounding_seed, proceed, track)
    if done is not None:
        return done if track else None
    written, read = _memory_of(gradients, weights, targets, method, moving, proceed)
    tensors = [t for _, group in (*written, *read) for t in group]
    refuse_transforms("update_", tensors)
    refuse_without_memory("update_", tensors)
    _check(gradients, weights, targets, method, proceed)
    _check_numbers(len(gradients), weights, method, rounding_seed)
    if moving is not None:
        check_means(gradients, moving.means, moving.beta)
    check_apart(written, read)
    device = targets.params[0].device
    changed = [*targets.params, *(targets.first or ()), *(targets.second or ())]
    if moving is not None:
        changed += [t for t in flattened(moving.means) if t is not None]
    if not _has_kernels(device, len(gradients)) or not _dense(targets):
        if proceed is not None and not proceed.item():
            return torch.zeros_like(weights, dtype=torch.float64) if track else None
        changes = update_reference(
            gradients, weights, targets, method, moving=moving, rounding_seed=rounding_seed
        )
        return changes if track else None
    torch.autograd.graph.increment_version(changed)
    rows = [None if t is None else t.resolve_neg().contiguous() for t in flattened(gradients)]
    if device.type == "cuda":
        changes = _cuda.update(
            rows,
            weights,
            targets,
            _options(method, rounding_seed),
            lr=method.lr if _on_device(method.lr) else None,
            second_weights=getattr(method, "second_weights", None),
            means=None if moving is None else flattened(moving.means),
            beta=0.0 if moving is None else moving.beta,
            proceed=proceed,
            track=track,
        )
    elif proceed is None or proceed.item():
        changes = _update_cpu(rows, weights, targets, method, moving, rounding_seed, track)
    else:
        changes = torch.zeros(len(weights), dtype=torch.float64, device="cpu")
    return changes if track else None


def _check(
    gradients: GradientLists,
    weights: Tensor,
    targets: Targets,
    method: SgdStep | AdamWStep,
    proceed: Tensor | None,
) -> None:
    if len(gradients) == 0:
        raise ValueError("gradients must hold at least one list, but got none.")
    check_gradients([*gradients, targets.params])
    params = targets.params
    device = next(p.device for p in params if p is not None)
    check_list("targets.params", params, params, device)
    if proceed is not None:
        check_scalar("proceed", proceed, torch.bool, device)
    counted = proceed is None or device.type != "cpu" or bool(proceed)
    first = 1 if counted and isinstance(method, AdamWStep) else 0
    check_steps("targets.steps", targets.steps, len(params), device, first)
    if targets.first is not None:
        check_list("targets.first", targets.first, params, device)
    if isinstance(method, SgdStep):
        if targets.second is not None:
            raise ValueError("targets.second must be None for SGD, but got a list of tensors.")
    else:
        if targets.second is None:
            raise ValueError("targets.second must hold AdamW's second moments, but got None.")
        check_list("targets.second", targets.second, params, device)


def _check_numbers(
    lists: int, weights: Tensor, method: SgdStep | AdamWStep, rounding_seed: int | None
) -> None:
    check_weights("weights", weights, lists)
    if isinstance(method, SgdStep):
        check_range("momentum", method.momentum, 0, 1)
    else:
        check_range("beta1", method.beta1, 0, 1)
        check_range("beta2", method.beta2, 0, 1)
        check_range("eps", method.eps, 0)
        if method.second_weights is not None:
            check_weights("second_weights", method.second_weights, lists)
    check_range("weight_decay", method.weight_decay, 0)
    if not isinstance(method.lr, Tensor):
        check_range("lr", method.lr, 0)
    elif method.lr.numel() != 1:
        raise ValueError(f"lr must be one number, but got shape {tuple(method.lr.shape)}.")
    elif not method.lr.is_cuda and not method.lr.is_meta:
        check_range("lr", float(method.lr), 0)
    if rounding_seed is not None:
        check_range("rounding_seed", rounding_seed, 0, 2**64)


def _memory_of(
    gradients: GradientLists,
    weights: Tensor,
    targets: Targets,
    method: SgdStep | AdamWStep,
    moving: RunningMeans | None,
    proceed: Tensor | None,
) -> tuple[Named, Named]:
    """What the step writes and what it only reads, by name."""
    numbers = [weights, method.lr, getattr(method, "second_weights", None), proceed]
    written = [
        ("targets.params", targets.params),
        ("targets.first", targets.first or ()),
        ("targets.second", targets.second or ()),
        ("means", () if moving is None else flattened(moving.means)),
    ]
    read = [
        ("gradients", flattened(gradients)),
        ("targets.steps", targets.steps),
        ("the step's numbers", [t for t in numbers if isinstance(t, Tensor)]),
    ]
    return written, read
