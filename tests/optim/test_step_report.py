"""StepReport: what it says of steps that were made and of steps that were not."""

from __future__ import annotations

import re

import torch

from mollm import MOLLMOptimizer
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


def test_it_prints_as_a_table():
    x = torch.nn.Parameter(torch.ones(2))
    optimizer = MOLLMOptimizer([x], objectives=("a", "b"), direction="sum", base="sgd")
    optimizer.backward({"a": 4 * x[0], "b": x[1] - x[0]})
    optimizer.step()
    lines = str(optimizer.last_step).splitlines()
    assert lines[0].split() == ["objective", "|g|", "weight", "change"]
    assert lines[1].split()[:3] == ["a", "4", "1"]
    assert lines[2].split()[:3] == ["b", "1.41", "1"]
    assert lines[2].endswith("conflict")
    assert lines[-1] == "cosines a·b -0.707"


def test_a_notebook_shows_it_as_a_table():
    shown = report([[1.0, 0.0], [0.0, 4.0]], [-0.5, 0.25])._repr_html_()
    cells = re.findall(r"<t[hd] [^>]*>([^<]*)</t[hd]>", shown)
    assert cells[:5] == ["objective", "|g|", "weight", "change", ""]
    assert cells[5:7] == ["forget", "1"]
    assert cells[-2:] == ["0.25", "conflict"]
    assert "Pareto gap" in shown
    assert "cosines forget·retain 0" in shown
