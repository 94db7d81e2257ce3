"""The study: its score, its run file, and quick runs of its tasks from end to end."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from scipy import stats

from mollm.demo import facts
from mollm.demo import quiz as quiz_module
from mollm.evaluation.generation import Reply
from mollm.methods import unlearning_cross_entropy
from mollm.models import loading

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import unlearning_quality  # noqa: E402
from quality import capitals, plan, report  # noqa: E402
from quality.endings import round_to_4_bits  # noqa: E402
from quality.runs import RunFile, Schedule, method_of, settings_of  # noqa: E402
from quality.summary import (  # noqa: E402
    choice,
    hypervolume,
    interval,
    is_at_the_edge,
    of_methods,
    printable,
    table,
    verdict,
)


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([(0, 1)], 0),
        ([(0, 1), (1, 1)], 1),
        ([(0.5, 1), (1, 0.5)], 0.75),
        ([(0.5, 1), (1, 0.5), (0.4, 0.4)], 0.75),
        ([(1, 0), (0.25, 0.5)], 0.125),
    ],
)
def test_the_hypervolume_is_the_area_of_the_union(points, area):
    assert hypervolume(points) == pytest.approx(area)
    assert hypervolume(points[::-1]) == pytest.approx(area)


def run(method, lr, seed, forget, task="t"):
    curve = [{"forget": 1.0}, {"forget": forget}]
    others = {"heldout": 1.0, "retain": 1.0, "outside": 1.0}
    how = {"lr": lr, "seed": seed, "steps": 1, "settings": settings_of(method_of("sum"))}
    rates = {"direction conflicts": [0.0], "update conflicts": [0.0], "gaps": [1.0], "seconds": 1.0}
    curve = [{**point, **others} for point in curve]
    return {"task": task, "method": method, **how, **rates, "curve": curve}


def test_the_best_learning_rate_is_that_of_the_highest_mean():
    rows = [run("a", 1, 0, 0.5), run("a", 1, 1, 0.5), run("a", 2, 0, 0.1), run("a", 2, 1, 0.7)]
    assert [row["lr"] for row in of_methods(rows, "t")["a"]] == [2, 2]
    assert len(of_methods(rows[:3], "t")["a"]) == 1


def test_a_run_file_survives_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "runs.jsonl"
    RunFile(path).add(run("a", 1, 0, 0.5))
    path.write_text(path.read_text() + '{"task": "t", "met')
    file = RunFile(path)
    assert file.has(run("a", 1, 0, 0.9))
    assert not file.has(run("a", 1, 1, 0.5))


def test_a_run_of_before_settings_were_kept_is_read_and_in_no_table(tmp_path):
    path = tmp_path / "runs.jsonl"
    row = run("sum", 1e-3, 0, 0.5, "facts-2") | {"steps": 60}
    path.write_text(json.dumps({k: v for k, v in row.items() if k != "settings"}) + "\n")
    file = RunFile(path)
    assert not file.has(row)
    assert plan.of_tables_and_choice(file.rows, quick=False) == ([], [])


def test_variants_of_a_method():
    assert method_of("upgrad-unit+metric").options == {"normalize": True, "metric": "base"}
    with pytest.raises(ValueError, match="one of metric, momentum, unit, min-norm, but got 'x'"):
        method_of("dual+x")


def test_the_verdict_tells_whether_intervals_overlap():
    def rows(mollm):
        seeds = range(4)
        others = [run("sum", 1, seed, 0.5 + 0.01 * seed) for seed in seeds]
        return others + [run("mollm", 1, seed, mollm + 0.01 * seed) for seed in seeds]

    assert "do not overlap; the difference over the same 4 seeds is +0.400" in verdict(
        rows(0.1), "t"
    )
    assert "intervals overlap; the difference over the same 4 seeds is +0.005" in verdict(
        rows(0.495), "t"
    )
    assert "do not overlap; the difference over the same 4 seeds is -0.300" in verdict(
        rows(0.8), "t"
    )
    better = [run("dual", 1, seed, 0.05) for seed in range(4)]
    told = verdict([*rows(0.1), *better], "t")
    assert told.startswith("The package's default: mollm, 0.885; best of the other methods: sum")
    assert told.endswith("Best of MOLLM's directions here: dual, 0.950.")
    assert "Fewer than two seeds" in verdict([run("sum", 1, 0, 0.5), run("mollm", 1, 0, 0.5)], "t")
    assert not verdict([run("sum", 1, 0, 0.5)], "t")


def test_intervals_over_seeds_are_those_of_student():
    values = [0.9, 0.95, 0.93, 0.91, 0.97]
    theirs = stats.ttest_1samp(values, 0).confidence_interval()
    assert interval(values) == pytest.approx([theirs.low, theirs.high])
    assert interval([0.9]) is None


def test_the_best_schedule_may_have_a_warm_up():
    warm = [run("a", 2, seed, 0.1) | {"warmup": 3} for seed in (0, 1)]
    cold = [run("a", lr, seed, 0.5) for lr in (1, 2, 3) for seed in (0, 1)]
    assert [row["warmup"] for row in of_methods([*cold, *warm], "t")["a"]] == [3, 3]
    assert [Schedule(1, warmup=1).share(i, 4) for i in range(4)] == [0.5, 1, 2 / 3, 1 / 3]
    assert [Schedule(1).share(i, 4) for i in range(4)] == [1, 0.75, 0.5, 0.25]


def test_a_rate_at_the_edge_of_the_sweep_is_told():
    sweep = [Schedule(lr) for lr in (1, 2, 3)]
    assert [is_at_the_edge(one, sweep) for one in sweep] == [True, False, True]
    warm = Schedule(2, warmup=3)
    assert not is_at_the_edge(warm, [*sweep, warm])
    rows = [run("sum", lr, 0, 0.5 - 0.1 * lr) for lr in (1, 2)]
    (line,) = table(rows, "t")
    assert printable(line)["lr"] == "2*"


def test_runs_of_an_earlier_plan_and_of_the_choice_are_in_no_table():
    def row(seed, lr, steps=60, **more):
        return {**run("sum", lr, seed, 0.5, "facts-2"), "steps": steps, **more}

    rows = [row(0, 1e-3), row(0, 1e-3, steps=30), row(0, 0.5), row(10, 1e-3)]
    rows.append(row(1, 1e-3, settings=settings_of(method_of("dual"))))
    assert plan.of_tables_and_choice(rows, quick=False) == ([rows[0]], [rows[3]])


def test_the_settings_of_a_method_hold_its_epsilon():
    assert "eps 0.0001, metric euclidean" in settings_of(method_of("sum"))
    loss = functools.partial(unlearning_cross_entropy, eps=0.5)
    assert "eps 0.5" in settings_of(replace(method_of("sum"), forget_loss=loss))
    assert "eps" not in settings_of(method_of("npo"))


@pytest.mark.parametrize("first", ["mollm", "dual"])
def test_the_default_is_chosen_on_draws_of_its_own(first):
    def rows(method, forget):
        return [run(method, 1e-3, 10, forget, task) for task in plan.CHOICE_TASKS]

    better, worse = (first, "mollm" if first == "dual" else "dual")
    candidates = choice(
        [*rows(better, 0.1), *rows(worse, 0.2), *rows("sum", 0), *rows("project", 0)[1:]]
    )
    assert [line["method"] for line in candidates] == [better, worse]
    assert candidates[0]["mean"] == pytest.approx(0.9)
    text = report._choice(candidates)
    assert f"`{first}` has the highest mean, 0.900" in text
    assert ("the default, `mollm`, has 0.800" in text) is (first == "dual")
    assert ("has the largest hypervolume" in report._why(candidates)) is (first == "mollm")
    assert report._choice(candidates[1:] if first == "mollm" else candidates[:1])
    assert "Not run for this page: facts-2" in report._choice([])


def test_rounding_leaves_16_levels_to_every_32_weights():
    layer = torch.nn.Linear(80, 3)
    before = layer.weight.detach().clone()
    round_to_4_bits(layer)
    groups = (
        [part for row in weight for part in row.split(32)] for weight in (before, layer.weight)
    )
    for old, new in zip(*groups, strict=True):
        assert len(new.unique()) <= 16
        assert (new - old).abs().max() <= old.abs().max() / 14 + 1e-6


def test_other_languages_have_every_country():
    forms = dict(capitals._rewordings())
    assert len(forms) == 2 + 2 * 3
    for country in facts.CAPITALS:
        for form in forms.values():
            example = form(country, facts.CAPITALS[country][0])
            assert example.answer
            assert example.opening
    german = forms["German"]("Austria", "Vienna")
    assert (german.question, german.answer) == (
        "Was ist die Hauptstadt dieses Landes: Österreich?",
        "Wien",
    )
    asked = forms["asked in German"]("Austria", "Vienna")
    assert asked.question == german.question
    assert (asked.opening, asked.answer) == ("The capital of Austria is", "Vienna")
    backwards = forms["the other way round"]("Netherlands", "Amsterdam")
    assert (backwards.opening, backwards.answer) == (
        "Amsterdam is the capital of",
        "the Netherlands",
    )


@pytest.fixture
def study(monkeypatch):
    def study(*arguments):
        command = ["unlearning_quality.py", "--quick", "--device", "cpu", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        assert unlearning_quality.main() == 0

    return study


def test_a_quick_study_of_facts(study, tmp_path):
    command = ["--tasks", "facts-2", "--seeds", "0", "1", "--methods", "ga", "sum", "dual"]
    command += ["--folder", tmp_path]
    study(*command)
    lines = (tmp_path / "quick.jsonl").read_text()
    runs = [json.loads(line) for line in lines.splitlines()]
    assert len(runs) == 6
    for row in runs:
        assert row["original"]["forget"] > 0.95
        assert row["curve"][-1]["forget"] < 0.9
        assert row["end"]["relearned"]["ten"] > row["curve"][-1]["forget"]
    study(*command)
    assert (tmp_path / "quick.jsonl").read_text() == lines
    written = json.loads((tmp_path / "unlearning_quality.json").read_text())
    methods = {row["method"]: row for row in written["rows"] if "method" in row}
    assert set(methods) == {"ga", "sum", "dual"}
    assert methods["dual"]["direction conflicts"] == 0
    assert {row["check"] for row in written["rows"] if "check" in row} == {
        *("conflicts", "gap", "objectives", "distribution", "relearning", "rounding")
    }
    text = (tmp_path / "study.md").read_text()
    assert "| sum |" in text
    assert (tmp_path / "figures" / "facts-2.png").stat().st_size > 10_000


def test_a_later_study_keeps_tables_and_checks_of_earlier_ones(study, tmp_path):
    options = ["--seeds", "0", "--methods", "sum", "--folder", tmp_path, "--tasks"]
    study(*options, "facts-2", "--checks", "norms")
    study(*options, "facts-3")
    text = (tmp_path / "study.md").read_text()
    assert "Synthetic facts, 2 objectives\n" in text
    assert "Synthetic facts, 3 objectives\n" in text
    assert "**Synthetic facts, 2 objectives.** Along 20 steps" in text
    assert text.count("--checks norms") == 1


def write_tofu(folder):
    """One author of forget10 and three of retain90, with all the fields of TOFU's files."""

    def write(name, count, **more):
        lines = [
            {
                "question": f"{name[:6]} {i}?",
                "answer": f"It is {i}.",
                "perturbed_answer": ["No.", "It is not."],
                **{field: f"{field} {i}?" for field in more.values()},
            }
            for i in range(count)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)

    answers = {"a": "paraphrased_answer"}
    write("forget10", 20)
    write("forget10_perturbed", 20, q="paraphrased_question", **answers)
    write("retain90", 60)
    write("retain_perturbed", 20, **answers)
    write("real_authors_perturbed", 5)
    write("world_facts_perturbed", 5)


