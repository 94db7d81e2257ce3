"""The verdict of an audit in report, comparison, card and JSON."""

from __future__ import annotations

import json

import pytest
import reported_runs

from mollm.cli import main
from mollm.errors import UsageError
from mollm.report.audit_file import audit_of, with_audit, write_audited_cards
from mollm.report.page import read_reported, render
from mollm.report.run_file import read_run

ENDED = "2026-01-01T00:00:00+00:00"
CARD = "---\ntags: []\n---\n\n# A model\n\nText.\n\n## Data\n\n| a |\n\n## Versions\n\n| b |\n"


@pytest.fixture
def run(tmp_path):
    return reported_runs.run(tmp_path / "run", finished=ENDED)


def test_the_report_has_verdict_and_findings(run):
    assert "Verdict" not in render([read_reported(run)])
    assert "have it attacked" in render([read_reported(run)])
    reported_runs.audited(run)
    page = render([read_reported(run)])
    assert "Verdict: <b" in page
    assert "WEAK</b>" in page
    assert "20.0% <small>[10.0%, 30.0%]</small>" in page
    assert "<script>" not in page
    assert "have it attacked" not in page


def test_an_audit_of_an_earlier_model_or_one_that_has_not_ended_is_no_verdict(run):
    reported_runs.audited(run, finished="2025-12-31T00:00:00+00:00")
    assert audit_of(read_run(run)) is None
    reported_runs.audited(run, verdict=None)
    assert audit_of(read_run(run)) is None


@pytest.mark.parametrize("damage", [{"findings": [{"name": "x"}]}, {"findings": 3}, {"about": {}}])
def test_a_damaged_audit_is_refused(run, damage):
    reported_runs.audited(run, **damage)
    with pytest.raises(UsageError, match="must be as `mollm audit` wrote it"):
        read_reported(run)


def test_a_card_gets_the_verdict_once(run):
    for folder in (run, run / "model"):
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_text(CARD)
    reported_runs.audited(run)
    write_audited_cards(read_run(run))
    once = (run / "README.md").read_text()
    assert once == (run / "model" / "README.md").read_text()
    assert "Verdict: **WEAK**" in once
    assert "| asked in other words | WEAK | 20.0% | 10.0% to 30.0% | 10.0% |" in once
    assert "<script>" not in once
    assert once.index("## Audit") < once.index("## Data") < once.index("## Versions")
    write_audited_cards(read_run(run))
    assert (run / "README.md").read_text() == once
    assert with_audit(once, None) == CARD


def test_runs_are_compared_by_their_verdicts(run, tmp_path):
    other = reported_runs.run(tmp_path / "other", finished=ENDED)
    assert "<td>audit</td>" not in render([read_reported(run), read_reported(other)])
    reported_runs.audited(run, verdict="PASS")
    page = render([read_reported(run), read_reported(other)])
    assert '<tr><td>audit</td><td class="number PASS">PASS</td>' in page


def test_the_verdict_of_a_short_audit_is_marked_wherever_it_is_shown(run, tmp_path):
    (run / "README.md").write_text(CARD)
    other = reported_runs.run(tmp_path / "other", finished=ENDED)
    reported_runs.audited(run, verdict="PASS", settings={"short": True})
    reported_runs.audited(other, verdict="PASS", settings={"short": False})
    assert '<b class="PASS">PASS (short)</b>' in render([read_reported(run)])
    assert '<b class="PASS">PASS</b>' in render([read_reported(other)])
    page = render([read_reported(run), read_reported(other)])
    assert '<td class="number PASS">PASS (short)</td><td class="number PASS">PASS</td>' in page
    write_audited_cards(read_run(run))
    assert "Verdict: **PASS (short)**" in (run / "README.md").read_text()


def test_the_command_prints_json_and_leaves_the_page_alone(run, tmp_path, capsys):
    reported_runs.audited(run)
    reported_runs.evaluated(run / "evaluation")
    other = reported_runs.run(tmp_path / "other", history=[])
    assert main(["report", str(run), str(other), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["runs"]
    assert first["run"] == "run"
    assert first["audit"]["verdict"] == "WEAK"
    assert first["metrics"]["result"]["mia_loss"]["value"] == 0.9
    assert first["losses"]["kl"] == {"first": 1.5, "last": 1.61}
    assert first["settings"]["method"] == "mollm"
    assert (second["losses"], second["audit"]) == ({}, None)
    assert not list(tmp_path.glob("**/*.html"))
    page = tmp_path / "page.html"
    assert main(["report", str(run), "--json", "--out", str(page)]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["runs"][0]["run"] == "run"
    assert str(page) in captured.err
    assert page.is_file()
