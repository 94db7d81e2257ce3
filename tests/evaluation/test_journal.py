"""An evaluation that is stopped goes on where it was, and ends with the same figures."""

import json

import pytest
import tiny

from mollm.cli import main
from mollm.evaluation import Evaluation, Row, Suite, evaluate
from mollm.evaluation import examine as examine_module
from mollm.evaluation.journal import Journal
from mollm.evaluation.records import Examined, Record
from mollm.models import loading

ROWS = [Row(f"Is it {n}?", f"It is {n}.") for n in range(10)]
RECORD = Record("forget", "?", "ø!", "so\n  it\u2028is", {"nll": 0.1 + 0.2})
MADE = Examined((RECORD,), cut_off=1)


def test_records_are_read_back_as_they_were_put(tmp_path):
    path = tmp_path / "out" / "unfinished.jsonl"
    first = Journal(path, "key")
    first.put("forget", 0, MADE)
    first.put("forget", 1, Examined((RECORD, RECORD)))
    again = Journal(path, "key")
    assert again.get("forget", 0) == MADE
    assert again.get("forget", 1) == Examined((RECORD, RECORD))
    assert again.get("retain", 0) is None
    assert again.known == 3
    again.put("retain", 0, MADE)
    assert Journal(path, "key").known == 4


def test_a_line_that_was_not_finished_and_another_evaluation_s_are_thrown_away(tmp_path):
    path = tmp_path / "unfinished.jsonl"
    Journal(path, "key").put("forget", 0, MADE)
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[1][:40])
    torn = Journal(path, "key")
    assert torn.known == 1
    torn.put("forget", 1, MADE)
    assert Journal(path, "key").known == 2
    assert Journal(path, "another").known == 0
    assert Journal(path, "key").known == 0


def test_a_stopped_evaluation_goes_on_with_what_is_left(tmp_path, monkeypatch):
    model, tokenizer, suite = tiny.model(), tiny.tokenizer(), Suite(forget=ROWS, retain=ROWS[:3])
    options = {"batch_size": 1, "max_new_tokens": 3, "resamples": 5}
    whole = evaluate(model, tokenizer, suite, **options)
    plain, asked = examine_module.generate_replies, []

    def stopping(model, chat, questions, **given):
        if len(asked) == 8:
            raise KeyboardInterrupt
        asked.extend(questions)
        return plain(model, chat, questions, **given)

    path = tmp_path / "unfinished.jsonl"
    monkeypatch.setattr(examine_module, "generate_replies", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, suite, journal=Journal(path, "key"), **options)
    assert Journal(path, "key").known == 8
    asked.clear()
    found = evaluate(model, tokenizer, suite, journal=Journal(path, "key"), **options)
    assert asked == [row.question for row in [*ROWS[8:], *ROWS[:3]]]
    assert [r.reply for r in found.records] == [r.reply for r in whole.records]
    for name, estimate in whole.estimates.items():
        assert found.value(name) == pytest.approx(estimate.value, rel=1e-6, abs=1e-9), name


def test_the_command_goes_on_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "model")
    rows = [{"question": row.question, "answer": row.answer} for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["evaluate", "--model", str(tmp_path / "model"), "--original", "none"]
    command += ["--forget", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]
    command += ["--batch-size", "1", "--max-new-tokens", "2", "--resamples", "2"]
    plain, calls = examine_module.generate_replies, []

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    monkeypatch.setattr(examine_module, "generate_replies", stopping)
    assert main(command) != 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unfinished-result.jsonl"]
    capsys.readouterr()
    assert main(command) == 0
    assert "Result: 4 questions are known from a run that was stopped." in capsys.readouterr().out
    assert len(calls) == 4  # one before it was stopped, one that stopped it, two afterwards
    assert len(Evaluation.read(tmp_path / "out").records) == 10
    assert not (tmp_path / "out/unfinished-result.jsonl").exists()
    unfinished = tmp_path / "out/unfinished-original.jsonl"
    unfinished.write_text("Is it secret?")
    assert main(command) == 0
    assert not unfinished.exists()
