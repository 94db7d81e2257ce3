"""MOLLMOptimizer: one optimizer step along a common descent direction of several objectives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from mollm.diagnostics import StepReport
from mollm.rules import make_rule
from mollm_ops import Solution, Status, combine, dots, gram

_FUSED_DEVICES = ("cpu", "cuda")


def _make_base(
    base: str | Callable[..., Optimizer], params: Any, lr: float | Tensor, options: dict[str, Any]
) -> Optimizer:
    if callable(base):
        return base(params, lr=lr, **options)
    classes: dict[str, Callable[..., Optimizer]] = {
        "adamw": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
    }
    if base not in classes:
        raise ValueError(
            f"base must be 'adamw', 'sgd', or an optimizer class or factory, but got {base!r}."
        )
    optimizer = classes[base](params, lr=lr, **options)
    if {"fused", "foreach", "capturable", "differentiable"}.isdisjoint(options):
        for group in optimizer.param_groups:
            group["fused"] = group["fused"] or _can_be_fused(group["params"])
    return optimizer


def _can_be_fused(params: Sequence[Tensor]) -> bool:
    """Whether Torch's fused kernels take these parameters."""
    return all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in params)


class MOLLMOptimizer(Optimizer):
    """Steps along a common descent direction of several objectives' gradients.

        G_ij = g_i · g_j,   w = rule(G),   d = Σ_k w_k g_k,   θ ← base(θ, d)

    With `base="sgd"` that is θ ← θ − lr · d. Each objective's backward runs inside
    `with opt.objective(name)`; the gradients it writes are taken over without a copy, and several
    backwards inside the same objective accumulate. Memory: one gradient per objective, and one
    more for d while conflicts are tracked.

    After `step()` the objectives are empty again and `p.grad` holds d until `zero_grad()`. Call
    `aggregate()` before `step()` to have d in `p.grad` earlier, for gradient clipping or a
    `GradScaler`.

    Args:
        params: as for any Torch optimizer.
        lr: learning rate of the base optimizer.
        objectives: their names, in the order of the Gram matrix.
        base: "adamw", "sgd" (Torch's, fused where they can be), or an optimizer class or factory
            called as base(params, lr=lr, **base_options).
        direction: "dual" (the centre of the dual cone, the paper's), "project", "upgrad", "mgda",
            "pcgrad", "sum", or a callable from the Gram matrix to weights, such as a TorchJD
            `Weighting`.
        preferences: weights c_k ≥ 0 on the objectives, for "project", "upgrad", "pcgrad", "sum".
        normalize: let the rule work on gradients scaled to a common norm.
        length: "mean", "min-norm" or "first"; see `mollm_ops.dual_space_weights`.
        on_nonfinite: "skip" leaves weights and state as they are, counts the step in
            `skipped_steps` and warns once; "raise" raises FloatingPointError.
        track_conflicts: measure g_k · Δθ for the update really applied, at the cost of one more
            gradient's memory and two more reads of the gradients.
        **base_options: handed to the base optimizer, for example weight_decay.

    Source: arXiv 2412.20412, section III.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-5,
        *,
        objectives: Sequence[str] = ("forget", "kl", "retain"),
        base: str | Callable[..., Optimizer] = "adamw",
        direction: str | Callable[[Tensor], Tensor] = "dual",
        preferences: Sequence[float] | None = None,
        normalize: bool = False,
        length: str = "mean",
        on_nonfinite: str = "skip",
        track_conflicts: bool = True,
        **base_options: Any,
    ) -> None:
        names = tuple(objectives)
        if isinstance(objectives, str) or not names or len(set(names)) != len(names):
            raise ValueError(f"objectives must be distinct names, but got {objectives!r}.")
        if on_nonfinite not in ("skip", "raise"):
            raise ValueError(f"on_nonfinite must be 'skip' or 'raise', but got {on_nonfinite!r}.")
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
        self.skipped_steps = 0
        self._gradients: dict[str, dict[Tensor, Tensor]] = {}
        self._open: str | None = None
        self._solution: Solution | None = None  # of the gradient that now stands in p.grad
        self._gram: Tensor | None = None
        self._stale = False  # p.grad holds what a step has used up
        self._last_step: StepReport | None = None
        self.base = _make_base(base, params, lr, base_options)
        super().__init__(self.base.param_groups, self.base.defaults)
        self._share_state_with_base()

    def _share_state_with_base(self) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "param_groups" in self.__dict__ and self.param_groups is self.base.param_groups:
            self.base.add_param_group(param_group)

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
        try:
            yield
        except BaseException:
            self._take()
            raise
        taken = self._take()
        if not taken:
            raise RuntimeError(
                f"objective {name!r} got no gradient: call backward() inside the block, on a loss "
                "that depends on the optimizer's parameters."
            )
        self._gradients[name] = taken

    def _lend(self, name: str) -> None:
        if self._open is not None:
            raise RuntimeError(f"objective {name!r} was opened inside objective {self._open!r}.")
        if self._solution is not None:
            raise RuntimeError(
                f"objective {name!r} was opened after aggregate(): call step() or zero_grad() "
                "first."
            )
        for n, p in enumerate(self._parameters()):
            if p.grad is not None and not self._stale:
                raise RuntimeError(
                    f"parameter {n} has a gradient of no objective: call zero_grad(), or run that "
                    "backward() inside `with optimizer.objective(name)`."
                )
        mine = self._gradients.pop(name, {})
        for p in self._parameters():
            p.grad = mine.get(p)
        self._stale = False
        self._open = name

    def _take(self) -> dict[Tensor, Tensor]:
        taken = {}
        for p in self._parameters():
            if p.grad is not None:
                taken[p] = p.grad
                p.grad = None
        self._open = None
        return taken

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Backward of every objective's loss, when all their graphs are alive.

        Graphs may share parts (the forward of the retain batch, say); they are freed with the last
        loss. Raises ValueError where the names are not the optimizer's objectives.
        """
        for name in losses:
            self._check_name(name)
        missing = [name for name in self.objectives if name not in losses]
        if missing:
            raise ValueError(f"losses must have every objective, but {missing} are missing.")
        last = list(losses)[-1]
        for name, loss in losses.items():
            with self.objective(name):
                torch.autograd.backward(loss, retain_graph=name != last)

    # ---- direction and update

    @torch.no_grad()
    def aggregate(self) -> None:
        """Solves for the direction and puts d = Σ_k w_k g_k into `p.grad`; `step()` then uses it.

        `step()` does this by itself. Call it in between to clip d or before a GradScaler looks at
        the gradients. Where the Gram matrix is not finite, `p.grad` becomes NaN, so that a
        GradScaler lowers its scale.

        Raises:
            RuntimeError: an objective has no gradient.
        """
        missing = [name for name in self.objectives if name not in self._gradients]
        if missing:
            raise RuntimeError(
                f"objective {missing[0]!r} has no gradient: run its backward() inside "
                f"`with optimizer.objective({missing[0]!r})` before step()."
            )
        params = self._touched()
        lists = self._lists(params)
        self._gram = gram(lists)
        self._solution = solution = self.rule(self._gram)
        if solution.status is Status.NON_FINITE:
            for p in params:
                p.grad = torch.full_like(p, float("nan"))
            return
        out = None if self.track_conflicts else [self._first(p) for p in params]
        for p, d in zip(params, combine(lists, solution.weights, out=out), strict=True):
            p.grad = d
        if not self.track_conflicts:
            self._gradients.clear()

    def _touched(self) -> list[Tensor]:
        """The parameters that have a gradient from some objective."""
        return [p for p in self._parameters() if any(p in g for g in self._gradients.values())]

    def _lists(self, params: list[Tensor]) -> list[list[Tensor | None]]:
        return [[self._gradients[name].get(p) for p in params] for name in self.objectives]

    def _first(self, p: Tensor) -> Tensor:
        return next(self._gradients[n][p] for n in self.objectives if p in self._gradients[n])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update by the base optimizer along d.

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
        if self._solution is None:
            self.aggregate()
        solution, matrix = self._solution, self._gram
        assert solution is not None, "aggregate() leaves a solution"
        assert matrix is not None, "aggregate() leaves a Gram matrix"
        changes = None
        if solution.status is Status.NON_FINITE:
            self._refuse_nonfinite(matrix)
        elif self.track_conflicts:
            changes = self._update_and_measure()
        else:
            self.base.step()
        self._last_step = StepReport(self.objectives, matrix, solution, changes)
        self._forget_gradients()
        return loss

    def _update_and_measure(self) -> Tensor:
        """Runs the base optimizer; g_k · Δθ of what it did, [K]."""
        params = self._touched()
        lists = self._lists(params)
        before = dots(lists, params)
        self.base.step()
        return dots(lists, params) - before

    def _refuse_nonfinite(self, matrix: Tensor) -> None:
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
        if self.skipped_steps == 0:
            warnings.warn(
                f"{what} is not finite: the step was skipped, weights and optimizer state are "
                "unchanged. Further skips are counted in `skipped_steps` without a warning.",
                stacklevel=4,
            )
        self.skipped_steps += 1
        for p in self._parameters():
            p.grad = None

    def _forget_gradients(self) -> None:
        self._gradients.clear()
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

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, and the number of skipped steps.

        Gradients are not part of it: save between `step()` and the next backward.
        """
        return {**super().state_dict(), "mollm": {"skipped_steps": self.skipped_steps}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict()` was taken; also reads the base optimizer's own."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "mollm"})
        self.base.__setstate__({"state": self.state, "param_groups": self.param_groups})
        self._share_state_with_base()
        self.skipped_steps = state_dict.get("mollm", {}).get("skipped_steps", 0)

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler wraps `step` of this very object; a copy gets its own from the class.
        left = ("_optimizer_", "_zero_grad_profile_name", "step", "_opt_called")
        return {k: v for k, v in self.__dict__.items() if not k.startswith(left)}

    def __repr__(self) -> str:
        return f"MOLLMOptimizer(objectives={self.objectives}, rule={self.rule}, base={self.base})"