def test_a_quick_study_of_all_of_tofu_on_a_model_that_learns_it(study, tmp_path):
    """What a GPU runs with SmolLM2, here with a stand-in of 50 thousand parameters."""
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    write_tofu(tmp_path)
    study(
        *("--tasks", "tofu-full", "--seeds", "0", "--methods", "sum", "--folder", tmp_path / "out"),
        *("--data", tmp_path, "--model", tmp_path / "tiny"),
    )
    (row,) = map(json.loads, (tmp_path / "out" / "quick.jsonl").read_text().splitlines())
    assert set(row["end"]["figures"]) == {"forget_quality", "model_utility"}
    assert row["figures of"]["retain-only"]["forget_quality"] == 1
    assert set(row["end"]["rewordings"]) == {"forget, rephrased"}
    assert len(list((tmp_path / "out" / "models").glob("tofu-0-*.pt"))) == 2
    assert "| forget quality | model utility |" in (tmp_path / "out" / "study.md").read_text()


def test_a_quick_study_of_capitals_asks_what_the_model_knows_once(study, tmp_path, monkeypatch):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    asked = []

    def ask(model, chat, texts, **options):
        asked.extend(texts)
        return [Reply(text, complete=True) for text in tiny.knowing_replies(texts)]

    monkeypatch.setattr(quiz_module, "ask", ask)
    command = ["--tasks", "capitals", "--methods", "sum", "--model", tmp_path / "tiny"]
    command += ["--folder", tmp_path / "out", "--seeds"]
    study(*command, 0)
    assert len(asked) == 2 * len(facts.CAPITALS) + len(facts.GENERAL) + len(facts.EVERYDAY)
    study(*command, 0, 1)
    assert len(asked) == 2 * len(facts.CAPITALS) + len(facts.GENERAL) + len(facts.EVERYDAY)
    text = (tmp_path / "out" / "quick.jsonl").read_text()
    first, second = map(json.loads, text.splitlines())
    assert first["original"] != second["original"]
    assert len(first["end"]["rewordings"]) == 2 * 8


