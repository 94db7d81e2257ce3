"""What one optimizer step did, kept on the device until somebody reads it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from mollm.system.tables import html_table
from mollm_ops import Solution, Status
from mollm_ops.dual_space import active_objectives

_INSIDE = ("mollm", "mollm_ops", "torch", "contextlib")


def level_outside() -> int:
    """The stacklevel with which a warning names the line that called into us or Torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in _INSIDE:
            break
        level, frame = level + 1, frame.f_back
    return level


class SkipCounter:
    """Counts skipped steps, on the device where the host need not know at once; warns once.

    Args:
        outcome: What such a step left, as the warning says it.
        known: The number so far.
    """

    def __init__(self, outcome: str, known: int = 0) -> None:
        self._outcome = outcome
        self._known = known
        self._on_device: Tensor | None = None
        self._seen: tuple[Tensor, torch.cuda.Event] | None = None  # a copy on its way to the host
        self._warned = False

    def count(self, what: str) -> None:
        """A step that the host knows to be skipped, and why."""
        self._known += 1
        self._warn(what)

    def add(self, finite: Tensor) -> None:
        """A step on a GPU, skipped where `finite` is not; does not wait for it."""
        if self._on_device is None:
            self._on_device = torch.zeros((), dtype=torch.int64, device=finite.device)
        self._on_device += ~finite
        if self._warned or torch.cuda.is_current_stream_capturing():
            return
        if self._seen is None:
            host = torch.zeros((), dtype=torch.int64, pin_memory=True)
            self._seen = (host, torch.cuda.Event())  # type: ignore[no-untyped-call]
        host, event = self._seen
        if event.query():  # type: ignore[no-untyped-call]
            if host.item() > 0:
                self._warn("a gradient")
            host.copy_(self._on_device, non_blocking=True)
            event.record()

    def total(self) -> int:
        """How many; waits for the device."""
        return self._known + (0 if self._on_device is None else int(self._on_device))

    def __getstate__(self) -> dict[str, object]:
        known = {"_known": self.total(), "_on_device": None, "_seen": None}
        return {**self.__dict__, **known}

    def _warn(self, what: str) -> None:
        if not self._warned:
            warnings.warn(
                f"{what} is not finite: {self._outcome}. Further such steps are counted in "
                "`skipped_steps` without a warning.",
                stacklevel=level_outside(),
            )
        self._warned = True


class StepReport:
    """Gram matrix, weights, status and conflicts of one step.

    Reading a Python number or a dict waits for the device; holding the report does not.

    Example:
        >>> import torch
        >>> from mollm import MOLLMOptimizer
        >>> x = torch.nn.Parameter(torch.ones(2))
        >>> names = ("a", "b")
        >>> optimizer = MOLLMOptimizer([x], objectives=names, direction="sum", base="sgd")
        >>> optimizer.backward({"a": 4 * x[0], "b": x[1] - x[0]})
        >>> optimizer.step()
        >>> optimizer.last_step.conflicts  # the sum descends on a, and increases b
        {'a': False, 'b': True}
        >>> optimizer.last_step.cosines.round(decimals=2).tolist()
        [[1.0, -0.71], [-0.71, 1.0]]
    """

    def __init__(
        self,
        objectives: Sequence[str],
        gram: Tensor,
        solution: Solution,
        changes: Tensor | None,
    ) -> None:
        self.objectives = tuple(objectives)
        self.gram = gram
        """[K, K] float64: G_ij = g_i · g_j."""
        self.solution = solution
        self._changes = changes

    @property
    def norms(self) -> Tensor:
        """[K]: |g_k|."""
        return self.gram.diagonal().sqrt()

    @property
    def cosines(self) -> Tensor:
        """[K, K]: G_ij / (|g_i| |g_j|); 0 where a gradient is zero."""
        inverse = torch.where(self.norms > 0, 1 / self.norms, 0.0)
        return self.gram * inverse[:, None] * inverse

    @property
    def weights(self) -> Tensor:
        """[K] float64: w of Σ_k w_k g_k."""
        return self.solution.weights

    @property
    def status(self) -> Status:
        return self.solution.status

    @property
    def pareto_gap(self) -> float:
        """Norm of the min-norm point of the unit gradients, in [0, 1]; 0 is Pareto stationary."""
        return self.solution.pareto_gap

    @property
    def changes(self) -> dict[str, float] | None:
        """g_k · Δθ for the update really applied: the change of each loss to first order.

        None where the step was skipped or conflicts are not tracked.
        """
        if self._changes is None or self.status is Status.NON_FINITE:
            return None
        return dict(zip(self.objectives, self._changes.tolist(), strict=True))

    @property
    def conflicts(self) -> dict[str, bool] | None:
        """For each objective, whether the update really applied failed to descend on it.

        An objective whose gradient was negligible took no part and has no conflict.
        """
        changes = self.changes
        if changes is None:
            return None
        return {
            name: part and not changes[name] < 0
            for name, part in zip(
                self.objectives, active_objectives(self.gram).tolist(), strict=True
            )
        }

    def _rows(self) -> list[tuple[str, ...]]:
        """For each objective its name, norm, weight, change, and whether it is in conflict."""
        changes, conflicts = self.changes or {}, self.conflicts or {}
        return [
            (
                name,
                f"{norm:.3g}",
                f"{weight:.3g}",
                f"{changes[name]:.3g}" if name in changes else "-",
                "conflict" if conflicts.get(name) else "",
            )
            for name, norm, weight in zip(
                self.objectives, self.norms.tolist(), self.weights.tolist(), strict=True
            )
        ]

    def _sentences(self) -> list[str]:
        cosines = self.cosines.tolist()
        pairs = [
            f"{a}·{b} {cosines[i][j]:.3g}"
            for i, a in enumerate(self.objectives)
            for j, b in enumerate(self.objectives)
            if i < j
        ]
        told = [f"{self.status.name}, Pareto gap {self.pareto_gap:.3g}"]
        return [*told, f"cosines {', '.join(pairs)}"] if pairs else told

    def __str__(self) -> str:
        width = max(len("objective"), *map(len, self.objectives))
        rows = [f"{'objective':<{width}}  {'|g|':>10}  {'weight':>10}  {'change':>10}"]
        for name, norm, weight, change, mark in self._rows():
            line = f"{name:<{width}}  {norm:>10}  {weight:>10}  {change:>10}"
            rows.append(f"{line}  {mark}" if mark else line)
        return "\n".join([*rows, *self._sentences()])

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        header = ("objective", "|g|", "weight", "change", "")
        return html_table(header, self._rows(), caption="; ".join(self._sentences()))

    def __repr__(self) -> str:
        return (
            f"StepReport(status={self.status.name}, pareto_gap={self.pareto_gap:.4g}, "
            f"weights={self.weights.tolist()}, conflicts={self.conflicts})"
        )
