"""StepReport: what it says of steps that were made and of steps that were not."""

from __future__ import annotations

import torch

from mollm.optim.step_report import StepReport
from mollm_ops import Status, min_norm_weights

NAMES = ("forget", "retain")


def report(gram, changes):
    gram = torch.tensor(gram, dtype=torch.float64)
    return StepReport(NAMES, gram, min_norm_weights(gram), torch.tensor(changes))


def test_a_conflict_is_a_loss_that_does_not_go_down():
    step = report([[1.0, 0.0], [0.0, 1.0]], [-0.5, 0.25])
    assert step.changes == {"forget": -0.5, "retain": 0.25}
    assert step.conflicts == {"forget": False, "retain": True}


def test_a_negligible_gradient_has_no_conflict():
    assert report([[1.0, 0.0], [0.0, 0.0]], [-0.5, 0.0]).conflicts == dict.fromkeys(NAMES, False)


def test_a_skipped_step_has_neither_changes_nor_conflicts():
    step = report([[1.0, float("nan")], [float("nan"), 1.0]], [0.0, 0.0])
    assert step.status is Status.NON_FINITE
    assert step.changes is None
    assert step.conflicts is None
