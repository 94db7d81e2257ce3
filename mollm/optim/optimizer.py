"""MOLLMOptimizer: one optimizer step along a common descent direction of several objectives."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import Optimizer

from mollm.distributed.sharding import (
    Lists,
    Sharding,
    by_sharding,
    expect_backward,
    is_sharded,
    local,
    local_gradients,
    locals_of,
    placed_like,
    refuse_partitioned,
    refuse_unlike_copies,
    world_size,
)
from mollm.errors import UsageError
from mollm.optim.bases import SGD, AdamW, FusedBase
from mollm.optim.constants import BLOCKS, MODEL, PER_OBJECTIVE, STREAMED
from mollm.optim.directions import make_rule
from mollm.optim.groups import alike, columns_of, columns_of_means, slices_of
from mollm.optim.idle_options import (
    LENGTH,
    MEAN_BETA,
    NORMALIZE,
    refuse_idle_first_beta,
    refuse_idle_options,
)
from mollm.optim.means import ObjectiveMeans, moved, next_means
from mollm.optim.saved_state import (
    check_finite_state,
    check_kinds,
    check_number,
    check_options,
    check_structure,
)
from mollm.optim.scaling import Watched
from mollm.optim.step_report import SkipCounter, StepReport, level_outside
from mollm.optim.streamed import StreamedGradients, make_store
from mollm_ops import Solution, Status, combine, dots, gram
from mollm_ops.gram import gram_moved
from mollm_ops.operands import RunningMeans, largest_moment

_ROOM = 2.0**-8
"""What bias corrections of running means and sums over objectives may add."""
_Piece = tuple[Sharding, list[Tensor], Lists]
"""Parameters that are sharded alike, with their K lists of gradients."""


def _make_base(
    base: str | Callable[..., Optimizer], params: Any, lr: float | Tensor, options: dict[str, Any]
) -> Optimizer:
    classes: dict[str, Callable[..., Optimizer]] = {"adamw": AdamW, "sgd": SGD}
    make = base if callable(base) else classes.get(base)
    if make is None:
        raise ValueError(
            f"base must be 'adamw', 'sgd', or an optimizer class or factory, but got {base!r}."
        )
    most = torch.finfo(torch.float32).max
    for name, value in {"lr": lr, **options}.items():
        on_host = isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() == 1
        if (on_host or isinstance(value, float)) and not abs(float(value)) <= most:
            raise ValueError(f"{name} must be a finite number in float32, but got {value}.")
    try:
        made = make(params, lr=lr, **options)
        if not isinstance(made, Optimizer):
            raise TypeError(f"base must make an Optimizer of Torch, but made {made!r}.")
        return made
    except TypeError as error:
        if callable(base):
            raise
        raise TypeError(
            f"base {base!r} does not take these options: {error}; for those of Torch's own pass "
            f"base=torch.optim.{'AdamW' if base == 'adamw' else 'SGD'}."
        ) from None


class _Parts:
    """Sums over this process's parts of the parameters, by how these are sharded."""

    def __init__(self) -> None:
        self.sums: dict[Sharding, Tensor] = {}

    def add(self, sharding: Sharding, part: Tensor) -> None:
        known = self.sums.get(sharding)
        self.sums[sharding] = part if known is None else known + part

    def total(self, over_processes: Callable[[Sharding, Tensor], Tensor]) -> Tensor:
        each = [over_processes(sharding, part) for sharding, part in self.sums.items()]
        return torch.stack(each).sum(0)


@dataclass(frozen=True)
class _Solved:
    """The Gram matrix of the gradients that wait, and what the rule made of it."""

    matrix: Tensor
    solution: Solution
    """Of the rule, refused if the optimizer's state could not hold the step along it."""
    overflows: bool = False
    """Whether it was refused for that, if the host knows."""


@dataclass(frozen=True)
class _Aggregated:
    """What aggregate() left for step()."""

    solved: _Solved
    gradients: Watched
    assumed_scale: Tensor | None
    """What the gradients that wait were divided by before they were solved for."""
    norm: Tensor | None
    """|p.grad| as it was left, if a step along running means may have to know."""


def _first(tensors: Sequence[Tensor | None]) -> Tensor | None:
    return next((t for t in tensors if t is not None), None)


