import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from mollm.audit import Audit, Finding
from mollm.demo import plots, report
from mollm.demo.facts import Question
from mollm.demo.quiz import Score
from mollm.demo.report import DemoRun, conflict_rates, render, table, write_run
from mollm.evaluation.generation import Reply
from mollm.methods.method import OBJECTIVES
from mollm.training.history import StepRecord

FIGURES = {"losses.png", "cosines.png", "weights.png", "conflicts.png"}


def record(step, *, conflict="", loss=0.5):
    return StepRecord(
        step=step,
        lr=1e-5,
        losses=dict.fromkeys(OBJECTIVES, loss),
        norms=dict.fromkeys(OBJECTIVES, 2.0),
        cosines={"forget·kl": 0.1, "forget·retain": -0.2, "kl·retain": 0.9},
        weights=dict.fromkeys(OBJECTIVES, 1.5),
        status="DUAL",
        pareto_gap=0.7,
        changes={name: 1.0 if name == conflict else -1.0 for name in OBJECTIVES},
        conflicts={name: name == conflict for name in OBJECTIVES},
    )


def skipped(step):
    return StepRecord(**{**vars(record(step)), "changes": {}, "conflicts": {}})


def score(*replies):
    questions = tuple(Question(f"q{i}", f"Is <{i}> it?", ("Oslo",)) for i in range(len(replies)))
    return Score(questions, tuple(Reply(text, complete=True) for text in replies))


@pytest.fixture
def run():
    before = {group: score("Oslo", "It is Oslo") for group in report.GROUPS}
    after = {group: score("Oslo", "<script>Bergen</script>") for group in report.GROUPS}
    summary = {f"{group}_accuracy_before": 1.0 for group in report.GROUPS}
    summary |= {f"{group}_accuracy_after": 0.5 for group in report.GROUPS}
    history = [record(0), record(1, conflict="kl"), record(2, conflict="kl"), record(3)]
    summary |= {
        "model": "tiny", "method": "dual", "steps": 4, "lr": 1e-5, "lr_schedule": "linear to 0",
        "optimizer": "adamw", "seed": 7, "conflict_rate": conflict_rates(history),
        "skipped_steps": 0, "failure": None, "questions": dict.fromkeys(report.GROUPS, 2),
        "countries": {"forget": ["Norway"], "retain": ["Peru"], "heldout": ["Chile"]},
        "peak_memory_gib": 1.25, "device": "a CPU", "versions": {"torch": "9.9"}, "commit": None,
        "command": "mollm demo --seed 7", "finished": "now", "seconds": 12.0,
        "seconds_training": 3.0, "audit": {"verdict": None, "reason": "it takes <four> facts."},
    }  # fmt: skip
    return DemoRun(summary, before, after, history)


class Page(HTMLParser):
    """The sources, the tags and the words of a page."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.tags, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def test_every_file_is_written(run, tmp_path):
    write_run(run, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == FIGURES | {"summary.json", "answers.json", "report.html"}
    assert json.loads((tmp_path / "summary.json").read_text()) == run.summary
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert answers["heldout"][1]["after"] == "<script>Bergen</script>"
    assert answers["heldout"][1]["after_right"] is False


def test_the_page_is_self_contained_and_escaped(run):
    page = Page(render(run))
    assert not page.sources
    assert page.tags.count("svg") == 7
    assert "script" not in page.tags
    assert "link" not in page.tags


def test_the_page_tells_what_happened(run):
    text = " ".join(" ".join(Page(render(run)).words).split())
    for words in (
        "Norway", "<script>Bergen</script>", "Is <1> it?", "mollm demo --seed 7", "a CPU", "9.9",
        "1 of 2 still right", "1.25 GiB", "Held-out countries",
    ):  # fmt: skip
        assert words in text, words
    assert re.search(r"kl 50% 0\.500 0\.500", text)


def test_the_terminal_table(run):
    lines = table(run).splitlines()
    assert any(re.fullmatch(r"Forget +2 +100% +50%", line) for line in lines)
    assert "Updates in conflict: forget 0%, kl 50%, retain 0%" in lines


def test_without_an_audit_the_reason_is_told(run):
    assert "No audit: it takes <four> facts." in table(run).splitlines()
    assert "None was made: it takes <four> facts." in " ".join(Page(render(run)).words)


def test_every_finding_of_the_audit_is_told(run):
    finding = Finding(
        "taught 3 examples again", 0.96, (0.9, 1.0), 0.1, 0.3, "FAIL", "likelihood", 0.48, 0.5,
        None, 3, "full, lr 5e-05",
    )  # fmt: skip
    found = Audit("FAIL", (finding,), (), {}, ("A note.",), {"to teach": 3, "measured": 3}, {})
    audited = dataclasses.replace(run, audit=found)
    lines = table(audited).splitlines()
    assert str(finding) in lines
    assert lines.index("Verdict: FAIL") == lines.index(str(finding)) + 1
    text = " ".join(" ".join(Page(render(audited)).words).split())
    for words in ("FAIL taught 3 examples again full, lr 5e-05 96% 90% to 100% 10%", "A note."):
        assert words in text, words


def test_conflict_rates_count_applied_updates():
    history = [record(0), record(1, conflict="kl"), skipped(2), record(3)]
    assert conflict_rates(history) == {"forget": 0, "kl": pytest.approx(1 / 3), "retain": 0}
    assert conflict_rates([skipped(0)]) == dict.fromkeys(OBJECTIVES, 0)


def test_numbers_without_a_word_in_json_become_null():
    nested = {"a": [float("nan"), 1.0], "b": (float("inf"),), "c": "x"}
    assert report.nan_to_none(nested) == {"a": [None, 1.0], "b": [None], "c": "x"}


@pytest.mark.parametrize(
    "history",
    [[record(0)], [skipped(0), record(1)], [record(0, loss=float("nan")), record(1, loss=-3.0)]],
    ids=["one step", "a skipped step", "losses without bounds"],
)
def test_figures_of_unusual_runs(history, tmp_path):
    paths = plots.save_figures(history, tmp_path)
    assert {path.name for path in paths} == FIGURES
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_the_same_history_draws_the_same_files(run, tmp_path):
    (tmp_path / "again").mkdir()
    first = plots.save_figures(run.history, tmp_path)
    second = plots.save_figures(run.history, tmp_path / "again")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
