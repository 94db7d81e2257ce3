"""MOLLMOptimizer: one optimizer step along a common descent direction of several objectives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    local,
    local_gradient,
    placed_like,
    refuse_partitioned,
    refuse_unlike_copies,
    world_size,
)
from mollm.optim.bases import SGD, AdamW, FusedBase
from mollm.optim.directions import make_rule
from mollm.optim.gradients import GradientStore
from mollm.optim.means import ObjectiveMeans, moved
from mollm.optim.step_report import SkipCounter, StepReport
from mollm_ops import Solution, Status, combine, dots, gram
from mollm_ops.gram import gram_moved
from mollm_ops.operands import AdamMetric, RunningMeans

PER_OBJECTIVE = "per-objective"


def _make_base(
    base: str | Callable[..., Optimizer], params: Any, lr: float | Tensor, options: dict[str, Any]
) -> Optimizer:
    classes: dict[str, Callable[..., Optimizer]] = {"adamw": AdamW, "sgd": SGD}
    make = base if callable(base) else classes.get(base)
    if make is None:
        raise ValueError(
            f"base must be 'adamw', 'sgd', or an optimizer class or factory, but got {base!r}."
        )
    try:
        return make(params, lr=lr, **options)
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
    clipping or a `GradScaler`.

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
        metric: "base" takes the Gram matrix in the metric P of the base's preconditioner, so that
            the certificate holds for the update really applied (before weight decay):
            g_k · Δθ = −lr g_k · P d < 0. With "adamw" P = 1/(√v̂ + ε), v is the running mean of
            Σ_k c_k² g_k² (c: the rule's weights for orthonormal gradients), and there is no first
            moment; with other bases P = 1. "euclidean": P = 1, and "adamw" is Torch's.
        gradient_memory: where gradients wait for the step: "as-produced"; "bfloat16", rounded;
            "host", in pinned host memory.
        on_nonfinite: "skip" leaves weights and state as they are, counts the step in
            `skipped_steps` and warns once; "raise" raises FloatingPointError, and has to wait for
            the device in every step.
        track_conflicts: measure g_k · Δθ for the update really applied. With the bases "adamw" and
            "sgd" it costs nothing to speak of, with others a gradient's memory and two more reads.
        **base_options: handed to the base optimizer, for example weight_decay.

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
        normalize: bool = False,
        length: str = "mean",
        momentum: float | str | None = None,
        mean_beta: float = 0.9,
        metric: str = "base",
        gradient_memory: str = "as-produced",
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
        self.rule = make_rule(
            direction,
            objectives=len(names),
            preferences=preferences,
            normalize=normalize,
            length=length,
        )
        self.objectives = names
        self.on_nonfinite = on_nonfinite
        self.track_conflicts = track_conflicts
        self._store = GradientStore(names, gradient_memory)
        self._means = ObjectiveMeans(mean_beta) if momentum == PER_OBJECTIVE else None
        self._skips = SkipCounter()
        self._open: str | None = None
        self._solution: Solution | None = None  # of the gradient that now stands in p.grad
        self._gram: Tensor | None = None
        self._stale = False  # p.grad holds what a step has used up
        self._unchecked_steps = 2  # one more than the first: KL has no gradient there
        self._last_step: StepReport | None = None
        if momentum is not None and not isinstance(momentum, str):
            base_options["momentum"] = momentum
        self.base = _make_base(base, params, lr, base_options)
        preconditioned = metric == "base" and isinstance(self.base, AdamW)
        self._second_weights = self._unopposed_weights().square() if preconditioned else None
        if isinstance(self.base, FusedBase) and (preconditioned or self._means):
            self.base.drop_first()
        refuse_partitioned([p for group in self.base.param_groups for p in group["params"]])
        super().__init__(self.base.param_groups, self.base.defaults)
        self._share_state_with_base()

    def _unopposed_weights(self) -> Tensor:
        """What the rule gives to orthonormal gradients, [K]."""
        return self.rule(torch.eye(len(self.objectives), dtype=torch.float64)).weights

    def _share_state_with_base(self) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "param_groups" in self.__dict__ and self.param_groups is self.base.param_groups:
            self.base.add_param_group(param_group)
            refuse_partitioned(self._parameters())

    # ---- gradients in

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

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
        if self._open is not None:
            raise RuntimeError(f"objective {name!r} was opened inside objective {self._open!r}.")
        if self._solution is not None:
            raise RuntimeError(
                f"objective {name!r} was opened after aggregate(): call step() or zero_grad() "
                "first."
            )
        params = self._parameters()
        for n, p in enumerate(params):
            if p.grad is not None and not self._stale:
                raise RuntimeError(
                    f"parameter {n} has a gradient of no objective: call zero_grad(), or run that "
                    "backward() inside `with optimizer.objective(name)`."
                )
        self._store.lend(name, params)
        self._stale = False
        self._open = name

    def backward(self, losses: Mapping[str, Tensor], model: nn.Module | None = None) -> None:
        """Backward of every objective's loss, when all their graphs are alive.

        Graphs may share parts (the forward of the retain batch, say); they are freed with the last
        loss.

        Args:
            losses: by objective.
            model: the model as wrapped, needed under DistributedDataParallel alone: it would not
                average the gradients of several backwards; see `expect_backward`.

        Raises:
            ValueError: the names are not the optimizer's objectives.
        """
        for name in losses:
            self._check_name(name)
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
        gradients. Where the Gram matrix is not finite, `p.grad` becomes NaN, so that a GradScaler
        lowers its scale.

        Raises:
            RuntimeError: an objective has no gradient; the optimizer steps in AdamW's metric along
                running means, whose second moment needs these means and the gradients too.
        """
        if self._means is not None and self._second_weights is not None:
            raise RuntimeError(
                "aggregate() does not go with momentum='per-objective' in AdamW's metric: call "
                "step() alone, or pass metric='euclidean'."
            )
        params = self._touched()
        solution = self._solve(params)
        weights = self._effective_weights(solution)
        if self._means is None:
            weights = torch.where(solution.finite, weights, float("nan"))
        elif not solution.finite:
            for p in params:
                p.grad = torch.full_like(p, float("nan"))
            return
        own = self._means is None and self._store.memory == "as-produced"
        in_place = own and not self._needs_gradients_after
        for some, lists in self._store.buckets(params):
            moving = self._moving(some, lists)
            rows = lists if moving is None else moved(moving, lists)
            out = [_first(tensors) for tensors in zip(*lists, strict=True)] if in_place else None
            for p, d in zip(some, combine(rows, weights, out=out), strict=True):
                p.grad = None if d is None else placed_like(d.to(p.dtype), p)
        if self._means is not None:
            self._means.count(None)
        if not self._needs_gradients_after:
            self._store.clear()

    @property
    def _needs_gradients_after(self) -> bool:
        """Whether a step along `p.grad` reads the objectives' gradients as well."""
        return self.track_conflicts or self._second_weights is not None

    def _touched(self) -> list[Tensor]:
        missing = [name for name in self.objectives if name not in self._store]
        if missing:
            raise RuntimeError(
                f"objective {missing[0]!r} has no gradient: run its backward() inside "
                f"`with optimizer.objective({missing[0]!r})` before step()."
            )
        return self._store.touched(self._parameters())

    def _moving(self, params: Sequence[Tensor], lists: Lists) -> RunningMeans | None:
        if self._means is None:
            return None
        return self._means.moving(self.objectives, params, lists)

    def _metric(self, params: Sequence[Tensor]) -> AdamMetric | None:
        second = self._second_weights_on(params[0].device)
        if second is None:
            return None
        assert isinstance(self.base, AdamW), "other bases have no metric of their own"
        return self.base.metric(params, second)

    def _second_weights_on(self, device: torch.device) -> Tensor | None:
        """c² of AdamW's second moment Σ_k c_k² g_k²; its gradients are bias-corrected means."""
        if self._second_weights is None:
            return None
        self._second_weights = c = self._second_weights.to(device)
        return c if self._means is None else c / self._means.correction(device) ** 2

    def _pieces(self, params: Sequence[Tensor]) -> Iterator[tuple[Sharding, list[Tensor], Lists]]:
        for some, lists in self._store.buckets(params):
            yield from by_sharding(some, lists)

    def _solve(self, params: Sequence[Tensor]) -> Solution:
        parts = _Parts()
        for sharding, some, lists in self._pieces(params):
            moving, metric = self._moving(some, lists), self._metric(some)
            plain = moving is None and metric is None
            parts.add(sharding, gram(lists) if plain else gram_moved(lists, moving, metric))
        if self._unchecked_steps and Sharding() in parts.sums:
            self._unchecked_steps -= 1
            if world_size() > 1:
                refuse_unlike_copies(self._plain_parts().sums[Sharding()], self.objectives)
        total = parts.total(Sharding.total_gram)
        if self._means is not None:
            total = total / self._means.correction(total.device) ** 2
        self._gram = total
        self._solution = self.rule(total)
        return self._solution

    def _plain_parts(self) -> _Parts:
        """Gram matrices of the bare gradients: one odd gradient spoils AdamW's metric for all."""
        parts = _Parts()
        for sharding, _, lists in self._pieces(self._touched()):
            parts.add(sharding, gram(lists))
        return parts

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

        Without any objective's gradient and at learning rate 0 it makes the base's state and does
        nothing else: so torch.distributed.checkpoint prepares an optimizer for loading.

        Args:
            closure: runs the objectives' backwards and returns a loss.

        Raises:
            RuntimeError: an objective has no gradient.
            FloatingPointError: the Gram matrix is not finite and on_nonfinite="raise"; weights,
                state and gradients stay as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._only_prepares():
            self._make_state()
            return loss
        fused = isinstance(self.base, FusedBase)
        aggregated = self._solution is not None
        if not aggregated and fused:
            self._solve(self._touched())
        elif not aggregated:
            self.aggregate()
        solution, matrix = self._solution, self._gram
        assert solution is not None, "the gradients are solved for"
        assert matrix is not None, "the gradients are solved for"
        changes = None
        if self._refused(solution, matrix, waits=not fused):
            changes = None
        elif aggregated and fused:
            changes = self._step_along_grad(solution)
        elif fused:
            changes = self._step_along_gradients(solution)
        else:
            changes = self._step_of_another_base()
        self._last_step = StepReport(self.objectives, matrix, solution, changes)
        self._forget_gradients()
        return loss

    def _step_along_gradients(self, solution: Solution) -> Tensor | None:
        base = self.base
        assert isinstance(base, FusedBase), "other bases step along p.grad"
        weights = self._effective_weights(solution)
        proceed = solution.finite if weights.is_cuda else None
        parts = _Parts()
        for sharding, some, lists in self._pieces(self._touched()):
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
                parts.add(sharding, part)
        if self._means is not None:
            self._means.count(proceed)
        return parts.total(Sharding.total) if self.track_conflicts else None

    def _step_along_grad(self, solution: Solution) -> Tensor | None:
        """A step along p.grad as aggregate() left it, or the caller changed it since."""
        base = self.base
        assert isinstance(base, FusedBase), "other bases step by themselves"
        params = [p for p in self._parameters() if p.grad is not None]
        reads = self._needs_gradients_after
        weights = solution.weights.new_zeros(1 + reads * len(self.objectives))
        weights[0] = 1
        second = self._second_weights_on(weights.device)
        proceed = solution.finite if weights.is_cuda else None
        parts = _Parts()
        pieces = self._pieces(params) if reads else by_sharding(params, [])
        for sharding, some, lists in pieces:
            d = [local_gradient(p) for p in some]
            part = base.step_along(
                some,
                [d, *lists],
                weights,
                second_weights=None if second is None else pad(second, (1, 0)),
                proceed=proceed,
                track=self.track_conflicts,
            )
            if part is not None:
                parts.add(sharding, part[1:])
        return parts.total(Sharding.total) if self.track_conflicts else None

    def _step_of_another_base(self) -> Tensor | None:
        """Runs the base optimizer; g_k · Δθ of what it did, [K]."""
        if not self.track_conflicts:
            self.base.step()
            return None
        before = self._dots_with_parameters()
        self.base.step()
        return self._dots_with_parameters() - before

    def _dots_with_parameters(self) -> Tensor:
        parts = _Parts()
        for sharding, some, lists in self._pieces(self._touched()):
            parts.add(sharding, dots(lists, [local(p) for p in some]))
        return parts.total(Sharding.total)

    def _only_prepares(self) -> bool:
        empty = self._solution is None and not any(n in self._store for n in self.objectives)
        return empty and all(float(group["lr"]) == 0 for group in self.param_groups)

    def _make_state(self) -> None:
        if isinstance(self.base, FusedBase):
            self.base.make_state()
        else:
            self.base.step()

    def _refused(self, solution: Solution, matrix: Tensor, *, waits: bool) -> bool:
        """Whether the step must not be made, as far as that is known without waiting."""
        if matrix.is_cuda and not waits and self.on_nonfinite == "skip":
            self._skips.add(solution.finite)
            return False
        if solution.status is not Status.NON_FINITE:
            return False
        self._refuse_nonfinite(matrix)
        return True

    def _refuse_nonfinite(self, matrix: Tensor) -> None:
        if self._second_weights is not None:
            matrix = self._plain_parts().total(Sharding.total_gram)
        finite = torch.isfinite(matrix.diagonal()).tolist()
        names = [name for name, ok in zip(self.objectives, finite, strict=True) if not ok]
        what = f"the gradient of {', '.join(names)}" if names else "the Gram matrix or its rule"
        if self.on_nonfinite == "raise":
            self._solution = None
            for p in self._parameters():
                p.grad = None
            raise FloatingPointError(
                f"{what} is not finite; weights and optimizer state are unchanged: call "
                "zero_grad() and go on with the next batch, or pass on_nonfinite='skip'."
            )
        self._skips.count(what)
        for p in self._parameters():
            p.grad = None

    def _forget_gradients(self) -> None:
        self._store.clear()
        self._solution = self._gram = None
        self._stale = True

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
        """
        mine: dict[str, Any] = {"skipped_steps": self.skipped_steps}
        if self._means is not None:
            mine["means"] = self._means.state_dict(self._parameters())
        return {**super().state_dict(), "mollm": mine}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict()` was taken; also reads the base optimizer's own."""
        plain = {k: v for k, v in state_dict.items() if k != "mollm"}
        super().load_state_dict(plain)
        self.base.__setstate__({"state": self.state, "param_groups": self.param_groups})
        self._share_state_with_base()
        if isinstance(self.base, FusedBase):
            self.base.restore_dtypes(plain)
        mine = state_dict.get("mollm", {})
        self._skips = SkipCounter(mine.get("skipped_steps", 0))
        if self._means is not None:
            self._means.load_state_dict(mine.get("means"), self._parameters())

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler wraps `step` of this very object; a copy gets its own from the class.
        left = ("_optimizer_", "_zero_grad_profile_name", "step", "_opt_called")
        return {k: v for k, v in self.__dict__.items() if not k.startswith(left)}

    def __repr__(self) -> str:
        return f"MOLLMOptimizer(objectives={self.objectives}, rule={self.rule}, base={self.base})"