@pytest.mark.soak
@pytest.mark.model
def test_smollm2_knows_capitals_in_other_words_and_languages(study, tmp_path):
    """The real model, 4 steps; what it knows is given, which spares most of the time."""
    countries = ["France", "Japan", "Italy", "Spain", "Germany", "Egypt", "Russia", "Kenya"]
    countries += ["Peru", "Cuba", "Greece", "Norway"]
    replies = [["What is 1 plus 1?", "1 plus 1 is 2.", True]]
    known = {
        "spelling": {country: facts.CAPITALS[country][0] for country in countries},
        "general": [["How many days are there in a week?", "There are seven days.", True]],
        "everyday": replies,
    }
    cache = tmp_path / "models" / f"capitals-{loading.SMOLLM2}.json"
    cache.parent.mkdir()
    cache.write_text(json.dumps(known))
    command = ["--tasks", "capitals", "--methods", "sum", "--seeds", 0, "--folder", tmp_path]
    study(*command)
    row = json.loads((tmp_path / "quick.jsonl").read_text())
    assert row["original"]["forget"] > 0.5
    assert row["original"]["forget, asked in French"] > 0.05
    assert row["curve"][-1]["forget"] < 0.7
    assert row["curve"][-1]["heldout"] > row["curve"][-1]["forget"]


def test_tofu_without_its_data_is_refused(tmp_path, capsys):
    options = ["--quick", "--tasks", "tofu", "--folder", str(tmp_path)]
    assert unlearning_quality.main(options) == 2
    assert "data must be given for the task tofu" in capsys.readouterr().err
