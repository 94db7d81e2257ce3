"""What one optimizer step did, kept on the device until somebody reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mollm_ops import Solution, Status
from mollm_ops.dual_space import takes_part


class StepReport:
    """Gram matrix, weights, status and conflicts of one step.

    Reading a Python number or a dict waits for the device; holding the report does not.
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
        if self._changes is None:
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
            for name, part in zip(self.objectives, takes_part(self.gram).tolist(), strict=True)
        }

    def __repr__(self) -> str:
        return (
            f"StepReport(status={self.status.name}, pareto_gap={self.pareto_gap:.4g}, "
            f"weights={self.weights.tolist()}, conflicts={self.conflicts})"
        )
