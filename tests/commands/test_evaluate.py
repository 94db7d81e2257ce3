import json
import re

import pytest
import tiny

pytest.importorskip("transformers")
pytest.importorskip("rouge_score")

import reported_runs

from mollm.cli import main
from mollm.evaluation import Estimate, Evaluation
from mollm.evaluation.cache import key_of
from mollm.evaluation.suite import load_suite
from mollm.models import loading

FEW = ["--max-new-tokens", "3", "--resamples", "5"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose original and files are known, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    given = {}
    for role in ("forget", "retain"):
        rows = [{"question": f"Is it {role} {n}?", "answer": f"{n}."} for n in range(3)]
        given[role] = str(tmp_path / f"{role}.jsonl")
        (tmp_path / f"{role}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = reported_runs.run(tmp_path / "run", model=str(tmp_path / "tiny"), given=given)
    loading.save(tiny.model(seed=1), tiny.tokenizer(), folder / "model")
    return folder


def test_a_run_is_measured_beside_its_original(run, capsys):
    assert main(["evaluate", "--model", str(run), *FEW]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ +original +result$", out, re.MULTILINE)
    themes = [line for line in out.splitlines() if line in ("forgotten", "kept", "fluency")]
    assert themes == ["forgotten", "kept", "fluency"]
    result = Evaluation.read(run / "evaluation")
    original = Evaluation.read(run / "evaluation/original")
    assert original.value("forget_kl") == pytest.approx(0, abs=1e-9)
    assert result.value("forget_kl") > 1e-3
    row = next(line for line in out.splitlines() if "forget_probability ↓" in line)
    shown = [f"{e['forget_probability'].value:.3g}" for e in (original, result)]
    assert [number for number in shown if f" {number} [" in row] == shown
    assert out.count("not computed") == 1
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "forget_\u200bprobability" in page
    assert main(["evaluate", "--model", str(run), *FEW, "--original", "none"]) == 0
    assert not (run / "evaluation/original").exists()
    assert "original" not in capsys.readouterr().out


def test_the_original_is_measured_once(run, capsys, monkeypatch):
    from mollm.commands import evaluate as command

    measured = []
    progress = command.progress

    def noting(total, what):
        measured.append(what)
        return progress(total, what)

    monkeypatch.setattr(command, "progress", noting)
    words = ["evaluate", "--model", str(run), *FEW]
    for more, expected in (
        ([], ["Original", "Result"]),
        ([], ["Result"]),
        (["--no-cache"], ["Original", "Result"]),
        (["--seed", "3"], ["Original", "Result"]),
    ):
        measured.clear()
        assert main([*words, *more]) == 0
        assert measured == expected
        assert ("known from before" in capsys.readouterr().out) == (expected == ["Result"])


def test_json_is_all_that_is_printed(run, capsys):
    assert main(["evaluate", "--model", str(run), *FEW, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"original", "result", "missing"}
    assert found["result"]["forget_probability"].keys() == Estimate.__annotations__.keys()


def test_without_a_run_data_must_be_given(tmp_path, capsys):
    assert main(["evaluate", "--model", str(tmp_path / "x")]) == 2
    assert "data must be given" in capsys.readouterr().err


def test_a_key_is_of_everything(tmp_path):
    suites = []
    for answer in ("1.", "2."):
        rows = [{"question": "Is it?", "answer": answer}, {"question": "So?", "answer": "So."}]
        suites.append(load_suite(rows))
    model, tokenizer = tiny.model(), tiny.tokenizer()
    key = key_of(model, tokenizer, suites[0], {"seed": 0})
    assert key == key_of(tiny.model(), tiny.tokenizer(), suites[0], {"seed": 0})
    assert key != key_of(model, tokenizer, suites[1], {"seed": 0})
    assert key != key_of(model, tokenizer, suites[0], {"seed": 1})
    assert key != key_of(model, tiny.tokenizer(template=False), suites[0], {"seed": 0})
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-3
    assert key != key_of(model, tokenizer, suites[0], {"seed": 0})


def test_the_table_says_what_got_better():
    def made(**values):
        return Evaluation((), {n: Estimate(v, v - 0.1, v + 0.1, 9) for n, v in values.items()}, {})

    before = made(forget_probability=0.9, retain_probability=0.9, forget_kl=0.0)
    after = made(forget_probability=0.1, retain_probability=0.7, forget_kl=2.0)
    lines = after.table(before).splitlines()
    assert lines[0].split() == ["original", "result"]
    assert [line.split()[-1] for line in lines[2:4]] == ["better", "2.1]"]
    assert lines[-1].endswith("worse")
    assert max(map(len, lines)) <= 80
    assert "\x1b[32m" in after.table(before, colour=True)
    assert after.table().splitlines()[1].split()[:3] == ["forget_probability", "↓", "0.1"]
    shown = after.html(before)
    words = re.findall(r">(original|result|better|worse)<", shown)
    assert words == ["original", "result", "better", "worse"]
    assert "forget_probability ↓" in after._repr_html_()
    assert "original" not in after._repr_html_()


def test_a_folder_of_the_users_called_original_stays(run, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "original").mkdir(parents=True)
    (out / "original/novel.txt").write_text("Once.")
    words = ["evaluate", "--model", str(run), *FEW, "--out", str(out)]
    assert main(words) == 2
    assert "holds other files: choose another folder with --out" in capsys.readouterr().err
    assert main([*words, "--original", "none"]) == 0
    assert (out / "original/novel.txt").read_text() == "Once."


def test_only_our_files_of_the_original_are_replaced_and_removed(run):
    folder = run / "evaluation/original"
    words = ["evaluate", "--model", str(run), *FEW]
    assert main(words) == 0
    (folder / "notes.txt").write_text("Mine.")
    assert main(words) == 0
    assert main([*words, "--original", "none"]) == 0
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_what_is_typed_goes_before_what_the_run_says(run, tmp_path):
    other = tmp_path / "other.jsonl"
    rows = [{"question": f"Is it other {n}?", "answer": f"{n}."} for n in range(3)]
    other.write_text("\n".join(map(json.dumps, rows)))
    words = ["evaluate", "--model", str(run), *FEW, "--original", "none"]
    assert main([*words, "--retain", str(other)]) == 0
    asked = {r.group: r.question for r in Evaluation.read(run / "evaluation").records}
    assert asked == {"forget": "Is it forget 2?", "retain": "Is it other 2?"}


def test_help_shows_defaults_of_zero_but_not_those_of_switches(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "seed of the resampling (default: 0)" in told
    assert "(default: False)" not in told


def test_a_run_that_others_wrote_chooses_no_folder_to_write_to(run, tmp_path):
    facts = json.loads((run / "run.json").read_text())
    facts["given"] |= {"out": str(tmp_path / "elsewhere"), "judge": "x"}
    (run / "run.json").write_text(json.dumps(facts))
    assert main(["evaluate", "--model", str(run), *FEW, "--original", "none"]) == 0
    assert (run / "evaluation/metrics.json").is_file()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": 3}, "its settings is not"),
        ({"settings": {"chat_template_kwargs": [1]}}, r"its settings\.chat_template_kwargs is not"),
        ({"settings": {"system_prompt": 3}}, r"its settings\.system_prompt is not"),
        ({"given": {"forget": 3}}, r"its given\.forget is not"),
        ({"model": ["x"]}, "its model is not"),
    ],
)
def test_a_run_that_is_damaged_is_refused_by_every_command(change, words, run, capsys):
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | change))
    for command in (
        ["evaluate", "--model", str(run)],
        ["ask", str(run), "x"],
        ["report", str(run)],
    ):
        assert main([*command]) == 2
        said = capsys.readouterr().err
        assert re.search(f"run.json must be as `mollm unlearn` wrote it, but {words}", said)


def test_a_history_that_is_cut_is_named_before_anything_is_measured(run, capsys, monkeypatch):
    from mollm.models import loading as models

    history = (run / "history.jsonl").read_text()
    (run / "history.jsonl").write_text(history[:-20])
    monkeypatch.setattr(models, "load", lambda *args: pytest.fail("loaded"))
    rows = [{"question": f"Is it {n}?", "answer": f"{n}."} for n in range(6)]
    (run / "forget.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--original", str(run / "model"), "--forget", str(run / "forget.jsonl")]
    for command in (["evaluate", *FEW], ["audit", *data]):
        assert main([command[0], "--model", str(run), *command[1:]]) == 2
        assert "history.jsonl, line 12 is malformed JSON" in capsys.readouterr().err
