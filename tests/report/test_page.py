import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

pytest.importorskip("jinja2")

import reported_runs as runs

from mollm import UsageError
from mollm.cli import main
from mollm.report.page import moment, read_reported, render, write_report

VOID = {"meta", "br", "line", "rect", "circle", "polyline", "link", "img"}


class Page(HTMLParser):
    """The tags, the words and what is loaded; every tag is closed by its own."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open, self.loads = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def folder(tmp_path):
    return runs.run(tmp_path / "one")


def test_a_page_loads_nothing_and_runs_nothing(folder):
    runs.evaluated(folder / "evaluation")
    page = Page(render([read_reported(folder)]))
    assert not page.loads
    assert not {"script", "iframe", "object", "link", "img", "form"} & set(page.tags)
    assert page.tags.count("svg") == 7
    assert "url(" not in render([read_reported(folder)])


def test_what_others_wrote_shows_as_text(folder):
    page = Page(render([read_reported(folder)]))
    assert page.text.count("<script>alert('&')</script>") == 5


def test_it_tells_what_was_asked_for_and_how_it_went(folder):
    page = Page(render([read_reported(folder)]))
    for words in (
        "Unlearning in tiny", "12 steps, method mollm", "learning rate 1e-05", "75 s on a CPU",
        "forget.jsonl 12", "locuslab/TOFU 24", "ab" * 32, "1.25 GiB",
        "mollm unlearn --config run.yaml --out=out", "Rows were read from rows.jsonl.",
        "Not measured yet", "torch 9.9", "kl 1.5 1.61 1.5 33%", "10 1.5 0.25",
    ):  # fmt: skip
        assert words in page.text, words
    assert "/home/ann" not in page.text


def test_differences_are_marked(folder):
    text = render([read_reported(folder)])
    assert "It was <del>Ann Øre, of course.</del>" in text
    assert "<ins>&lt;script&gt;" in text


def test_metrics_of_all_three_models(folder, tmp_path):
    runs.evaluated(folder / "evaluation" / "original", value=0.9)
    runs.evaluated(folder / "evaluation", value=0.2)
    runs.evaluated(tmp_path / "logs", value=0.25, names=["forget_probability"])
    runs.about(folder / "evaluation", retain_logs=str(tmp_path / "logs" / "examples.jsonl"))
    text = render([read_reported(folder)])
    page = Page(text)
    assert "Metric original result retain-only forgotten forget_" in page.text
    row = re.search(r"<tr><td>forget_\u200bprobability ↓</td>.*?</tr>", text, re.DOTALL)[0]
    cells = re.findall(r'<td class="number (\w*)">\s*(.*?) <small>\[(.*?)\]', row)
    assert cells == [
        ("", "0.900", "0.8, 1"), ("better", "0.200", "0.1, 0.3"), ("", "0.250", "0.15, 0.35")
    ]  # fmt: skip
    row = re.search(r"<tr><td>retain_\u200bprobability ↑</td>.*?</tr>", text, re.DOTALL)[0]
    assert 'class="number worse"' in row
    assert "—" in row
    assert "0.90 → 0.20" in page.text


@pytest.mark.parametrize(
    "history",
    [
        [],
        [runs.step(0)],
        [runs.step(0, loss=float("nan")), runs.step(1, loss=-3.0)],
        [runs.step(n) for n in range(2000)],
    ],
    ids=["no step", "one step", "losses without bounds", "many steps"],
)
def test_unusual_histories(history, tmp_path):
    text = render([read_reported(runs.run(tmp_path / "one", history=history))])
    Page(text)
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL).lower()
    assert len(text) < 100_000


def test_a_run_that_failed_says_so(tmp_path):
    folder = runs.run(tmp_path / "one", failure="weights must be finite <b>.", replies=[])
    page = Page(render([read_reported(folder)]))
    assert "This run failed. weights must be finite <b>." in page.text
    assert "Replies before" not in page.text


def test_settings_that_changed_on_resuming_are_shown(tmp_path):
    change = {"step": 4, "setting": "learning_rate", "was": 1, "is": 2}
    folder = runs.run(tmp_path / "one", changes=[change], resumed_at=4)
    text = Page(render([read_reported(folder)])).text
    assert "5 learning_rate 1 2" in text
    assert "since it was resumed at step 4" in text


def test_several_runs_beside_each_other(tmp_path, capsys):
    first = runs.run(tmp_path / "a/one")
    second = runs.run(
        tmp_path / "b/one", steps=5, settings={"method": "ga", "learning_rate": 1e-5, "seed": 42}
    )
    runs.evaluated(second / "evaluation", value=0.2)
    assert main(["report", str(first), str(second / "model" / ".."), "--out", "x.txt"]) == 2
    assert main(["report", str(first), str(second)]) == 0
    path = first.parent / "comparison.html"
    assert str(path) in capsys.readouterr().out.splitlines()[-1]
    page = Page(path.read_text(encoding="utf-8"))
    for words in ("a/one", "b/one", "method mollm ga", "forget_\u200bprobability ↓ — 0.200"):
        assert words in page.text, words
    assert not page.loads


def test_too_many_runs_are_refused(folder):
    with pytest.raises(UsageError, match="at most 8 runs, but got 9"):
        render([read_reported(folder)] * 9)
    with pytest.raises(UsageError, match="at least one run"):
        render([])


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "must be a folder that `mollm unlearn` wrote" in capsys.readouterr().err


def test_files_that_are_damaged_are_named(folder):
    runs.evaluated(folder / "evaluation")
    (folder / "evaluation/metrics.json").write_text('{"metrics": {"x": {"value": 1}}}')
    with pytest.raises(UsageError, match=r"metrics\.json must be as `mollm evaluate` wrote it"):
        read_reported(folder)
    (folder / "run.json").write_text('{"format": 99}')
    with pytest.raises(UsageError, match="must be of format 1"):
        read_reported(folder)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("run.json", {"settings": True}, "its settings is not"),
        ("run.json", {"settings": {"method": "mollm"}}, "its settings.learning_rate is not"),
        ("run.json", {"failure": 3}, "its failure is not"),
        ("run.json", {"notes": ["a", []]}, r"its notes\[1\] is not"),
        ("history.jsonl", {"losses": {"<b>": 1.0}}, "in line 1 its losses is not"),
        ("history.jsonl", {"losses": "x"}, "in line 1 its losses is not"),
        ("history.jsonl", {"conflicts": {"kl": "x"}}, "in line 1 its conflicts.kl is not"),
        ("history.jsonl", {"weights": {}}, "in line 1 its weights is not"),
        ("history.jsonl", {"pareto_gap": float("nan")}, "in line 1 its pareto_gap is not"),
        ("evaluation/metrics.json", {"metrics": {"x": {"value": []}}}, "as `mollm evaluate`"),
    ],
)
def test_what_is_not_as_it_was_written_is_refused(folder, file, change, words):
    runs.evaluated(folder / "evaluation")
    first, *rest = (folder / file).read_text().splitlines()
    whole = json.loads("".join([first, *rest]) if file != "history.jsonl" else first)
    others = rest if file == "history.jsonl" else []
    (folder / file).write_text("\n".join([json.dumps(whole | change), *others]))
    with pytest.raises(UsageError, match=words):
        read_reported(folder)


def test_a_page_is_written_anew(folder):
    write_report([folder], folder / "report.html")
    before = (folder / "report.html").read_text()
    runs.evaluated(folder / "evaluation")
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text() != before


def test_why_a_run_failed_names_no_folder(tmp_path):
    folder = runs.run(tmp_path / "a/one", failure="cannot write /home/ann/out/model: no room.")
    other = runs.run(tmp_path / "a/two")
    for folders in ([folder], [folder, other]):
        page = render([read_reported(each) for each in folders])
        assert "cannot write model: no room." in page
        assert "/home/ann" not in page


def test_memory_that_is_not_known_is_a_sign(tmp_path):
    first, second = (
        runs.run(tmp_path / name, peak_memory_gib=None, planned_gib=None) for name in ("a", "b")
    )
    assert "— GiB at the peak" in Page(render([read_reported(first)])).text
    both = Page(render([read_reported(first), read_reported(second)])).text
    assert "peak memory, GiB — —" in both


def test_steps_that_were_skipped_are_in_no_rate(tmp_path):
    skipped = replace(runs.step(1), changes={}, conflicts={}, status="NON_FINITE")
    history = [runs.step(0, conflict="kl"), skipped, runs.step(2)]
    folder = runs.run(tmp_path / "one", history=history)
    assert "kl 1.5 1.52 1.5 50%" in Page(render([read_reported(folder)])).text
    folder = runs.run(tmp_path / "two", history=[skipped])
    assert "kl 1.51 1.51 1.5 —" in Page(render([read_reported(folder)])).text


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("2026-01-02T03:04:05+00:00", "2026-01-02 03:04 UTC"),
        ("2026-01-02T03:04:05+02:00", "2026-01-02 01:04 UTC"),
        ("now", "now"),
    ],
)
def test_a_time_is_shown_for_people(said, shown):
    assert moment(said) == shown


def test_a_name_may_hold_what_some_readers_end_a_line_at(tmp_path):
    name = "forget_a\u2028b\x85c"
    renamed = [
        replace(step, **{
            part: {name if key == "forget" else key: value for key, value in each.items()}
            for part, each in vars(step).items()
            if part in ("losses", "norms", "weights", "changes", "conflicts")
        })
        for step in map(runs.step, range(3))
    ]  # fmt: skip
    folder = runs.run(tmp_path / "one", history=renamed, steps=3)
    assert len(read_reported(folder).history) == 3
    assert name.split("\u2028")[0] in render([read_reported(folder)])


def test_what_turns_a_line_around_shows_as_a_sign(tmp_path):
    folder = runs.run(tmp_path / "one", notes=["a\u202eb", "c\x1bd"])
    page = render([read_reported(folder)])
    assert "\u202e" not in page
    assert "a\\x202eb" in page
    assert "c\\x1bd" in page


def test_skipped_steps_stand_beside_each_other_too(tmp_path):
    folders = [runs.run(tmp_path / n, skipped_steps=k) for n, k in (("a", 0), ("b", 3))]
    page = render([read_reported(folder) for folder in folders])
    assert page.count("(3 skipped)") == 1