class MOLLMOptimizer(Optimizer):
    """Steps along a common descent direction of several objectives' gradients.

        G_ij = g_i · g_j,   w = rule(G),   d = Σ_k w_k g_k,   θ ← base(θ, d)

    With `base="sgd"` that is θ ← θ − lr · d. Each objective's backward runs inside
    `with opt.objective(name)`; the gradients it writes are taken over without a copy, and several
    backwards inside the same objective accumulate. Memory: one gradient per objective. The bases
    "adamw" and "sgd" read those, and never write d; other bases need one more for d.

    After `step()` the objectives are empty again, and `p.grad` is None; with another base it holds
    d until `zero_grad()`. Call `aggregate()` before `step()` to have d in `p.grad`, for gradient
    clipping or a `GradScaler`: what multiplies all of `p.grad` by one number then multiplies every
    gradient by it, second moments included. So the scale of a GradScaler makes no difference, and
    clipping shortens a step of AdamW no more than in Torch. Any other change to `p.grad` changes
    the direction alone. A `p.grad` set to None keeps its parameter out of the step; where none is
    left, as after `model.zero_grad()`, `step()` raises.

    Parameter groups: each may have its own learning rate, β₂, ε, weight decay and state_dtype.

    A step that fails before it has written anything, in a hook for example, leaves parameters,
    state and counters as they were. One that is interrupted later leaves them half written: the
    optimizer then warns, and refuses to step or to be saved until `load_state_dict()`.

    Several processes: under DistributedDataParallel and FSDP2 every process solves the same K × K
    problem and updates its own part of the parameters; see `mollm.distributed.sharding`.

    Args:
        params: as for any Torch optimizer; DTensors too.
        lr: learning rate of the base optimizer.
        objectives: their names, in the order of the Gram matrix.
        base: "adamw" or "sgd" (see `mollm.optim.bases`), or an optimizer class or factory called as
            base(params, lr=lr, **base_options). On a GPU such a base waits for the device in every
            step, to know whether it is to be skipped.
        direction: "upgrad", "project", "dual" (the centre of the dual cone, the paper's), "mgda",
            "pcgrad", "sum", "retain-first" and "forget-first" (the first objective being
            forgetting), or a callable from the Gram matrix to weights, such as a TorchJD
            `Weighting`.
        preferences: weights c_k ≥ 0 on the objectives, for all by name but "dual" and "mgda".
        normalize: let the rule work on gradients scaled to a common norm.
        length: "mean", "min-norm" or "first"; see `mollm_ops.dual_space_weights`.
        momentum: a number is handed to the base; "per-objective" keeps a running mean of each
            objective's gradient, takes Gram matrix and direction from those, and turns the base's
            own momentum off. It costs K gradients of state.
        mean_beta: β of those means.
        metric: "base" takes the Gram matrix in the metric P of the update, so that the certificate
            holds for the update that is applied (before weight decay):
            g_k · Δθ = −lr g_k · P d < 0, lr being the largest learning rate of all groups and
            r = lr_group / lr. With "adamw"
            P = r / (√v̂ + ε), v is the running mean of Σ_k c_k² g_k² (c: the rule's weights for
            orthonormal gradients), β₂ and ε are the group's, and there is no first moment; with
            other bases P = r. "euclidean": P = 1, and "adamw" is Torch's.
        gradient_memory: where gradients wait for the step: "as-produced"; "bfloat16", rounded;
            "host", in pinned host memory; "streamed", nowhere: `step()` makes them twice, block by
            block, see `streamed()`. That goes with the bases "adamw" and "sgd".
        gram: "model" solves one problem for the whole step. "blocks", for streamed gradients,
            solves one for each block and moves it at once, G_b → w_b → Δθ_b: a step takes one sweep
            in place of two. Then Σ_b g_k,b · Δθ_b < 0 as a sum of such terms, but each block has a
            direction of its own; `last_step` has the sum of the Gram matrices and the mean of the
            weights. A block may turn out not to be finite after others have moved: the step ends
            there, and leaves that block and those that come after it as they were.
        on_nonfinite: what to do if a gradient is not finite, or so large that the state after the
            step would not be (in AdamW an element above 1.8e19, or about 8000 with a state in
            float16). "skip" leaves weights and state as they are, counts the step in
            `skipped_steps` and warns once; "raise" raises FloatingPointError, and has to wait for
            the device in every step.
        track_conflicts: measure g_k · Δθ for the update really applied. With the bases "adamw" and
            "sgd" it costs nothing to speak of, with others a gradient's memory and two more reads.
        **base_options: handed to the base optimizer, for example weight_decay.

    Raises:
        ValueError: an option is out of range, or mean_beta, normalize or length would do nothing
            beside the others.

    Source: arXiv 2412.20412, section III.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = MOLLMOptimizer([x], lr=0.1, objectives=("left", "down"), base="sgd")
        >>> optimizer.backward({"left": (x[0] + 2).square(), "down": (x[1] - x[0] + 1).square()})
        >>> optimizer.step()
        >>> optimizer.last_step.conflicts  # the two gradients conflict, the step does not
        {'left': False, 'down': False}
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-5,
        *,
        objectives: Sequence[str] = ("forget", "kl", "retain"),
        base: str | Callable[..., Optimizer] = "adamw",
        direction: str | Callable[[Tensor], Tensor] = "upgrad",
        preferences: Sequence[float] | None = None,
        normalize: bool = NORMALIZE,
        length: str = LENGTH,
        momentum: float | str | None = None,
        mean_beta: float = MEAN_BETA,
        metric: str = "base",
        gradient_memory: str = "as-produced",
        gram: str = MODEL,
        on_nonfinite: str = "skip",
        track_conflicts: bool = True,
        **base_options: Any,
    ) -> None:
        names = tuple(objectives)
        if isinstance(objectives, str) or not names or len(set(names)) != len(names):
            raise ValueError(f"objectives must be distinct names, but got {objectives!r}.")
        if on_nonfinite not in ("skip", "raise"):
            raise ValueError(f"on_nonfinite must be 'skip' or 'raise', but got {on_nonfinite!r}.")
        if metric not in ("base", "euclidean"):
            raise ValueError(f"metric must be 'base' or 'euclidean', but got {metric!r}.")
        if isinstance(momentum, str) and momentum != PER_OBJECTIVE:
            raise ValueError(
                f"momentum must be a number or {PER_OBJECTIVE!r}, but got {momentum!r}."
            )
        if gram not in (MODEL, BLOCKS):
            raise ValueError(f"gram must be {MODEL!r} or {BLOCKS!r}, but got {gram!r}.")
        if gram == BLOCKS and gradient_memory != STREAMED:
            raise ValueError(
                f"gram must be {MODEL!r} without gradient_memory={STREAMED!r}, which alone knows "
                f"blocks, but got {gram!r} and {gradient_memory!r}."
            )
        if gram == BLOCKS and momentum == PER_OBJECTIVE:
            raise ValueError(
                f"momentum must be a number with gram={BLOCKS!r}, where a step may end between two "
                f"blocks, but got {momentum!r}."
            )
        self._make_rule = functools.partial(
            make_rule, direction, objectives=len(names), normalize=normalize, length=length
        )
        self.rule = self._make_rule(preferences=preferences)
        refuse_idle_options(
            direction, normalize=normalize, length=length, momentum=momentum, mean_beta=mean_beta
        )
        self.objectives = names
        self.on_nonfinite = on_nonfinite
        self.track_conflicts = track_conflicts
        self._store = make_store(names, gradient_memory)
        self._means = ObjectiveMeans(mean_beta) if momentum == PER_OBJECTIVE else None
        self.gram = gram
        self._skips = SkipCounter(self._outcome)
        self._open: str | None = None
        self._aggregated: _Aggregated | None = None
        self._scale: Tensor | None = None  # of the GradScaler at the last step
        self._interrupted = False
        self._stale = False  # p.grad holds what a step has used up
        self._unchecked_steps = 2  # one more than the first: KL has no gradient there
        self._last_step: StepReport | None = None
        if momentum is not None and not isinstance(momentum, str):
            base_options["momentum"] = momentum
        self.base = _make_base(base, params, lr, base_options)
        if self.streams and not isinstance(self.base, FusedBase):
            raise ValueError(
                f"gradient_memory must be another one than {STREAMED!r} with a base that is not "
                f"'adamw' or 'sgd', but got base {base!r}, which wants all gradients at once."
            )
        self.metric = metric
        preconditioned = metric == "base" and isinstance(self.base, AdamW)
        self._second_weights = self._unopposed_weights().square() if preconditioned else None
        if isinstance(self.base, FusedBase) and (preconditioned or self._means):
            self.base.drop_first()
            refuse_idle_first_beta(base_options.get("betas"))
        refuse_partitioned([p for group in self.base.param_groups for p in group["params"]])
        super().__init__(self.base.param_groups, self.base.defaults)
        self._share_state_with_base()

    @property
    def _outcome(self) -> str:
        """Of a step that met something that is not finite."""
        if self.gram == BLOCKS:
            return "the step ended there, that block and those that come after it are unchanged"
        return "the step was skipped, weights and optimizer state are unchanged"

    def set_preferences(self, preferences: Sequence[float]) -> None:
        """Other weights c_k on the objectives, from the next step on.

        Raises:
            ValueError: as for the optimizer's own.
        """
        self.rule = self._make_rule(preferences=preferences)
        if self._second_weights is not None:
            self._second_weights = self._unopposed_weights().square()

    def change_gradients(
        self, function: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    ) -> None:
        """Replaces the gradients that wait, parameter by parameter, before `step()`.

        Args:
            function: from one parameter's gradients by objective, each in the parameter's shape, or
                that of this process's part, to as many others.

        Raises:
            RuntimeError: gradients are streamed, so that none waits, or an objective has none.
            ValueError: what the function gives is no mapping from objectives to tensors of the
                gradients' shape; nothing has been replaced then.

        Example:
            >>> import torch
            >>> x = torch.nn.Parameter(torch.tensor([1.0]))
            >>> optimizer = MOLLMOptimizer([x], objectives=("a",), base="sgd", lr=1.0)
            >>> optimizer.backward({"a": x.sum()})
            >>> optimizer.change_gradients(lambda g: {"a": 2 * g["a"]})
            >>> optimizer.step()
            >>> x.item()
            -1.0
        """
        if self.streams:
            raise RuntimeError("change_gradients() needs gradients that wait, but got 'streamed'.")
        self._store.change(self._touched(), function)

    def _unopposed_weights(self) -> Tensor:
        """What the rule gives to orthonormal gradients, [K]."""
        return self.rule(torch.eye(len(self.objectives), dtype=torch.float64)).weights

    def _share_state_with_base(self) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, also between two steps; their state starts from zero.

        Raises:
            RuntimeError: between `aggregate()` and `step()`.
        """
        if "param_groups" not in self.__dict__ or self.param_groups is not self.base.param_groups:
            return  # Optimizer.__init__ hands in the groups that the base has
        if self._aggregated is not None:
            raise RuntimeError(
                "add_param_group() was called between aggregate() and step(): call it before the "
                "backward."
            )
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        refuse_partitioned([*self._parameters(), *(p for p in params if isinstance(p, Tensor))])
        self.base.add_param_group({**param_group, "params": params})

    # ---- gradients in

    def _parameters(self) -> list[Tensor]:
        scalar = None if self._aggregated is None else self._aggregated.gradients.scalar
        groups = self.base.param_groups
        return [p for group in groups for p in list.copy(group["params"]) if p is not scalar]

    def _check_name(self, name: str) -> None:
        if name not in self.objectives:
            raise ValueError(
                f"objective must be one of {', '.join(self.objectives)}, but got {name!r}."
            )

    @contextmanager
    def objective(self, name: str) -> Iterator[None]:
        """Whatever backward writes inside belongs to this objective.

        Entering again before `step()` accumulates. Where the block raises, this objective's
        gradient is dropped, since it may be half written.

        Raises:
            ValueError: unknown name.
            RuntimeError: inside another objective, after `aggregate()`, where a parameter already
                has a gradient of no objective, or where the block wrote no gradient at all.
        """
        self._check_name(name)
        self._lend(name)
        keep: str | None = None
        try:
            yield
            keep = name
        finally:
            self._open = None
            taken = self._store.take(keep, self._parameters())
        if not taken:
            raise RuntimeError(
                f"objective {name!r} got no gradient: call backward() inside the block, on a loss "
                "that depends on the optimizer's parameters."
            )

    def _lend(self, name: str) -> None:
        self._refuse_interrupted()
        if self.streams:
            raise RuntimeError(
                f"objective {name!r} has no place for gradients with gradient_memory='streamed': "
                "call optimizer.backward(losses) inside `with optimizer.streamed(blocks)`."
            )
        if self._open is not None:
            raise RuntimeError(f"objective {name!r} was opened inside objective {self._open!r}.")
        if self._aggregated is not None:
            raise RuntimeError(
                f"objective {name!r} was opened after aggregate(): call step() or zero_grad() "
                "first."
            )
        self._refuse_strays()
        self._store.lend(name, self._parameters())
        self._stale = False
        self._open = name

    def _refuse_strays(self) -> None:
        if self._stale:
            return
        for n, p in enumerate(self._parameters()):
            if p.grad is not None:
                raise RuntimeError(
                    f"parameter {n} has a gradient of no objective: call zero_grad(), or run that "
                    "backward() inside `with optimizer.objective(name)`."
                )

    @property
    def streams(self) -> bool:
        """Whether gradients are made block by block in `step()`."""
        return self._store.memory == STREAMED

    @contextmanager
    def streamed(self, blocks: Sequence[nn.Module], *, add_up: bool = False) -> Iterator[None]:
        """Forward passes inside keep the inputs of blocks alone, for gradient_memory="streamed".

        `backward()` then takes the losses of a micro-batch, and `step()` goes over the blocks
        twice, from the last to the first. It computes each block once more and takes its K
        gradients: the first time for the Gram matrix, the second time to change the block on the
        spot. The step is that of the other gradient memories. Beside weights and state it takes the
        blocks' inputs and K gradients of the largest block. Parameters outside of the blocks are a
        block of their own; of embeddings and head, if they train, some rows at a time, see
        `mollm.models.matrices` for what has to be held as a whole.

        Args:
            blocks: modules that run one after the other, such as `mollm.find_blocks(model)`.
            add_up: sum the gradients over processes that each hold a copy of the model; their
                losses must be shares of one mean, such as those of `mollm.Objectives` with totals.

        Raises:
            UsageError: the blocks do not run one after the other, share parameters, checkpoint
                their activations or get a cache of keys (pass use_cache=False); a model in parts
                (FSDP2) trains something before the blocks, or a block is no group of its own; or
                there are several processes that hold copies and `add_up` is False.
            RuntimeError: the gradient_memory is another one.

        Example:
            >>> import torch
            >>> body = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
            >>> optimizer = MOLLMOptimizer(
            ...     body.parameters(), objectives=("a", "b"), gradient_memory="streamed"
            ... )
            >>> with optimizer.streamed(list(body)):
            ...     y = body(torch.ones(1, 2))
            ...     optimizer.backward({"a": y[0, 0], "b": y[0, 1]})
            >>> optimizer.step()
            >>> optimizer.last_step.conflicts
            {'a': False, 'b': False}
        """
        self._refuse_interrupted()
        if not isinstance(self._store, StreamedGradients):
            raise RuntimeError(
                f"streamed() needs gradient_memory={STREAMED!r}, but got {self._store.memory!r}."
            )
        with self._store.recording(blocks, self._parameters(), add_up=add_up):
            yield

    def backward(self, losses: Mapping[str, Tensor], model: nn.Module | None = None) -> None:
        """Backward of every objective's loss, when all their graphs are alive.

        Graphs may share parts (the forward of the retain batch, say); they are freed with the last
        loss. Inside `streamed()` it may also be called for some of the objectives at a time.

        Args:
            losses: by objective.
            model: the model as wrapped, needed under DistributedDataParallel alone: it would not
                average the gradients of several backwards; see `expect_backward`.

        Raises:
            ValueError: the names are not the optimizer's objectives.
        """
        for name in losses:
            self._check_name(name)
        if isinstance(self._store, StreamedGradients) and losses:
            self._refuse_interrupted()
            self._refuse_strays()
            self._store.record(losses)
            return
        missing = [name for name in self.objectives if name not in losses]
        if missing:
            raise ValueError(f"losses must have every objective, but {missing} are missing.")
        last = list(losses)[-1]
        for name, loss in losses.items():
            with self.objective(name):
                ready = loss if model is None else expect_backward(model, loss)
                torch.autograd.backward(ready, retain_graph=name != last)

    # ---- direction and update

    @torch.no_grad()
    def aggregate(self) -> None:
        """Solves for the direction and puts d = Σ_k w_k g_k into `p.grad`; `step()` then uses it.

        `step()` does without. Call it in between to clip d or before a GradScaler looks at the
        gradients. If the Gram matrix is not finite, `p.grad` becomes NaN, so that a GradScaler
        lowers its scale. A second call before `step()` changes nothing. If it raises, every
        objective's gradient is dropped.

        In the step in which a GradScaler changes its scale, d is found once more when the scale is
        known, and cut to the length that it had been cut to. Where running means make d too short
        to be cut before and long enough after, it stays uncut in that step.

        Raises:
            RuntimeError: an objective has no gradient, or a parameter one of no objective; the
                optimizer steps in AdamW's metric along running means, whose second moment needs
                these means and the gradients too.
        """
        self._refuse_interrupted()
        if self._aggregated is not None:
            return
        if self.streams:
            raise RuntimeError(
                "aggregate() does not go with gradient_memory='streamed', where no gradient is "
                "ever there as a whole: call step() alone, or choose another one."
            )
        if not self.can_aggregate:
            raise RuntimeError(
                "aggregate() does not go with momentum='per-objective' in AdamW's metric: call "
                "step() alone, or pass metric='euclidean'."
            )
        params = self._touched()
        try:
            self._aggregated = self._put_direction(params)
        except BaseException:
            self._drop_gradients()
            raise

    @property
    def can_aggregate(self) -> bool:
        """Whether `aggregate()` can be called, as for clipping; see its errors."""
        return not self.streams and (self._means is None or self._second_weights is None)

    def _put_direction(self, params: list[Tensor]) -> _Aggregated:
        scale = self._scale  # the last one, until the step knows better
        if scale is not None:
            self._store.scale(1 / scale)
        solved = self._solve(params)
        self._write_direction(params, solved.solution, 1.0 if scale is None else scale)
        solved = self._held_by_grad(solved, params)
        norm = None if self._means is None else self._norm_of_grad(params)
        if not self._needs_gradients_after:
            self._store.clear()
        return _Aggregated(solved, Watched(params, self.base.param_groups[0]), scale, norm)

    def _write_direction(
        self, params: Sequence[Tensor], solution: Solution, factor: float | Tensor
    ) -> None:
        """p.grad ← factor · d, NaN where the solution is not finite."""
        weights = self._effective_weights(solution)
        weights = torch.where(solution.finite, weights, float("nan")) * factor
        own = self._means is None and self._store.memory == "as-produced"
        in_place = own and not self._needs_gradients_after
        for some, lists in self._store.buckets(params):
            moving = self._moving(some, lists)
            rows, each = (lists, weights) if moving is None else next_means(moving, lists, weights)
            out = [_first(tensors) for tensors in zip(*lists, strict=True)] if in_place else None
            for p, d in zip(some, combine(rows, each, out=out), strict=True):
                p.grad = None if d is None else placed_like(d.to(p.dtype), p)

    def _held_by_grad(self, solved: _Solved, params: Sequence[Tensor]) -> _Solved:
        """Refuses a d that has overflown in `p.grad`, as it may in float16."""
        if all(p.dtype != torch.float16 for p in params):
            return solved
        norm = self._norm_of_grad(params)
        known = not norm.is_cuda and bool(solved.solution.finite) and not bool(norm.isfinite())
        solution = solved.solution.refused_unless(norm.isfinite())
        return replace(solved, solution=solution, overflows=solved.overflows or known)

    @property
    def _needs_gradients_after(self) -> bool:
        """Whether a step along `p.grad` reads the objectives' gradients as well."""
        means = self._means is not None
        return self.track_conflicts or means or self._second_weights is not None

    def _touched(self, *, strays: bool = False) -> list[Tensor]:
        """The parameters with gradients that wait; `strays` allows for a p.grad besides."""
        missing = [name for name in self.objectives if name not in self._store]
        if missing:
            inside = "streamed(blocks)" if self.streams else f"objective({missing[0]!r})"
            raise RuntimeError(
                f"objective {missing[0]!r} has no gradient: run its backward() inside "
                f"`with optimizer.{inside}` before step()."
            )
        if not strays:
            self._refuse_strays()
        params = self._parameters()
        return params if self.streams else self._store.touched(params)

    def _moving(self, params: Sequence[Tensor], lists: Lists) -> RunningMeans | None:
        if self._means is None:
            return None
        return self._means.moving(self.objectives, params, lists)

    def _second_weights_on(self, device: torch.device) -> Tensor | None:
        """c² of AdamW's second moment Σ_k c_k² g_k²; its gradients are bias-corrected means."""
        if self._second_weights is None:
            return None
        self._second_weights = c = self._second_weights.to(device)
        return c if self._means is None else c / self._means.correction(device) ** 2

    def _pieces(self, params: Sequence[Tensor]) -> Iterator[_Piece]:
        return self._pieces_of(lambda: self._store.buckets(params))

    def _pieces_of(
        self, buckets: Callable[[], Iterable[tuple[list[Tensor], Lists]]]
    ) -> Iterator[_Piece]:
        for some, lists in buckets():
            for sharding, mine, rows in self._cut(some, lists):
                yield sharding, mine, rows
                for row in rows:
                    row.clear()  # before the next ones arrive, whoever still has the lists

    def _cut(self, params: Sequence[Tensor], lists: Lists) -> Iterator[_Piece]:
        """Parameters that are sharded alike; those with state in 8 bits, which is wide while a
        piece of it is worked on, a few at a time."""
        for sharding, mine, rows in by_sharding(params, lists):
            if not isinstance(self.base, FusedBase) or not self.base.widens_state:
                yield sharding, mine, rows
                continue
            for columns in slices_of(mine, self._store.bucket_bytes // 4):
                yield sharding, [mine[n] for n in columns], columns_of(rows, columns)

    def _grams(
        self, params: Sequence[Tensor], lists: Lists, clip: Tensor | None
    ) -> Iterator[tuple[float | Tensor, Tensor]]:
        """Gram matrices of these parameters, each with the learning rate that it counts with."""
        moving = self._moving(params, lists)
        second = self._second_weights_on(params[0].device)
        if second is None:
            groups = self.base.param_groups if self.metric == "base" else [{"params": params}]
            some = alike(params, groups, lambda group: ())
        else:
            assert isinstance(self.base, AdamW), "other bases have no metric of their own"
            self.base.make_state(params)
            some = alike(params, self.base.param_groups, lambda g: (g["betas"][1], g["eps"]))
            second = second if clip is None else second * clip**2
        for rate, group, columns in some:
            rows, means, metric = lists, moving, None
            if len(columns) < len(params):
                rows, means = columns_of(lists, columns), columns_of_means(moving, columns)
            if second is not None:
                assert isinstance(self.base, AdamW), "other bases have no metric of their own"
                metric = self.base.metric([params[n] for n in columns], group, second)
            plain = means is None and metric is None
            yield rate, gram(rows) if plain else gram_moved(rows, means, metric)

    def _solve(self, params: Sequence[Tensor], clip: Tensor | None = None) -> _Solved:
        """Solves for the gradients that wait.

        Args:
            params: those that have any.
            clip: what `p.grad` was multiplied by; the second moment counts gradients so.
        """
        self._refuse_unlike_copies(params)
        return self._solve_for(lambda: self._pieces(params), clip)

    def _refuse_unlike_copies(self, params: Sequence[Tensor]) -> None:
        """Waits for the device, and so only in the first steps."""
        if self._unchecked_steps and not all(is_sharded(p) for p in params):
            self._unchecked_steps -= 1
            if world_size() > 1:
                copies = self._plain_parts().sums.get(Sharding())
                if copies is not None:
                    refuse_unlike_copies(copies, self.objectives)

    def _solve_for(
        self, pieces: Callable[[], Iterable[_Piece]], clip: Tensor | None = None
    ) -> _Solved:
        """`_solve` for gradients that can be read as often as `pieces` is called."""
        parts, squares = _Parts(), _Parts()
        weighted = False
        for sharding, some, lists in pieces():
            for rate, part in self._grams(some, lists, clip):
                one = isinstance(rate, float) and rate == 1
                weighted |= not one
                parts.add(sharding, part if one else part * rate)
                squares.add(sharding, part.diagonal())
        total = parts.total(Sharding.total_gram)
        if self._means is not None:
            total = total / self._means.correction(total.device) ** 2
        solution = self.rule(total)
        # Kernels multiply by weights in float32, which for a gradient of 1e-45 would be infinite.
        small = (solution.weights.abs() <= self._largest_number()).all()
        solved = _Solved(total, solution.refused_unless(small))
        if self._second_weights is not None:
            return solved  # where v would overflow, the metric and so the Gram matrix is NaN
        weights, square = solved.solution.weights, total.diagonal()
        if weighted:  # where groups differ, the Gram matrix does not say how long gradients are
            square = squares.total(Sharding.total)
            if self._means is not None:
                square = square / self._means.correction(square.device) ** 2
        return self._holdable(
            solved, (weights.abs() * square.sqrt()).sum(), lambda: self._overflow(pieces(), solved)
        )

    def _largest_direction(self) -> float:
        """The largest |d| that can do no harm to the base's state."""
        if isinstance(self.base, FusedBase):
            return self.base.largest_direction()
        dtypes = {torch.promote_types(torch.float32, p.dtype) for p in self._parameters()}
        return min(math.sqrt(largest_moment(dtype)) for dtype in dtypes)

    def _largest_number(self) -> float:
        """Up to which weights and directions are sure to be numbers in the kernels."""
        wide = all(p.dtype == torch.float64 for p in self._parameters())
        return torch.finfo(torch.float64 if wide else torch.float32).max * _ROOM

    def _holdable(self, solved: _Solved, norm: Tensor, overflow: Callable[[], Tensor]) -> _Solved:
        """Refuses a step along a d that the base's state could not hold.

        Args:
            norm: at least |d|.
            overflow: counts the places where the state would overflow. It reads everything once
                more, so that it is called only where the norm leaves room for doubt.
        """
        limit = self._largest_direction()
        plain = isinstance(self.base, SGD) and not norm.is_cuda  # a rate on a GPU is not waited for
        fits = norm <= limit
        if limit < math.inf and isinstance(self.base, FusedBase):
            narrow = norm.is_cuda and torch.float16 in self.base.kept_dtypes()
            doubtful = not norm.is_cuda and bool(solved.solution.finite) and not fits
            if narrow or doubtful:
                fits = overflow() == 0
        rate = max(float(group["lr"]) for group in self.base.param_groups) if plain else 1.0
        fits = fits & (norm * max(1.0, rate) <= self._largest_number())
        solution = solved.solution.refused_unless(fits)
        known = not norm.is_cuda and bool(solved.solution.finite) and not fits
        return replace(solved, solution=solution, overflows=known)

    def _overflow(self, pieces: Iterable[_Piece], solved: _Solved) -> Tensor:
        assert isinstance(self.base, FusedBase), "other bases' state is not known"
        weights = self._effective_weights(solved.solution)
        parts = _Parts()
        for sharding, some, lists in pieces:
            over = self.base.overflows(some, lists, weights, self._moving(some, lists))
            parts.add(sharding, over.double())
        return parts.total(Sharding.total)

    def _plain_parts(self) -> _Parts:
        """Gram matrices of the bare gradients: one odd gradient spoils AdamW's metric for all."""
        parts = _Parts()
        for sharding, _, lists in self._pieces(self._touched(strays=True)):
            parts.add(sharding, gram(lists))
        return parts

    def _non_finite_elements(self, pieces: Iterable[_Piece]) -> Tensor:
        """How many each objective's gradient has, [K]."""
        parts = _Parts()
        for sharding, _, lists in pieces:
            some = [[(~t.isfinite()).sum() for t in row if t is not None] for row in lists]
            counts = [torch.stack(c).sum() if c else torch.zeros(()) for c in some]
            device = max((c.device for c in counts), key=str)
            parts.add(sharding, torch.stack([c.to(device) for c in counts]).double())
        return parts.total(Sharding.total)

    def _effective_weights(self, solution: Solution) -> Tensor:
        """Weights on gradients, or on running means before their bias correction."""
        if self._means is None:
            return solution.weights
        return solution.weights / self._means.correction(solution.weights.device)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update by the base optimizer along d.

        With no objective's gradient and learning rate 0 it only makes the base's state;
        torch.distributed.checkpoint relies on this before loading. With gradients, a step at
        learning rate 0 is a step like any other: moments move, weights do not.

        Args:
            closure: runs the objectives' backwards and returns a loss.

        Raises:
            RuntimeError: an objective has no gradient, or a parameter one of no objective; no
                `p.grad` is left of aggregate(); an earlier step was interrupted.
            ValueError: an option of a parameter group is out of range.
            FloatingPointError: the Gram matrix or the state after the step is not finite and
                on_nonfinite="raise"; weights and state stay as they were. After aggregate() the
                gradients are dropped.
        """
        self._refuse_interrupted()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check = self.base.check_group if isinstance(self.base, FusedBase) else check_options
        for group in self.base.param_groups:
            check(group)
        if self._only_prepares():
            self._make_state()
            return loss
        if self._aggregated is None and not isinstance(self.base, FusedBase):
            self.aggregate()
        if self._aggregated is None:
            whole = self.gram == MODEL
            step = self._step_along_gradients if whole else self._step_block_by_block
            solved, changes = step(self._touched())
        else:
            self._refuse_lost_direction(self._aggregated)
            try:
                solved, changes = self._step_after_aggregate(self._aggregated)
            except BaseException:
                self._drop_gradients()
                raise
        self._last_step = StepReport(self.objectives, solved.matrix, solved.solution, changes)
        self._forget_gradients()
        return loss

    def _step_along_gradients(self, params: Sequence[Tensor]) -> tuple[_Solved, Tensor | None]:
        """A step along the gradients that wait, which never writes d."""
        base = self.base
        assert isinstance(base, FusedBase), "other bases step along p.grad"
        solved = self._solve(params)
        if self._refused(solved):
            return solved, None
        weights = self._effective_weights(solved.solution)
        proceed = solved.solution.finite if weights.is_cuda else None
        parts = _Parts()
        base.make_state(self._store.touched(params))
        with self._writing():
            self._move(self._pieces(params), weights, proceed, parts)
            if self._means is not None:
                self._means.count(proceed)
        return solved, parts.total(Sharding.total) if self.track_conflicts else None

    def _move(
        self, pieces: Iterable[_Piece], weights: Tensor, proceed: Tensor | None, changes: _Parts
    ) -> None:
        """Steps along Σ_k w_k g_k, and adds g_k · Δθ to the changes."""
        base = self.base
        assert isinstance(base, FusedBase), "other bases step along p.grad"
        for sharding, some, lists in pieces:
            part = base.step_along(
                some,
                lists,
                weights,
                moving=self._moving(some, lists),
                second_weights=self._second_weights_on(weights.device),
                proceed=proceed,
                track=self.track_conflicts,
            )
            if part is not None:
                changes.add(sharding, part)

    def _step_block_by_block(self, params: list[Tensor]) -> tuple[_Solved, Tensor | None]:
        """A step in one sweep, with a Gram matrix and a direction of each block's own.

        On a GPU nothing waits for the device: what is not finite turns off what comes after it.
        """
        base, store = self.base, self._store
        assert isinstance(base, FusedBase), "other bases do not stream"
        assert isinstance(store, StreamedGradients), "blocks are streamed"
        self._refuse_unlike_copies(params)
        counts = store.non_finite_elements()
        going = counts.sum() == 0
        waits = self._waits_for(going)
        nothing = torch.where(going, 0.0, math.nan).double()
        matrix = nothing.repeat(len(counts), len(counts))
        solved = _Solved(matrix, self.rule(matrix))
        parts, weights = _Parts(), []
        with self._writing():
            for buckets in store.blocks() if not waits or going else ():
                pieces = functools.partial(self._pieces_of, buckets)
                solved = self._solve_for(pieces)
                matrix = matrix + solved.matrix
                going = going & solved.solution.finite
                if waits and not going:
                    counts = self._non_finite_elements(pieces())
                    break
                weights.append(solved.solution.weights)
                self._move(pieces(), solved.solution.weights, None if waits else going, parts)
        if not waits:
            self._skips.add(going)
        elif not going:
            self._refuse(self._what_is_not_finite(solved, counts))
        solution = self.rule(matrix).refused_unless(going)
        if waits and not going:
            return _Solved(matrix, solution), None
        solved = _Solved(matrix, solution.with_weights(torch.stack(weights).mean(0)))
        return solved, parts.total(Sharding.total) if self.track_conflicts else None

    def _refuse_lost_direction(self, left: _Aggregated) -> None:
        if not left.gradients.present():
            raise RuntimeError(
                "no parameter has a gradient any more since aggregate(), as after "
                "model.zero_grad(): clip or unscale between aggregate() and step(), and call "
                "optimizer.zero_grad() to start over."
            )

    def _step_after_aggregate(self, left: _Aggregated) -> tuple[_Solved, Tensor | None]:
        """A step along p.grad as aggregate() left it, or the caller changed it since."""
        solved, gradients = left.solved, left.gradients
        touched, scale = gradients.touched, gradients.scale if gradients.unscaled else None
        waiting = all(name in self._store for name in self.objectives)
        gradients.end()
        scaled = scale is not None or left.assumed_scale is not None
        if scaled:
            solved = self._in_own_scale(left, scale, touched)
        if not isinstance(self.base, FusedBase):
            return self._step_of_another_base(solved, touched)
        if waiting and scaled and not touched:
            # In the scale of the losses themselves, which the metric has to be taken in.
            return self._step_along_gradients(self._touched(strays=True))
        assumed = 1.0 if left.assumed_scale is None else float(left.assumed_scale)
        same_scale = not scaled or assumed == (1.0 if scale is None else float(scale))
        params = gradients.present()
        return self._step_along_grad(solved, params, touched, waiting, same_scale)

    def _in_own_scale(self, left: _Aggregated, scale: Tensor | None, touched: bool) -> _Solved:
        """Brings the gradients that wait to the scale of the losses, now that it is known."""
        one = torch.ones((), dtype=torch.float64, device=left.solved.matrix.device)
        found = one if scale is None else scale.to(one.device)
        assumed = one if left.assumed_scale is None else left.assumed_scale.to(one.device)
        self._store.scale(assumed / found)
        self._scale = scale
        if self._means is not None and left.norm is not None and bool(found != assumed):
            # Running means met gradients of another scale: once more, and as long as it was cut.
            norm = self._norm_of_grad(left.gradients.present())
            params = self._touched(strays=True)
            solved = self._solve(params)
            self._write_direction(params, solved.solution, 1.0)
            if touched:
                clip = torch.where(left.norm > 0, norm * found / left.norm, 1.0)
                clip = _cut_again(clip, norm, self._norm_of_grad(params))
                for p in params:
                    if p.grad is not None:
                        p.grad.mul_(clip)
            return self._held_by_grad(solved, params)
        return replace(left.solved, matrix=left.solved.matrix * (assumed / found) ** 2)

    def _step_along_grad(
        self,
        solved: _Solved,
        params: list[Tensor],
        touched: bool,
        waiting: bool,
        same_scale: bool,
    ) -> tuple[_Solved, Tensor | None]:
        base = self.base
        assert isinstance(base, FusedBase), "other bases step by themselves"
        weights = solved.solution.weights.new_zeros(1 + waiting * len(self.objectives))
        weights[0] = 1
        second = self._second_weights_on(weights.device)
        if touched and second is not None:
            anew = None if same_scale else self._solve(params).solution
            clip, uniform = self._clip(params, solved.solution, anew)
            solved = self._solve(params, clip)
            solved = replace(solved, solution=solved.solution.refused_unless(clip.isfinite()))
            fresh = pad(solved.solution.weights * clip, (1, 0))
            if len(params) == len(self._touched(strays=True)):
                weights = torch.where(uniform, fresh, weights)
            second = second * clip**2
        elif touched:
            solved = self._holdable(
                solved, self._norm_of_grad(params), lambda: self._overflow_of_grad(params)
            )
        if self._refused(solved):
            return solved, None
        proceed = solved.solution.finite if weights.is_cuda else None
        parts = _Parts()
        base.make_state(params)
        with self._writing():
            pieces = self._pieces(params) if waiting else by_sharding(params, [])
            for sharding, some, lists in pieces:
                part = base.step_along(
                    some,
                    [local_gradients(some), *lists],
                    weights,
                    second_weights=None if second is None else pad(second, (1, 0)),
                    proceed=proceed,
                    track=self.track_conflicts,
                )
                if part is not None:
                    parts.add(sharding, part[1:])
            if self._means is not None:
                for _, some, lists in self._pieces(params):
                    moving = self._moving(some, lists)
                    assert moving is not None, "there are means"
                    moved(moving, lists, proceed)
                self._means.count(proceed)
        return solved, parts.total(Sharding.total) if self.track_conflicts else None

    def _clip(
        self, params: Sequence[Tensor], solution: Solution, anew: Solution | None
    ) -> tuple[Tensor, Tensor]:
        """By what p.grad was multiplied since it was Σ_k w_k g_k, |p.grad| / |Σ_k w_k g_k|, and
        whether all of it was. `anew` is the solution that would have been cut, if not this one."""
        parts = _Parts()
        for sharding, some, lists in self._pieces(params):
            parts.add(sharding, gram([local_gradients(some), *lists]))
        products = parts.total(Sharding.total_gram)
        w = solution.weights
        square, along, before = products[0, 0], products[0, 1:] @ w, w @ products[1:, 1:] @ w
        clip = torch.where(before > 0, (square / before).sqrt(), 1.0)
        if anew is not None:
            length = (anew.weights @ products[1:, 1:] @ anew.weights).sqrt()
            clip = _cut_again(clip, square.sqrt(), length)
        dtypes = {t.dtype for p in params if (t := p.grad) is not None}
        rounding = max(torch.finfo(t).eps for t in dtypes)
        if self._store.memory == "bfloat16":
            rounding = torch.finfo(torch.bfloat16).eps
        return clip, along >= (1 - 1e-6 - rounding**2) * (square * before).sqrt()

    def _norm_of_grad(self, params: Sequence[Tensor]) -> Tensor:
        parts = _Parts()
        for sharding, some, _ in by_sharding(params, []):
            parts.add(sharding, gram([local_gradients(some)]))
        return parts.total(Sharding.total_gram)[0, 0].sqrt()

    def _overflow_of_grad(self, params: Sequence[Tensor]) -> Tensor:
        assert isinstance(self.base, FusedBase), "other bases' state is not known"
        parts = _Parts()
        for sharding, some, _ in by_sharding(params, []):
            rows = [local_gradients(some)]
            one = torch.ones(1, dtype=torch.float64, device=params[0].device)
            parts.add(sharding, self.base.overflows(some, rows, one).double())
        return parts.total(Sharding.total)

    def _step_of_another_base(
        self, solved: _Solved, touched: bool
    ) -> tuple[_Solved, Tensor | None]:
        """Runs the base optimizer; also g_k · Δθ of what it did, [K]."""
        if touched:
            params = [p for p in self._parameters() if p.grad is not None]
            zero = torch.zeros((), device=params[0].device)
            solved = self._holdable(solved, self._norm_of_grad(params), lambda: zero)
        if self._refused(solved):
            return solved, None
        before = self._dots_with_parameters() if self.track_conflicts else None
        with self._writing():
            self.base.step()
            if self._means is not None:
                for _, some, lists in self._pieces(self._touched(strays=True)):
                    moving = self._moving(some, lists)
                    assert moving is not None, "there are means"
                    moved(moving, lists, None)
                self._means.count(None)
        return solved, None if before is None else self._dots_with_parameters() - before

    def _dots_with_parameters(self) -> Tensor:
        parts = _Parts()
        for sharding, some, lists in self._pieces(self._touched(strays=True)):
            parts.add(sharding, dots(lists, [local(p) for p in some]))
        return parts.total(Sharding.total)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Weights and state change inside: where that is broken off, they are half written."""
        before = self._versions()
        try:
            yield
        except BaseException:
            if self._versions() != before:
                self._interrupted = True
                warnings.warn(
                    "an optimizer step was interrupted while it wrote: weights and optimizer state "
                    "are void, load both from a checkpoint.",
                    stacklevel=level_outside(),
                )
            raise

    def _versions(self) -> dict[int, int]:
        """How often Torch has seen each parameter and its state change."""
        tensors: list[Tensor] = self._parameters()
        for p in self._parameters():
            tensors += [t for t in self.state.get(p, {}).values() if isinstance(t, Tensor)]
        versions = [t._version for t in locals_of(tensors)]
        return dict(zip(map(id, tensors), versions, strict=True))

    def _refuse_interrupted(self) -> None:
        if self._interrupted:
            raise RuntimeError(
                "an optimizer step was interrupted while it wrote, so that weights and optimizer "
                "state are void: load both from a checkpoint, the state with load_state_dict()."
            )

    def _only_prepares(self) -> bool:
        empty = self._aggregated is None and not any(n in self._store for n in self.objectives)
        return empty and all(float(group["lr"]) == 0 for group in self.base.param_groups)

    def _make_state(self) -> None:
        if isinstance(self.base, FusedBase):
            self.base.make_state()
        else:
            self.base.step()

    def _waits_for(self, verdict: Tensor) -> bool:
        """Whether the host looks at what may not be finite before it goes on."""
        fused = isinstance(self.base, FusedBase)
        return not (verdict.is_cuda and fused) or self.on_nonfinite == "raise"

    def _refused(self, solved: _Solved) -> bool:
        """Whether the step must not be made, as far as that is known without waiting."""
        if not self._waits_for(solved.matrix):
            self._skips.add(solved.solution.finite)
            return False
        if solved.solution.status is not Status.NON_FINITE:
            return False
        if all(name in self._store for name in self.objectives):
            pieces = self._pieces(self._touched(strays=True))
            what = self._what_is_not_finite(solved, self._non_finite_elements(pieces))
        else:
            what = "the direction, or the optimizer's state after a step along it,"
        self._refuse(what)
        return True

    def _refuse(self, what: str) -> None:
        """Counts a step that was not made, or not to its end; or raises."""
        for p in self._parameters():
            p.grad = None
        if self.on_nonfinite == "raise":
            if self._aggregated is not None:
                self._aggregated.gradients.end()
            self._aggregated = None
            raise FloatingPointError(
                f"{what} is not finite; {self._outcome}: call zero_grad() and go on with the next "
                "batch, or pass on_nonfinite='skip'."
            )
        self._skips.count(what)

    def _what_is_not_finite(self, solved: _Solved, counts: Tensor) -> str:
        """What of a step is not finite, in words.

        Args:
            counts: elements of each objective's gradient that are not, [K].
        """
        names = [name for name, n in zip(self.objectives, counts.tolist(), strict=True) if n]
        if names:
            return f"the gradient of {', '.join(names)}"
        if solved.overflows or not bool(solved.matrix.isfinite().all()):
            return "the optimizer's state after a step along gradients this large"
        return "the Gram matrix or its rule"

    def _forget_gradients(self) -> None:
        self._store.clear()
        if self._aggregated is not None:
            self._aggregated.gradients.end()
        self._aggregated = None
        self._stale = True

    def _drop_gradients(self) -> None:
        self._forget_gradients()
        for p in self._parameters():
            p.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Empties every objective, and p.grad as any Torch optimizer does."""
        self._forget_gradients()
        super().zero_grad(set_to_none)
        self._stale = not set_to_none

    # ---- what happened, and what is saved

    @property
    def last_step(self) -> StepReport:
        """Gram matrix, weights, status and conflicts of the last step.

        Raises RuntimeError before the first step.
        """
        if self._last_step is None:
            raise RuntimeError("last_step is empty: call step() first.")
        return self._last_step

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because a gradient was not finite."""
        return self._skips.total()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, the objectives' means, and the number of skipped steps.

        Gradients are not part of it: save between `step()` and the next backward.

        Raises:
            RuntimeError: a step was interrupted while it wrote.
        """
        self._refuse_interrupted()
        mine: dict[str, Any] = {"skipped_steps": self.skipped_steps}
        if self._means is not None:
            mine["means"] = self._means.state_dict(self._parameters())
        if self._scale is not None:
            mine["grad_scale"] = float(self._scale)
        with self._own_groups():
            return {**super().state_dict(), "mollm": mine}

    @contextmanager
    def _own_groups(self) -> Iterator[None]:
        """The groups without what is in them between aggregate() and step()."""
        left, self._aggregated = self._aggregated, None
        group = self.base.param_groups[0]
        shown = group["params"]
        if left is not None:
            left.gradients.end()
        try:
            yield
        finally:
            group["params"], self._aggregated = shown, left

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict()` was taken; also reads the base optimizer's own.

        "adamw" reads the state of `torch.optim.AdamW`, and "sgd" that of `torch.optim.SGD`, if
        they were made with options that the bases have; in AdamW's metric the first moment is left
        out, since the algorithm has none. Saved options win over this optimizer's, but for
        state_dtype: saved state is rounded or widened to that. Everything is checked before
        anything is changed.

        Raises:
            UsageError: the state is of another algorithm, other objectives or other parameters.
            ValueError: the groups do not match, or an option is out of range.
        """
        check_structure(state_dict)
        plain = {k: v for k, v in state_dict.items() if k != "mollm"}
        mine = state_dict.get("mollm", {})
        if self._means is not None:
            self._means.check_state(mine.get("means"), self.objectives, self._parameters())
        elif "means" in mine:
            raise UsageError(
                "the state to load has a running mean of each objective's gradient: load it with "
                "momentum='per-objective'."
            )
        check_number("skipped_steps", mine.get("skipped_steps", 0), whole=True)
        if mine.get("grad_scale") is not None:
            check_number("grad_scale", mine["grad_scale"], positive=True)
        if isinstance(self.base, FusedBase):
            plain = self.base.fitted(plain)
        else:
            check_finite_state(plain)
            check_kinds(plain["state"], list(self.base.state.values()))
        self._forget_gradients()
        kept = self.base.state, self.base.param_groups
        try:
            super().load_state_dict(plain)
            self.base.__setstate__({"state": self.state, "param_groups": self.param_groups})
        except BaseException:  # of another base, about what it alone knows
            self.base.state, self.base.param_groups = kept
            raise
        finally:
            self._share_state_with_base()
        if isinstance(self.base, FusedBase):
            self.base.restore_dtypes(plain)
        self._skips = SkipCounter(self._outcome, mine.get("skipped_steps", 0))
        scale = mine.get("grad_scale")
        self._scale = None if scale is None else torch.tensor(scale, dtype=torch.float64)
        if self._means is not None:
            self._means.load_state_dict(mine.get("means"), self._parameters())
        self._interrupted = False

    def __getstate__(self) -> dict[str, Any]:
        state = _copied_attributes(self)
        # Torch's own __getstate__ loses what a base keeps in other attributes.
        state["base"] = type(self.base), _copied_attributes(self.base)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state.get("base"), tuple):
            kind, attributes = state["base"]
            base = kind.__new__(kind)
            base.__setstate__(attributes)
            state = {**state, "base": base}
        super().__setstate__(state)

    def __repr__(self) -> str:
        return f"MOLLMOptimizer(objectives={self.objectives}, rule={self.rule}, base={self.base})"


def _cut_again(clip: Tensor, cut: Tensor, length: Tensor) -> Tensor:
    """What cuts a gradient of that length to the length to which another was cut by `clip`."""
    again = torch.where(length > cut, cut / length, 1.0)
    return torch.where(clip < 1 - 1e-6, again, clip)


def _copied_attributes(optimizer: Optimizer) -> dict[str, Any]:
    """What a copy takes over. A scheduler wraps `step` of this very object; a copy gets its own
    from the class."""
    left = ("_optimizer_", "_zero_grad_profile_name", "_opt_called")
    return {k: v for k, v in optimizer.__dict__.items() if k != "step" and not k.startswith(left)}
