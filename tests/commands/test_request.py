"""A ledger of requests: added, run one after the other, tested again, bound by manifests."""

from __future__ import annotations

import json

import pytest
import tiny

from mollm.cli import main
from mollm.commands import evaluate
from mollm.errors import UsageError
from mollm.models import loading
from mollm.report.ledger import hash_of_model, read_ledger
from mollm.system.folders import locked


def rows(path, what, count=4):
    lines = [
        json.dumps({"prompt": f"What is {what} {n}?", "answer": f"It is {n} {what}."})
        for n in range(count)
    ]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def ledger(tmp_path):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    settings = {
        "model": str(tmp_path / "tiny"),
        "retain": rows(tmp_path / "retain.jsonl", "kept", 6),
        "device": "cpu",
        "max_length": 128,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "sample_replies": 0,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    return tmp_path / "ledger"


def call(ledger, *words):
    return main(["request", words[0], "--ledger", str(ledger), *words[1:]])


def add(ledger, what, *words):
    return call(ledger, "add", "--forget", rows(ledger.parent / f"{what}.jsonl", what), *words)


def first(ledger):
    assert add(ledger, "ada", "--config", str(ledger.parent / "run.yaml"), "--note", "case 7") == 0


def run(ledger):
    return call(ledger, "run", "--no-audit", "--device", "cpu")


def test_requests_follow_one_another_and_are_tested_again(ledger, capsys):
    first(ledger)
    assert run(ledger) == 0
    assert add(ledger, "bob") == 0
    assert run(ledger) == 0
    found = read_ledger(ledger)
    one, two = found.requests
    assert one.before == found.model
    assert two.before == str(ledger / "001" / "model")
    assert [test["run"] for test in one.tests] == ["001", "002"]
    assert [test["run"] for test in two.tests] == ["002"]
    assert all(0 < test["figures"]["forget_probability"] < 1 for test in one.tests)
    assert one.weights_sha256 == hash_of_model(ledger / "001" / "model") != two.weights_sha256
    manifest = json.loads((ledger / "002" / "manifest.json").read_text())
    assert manifest["before_sha256"] == one.weights_sha256
    assert manifest["data"]["forget"] == {"sha256": two.sha256, "rows": 4}
    assert manifest["figures"].keys() == {"001", "002"}
    assert len(manifest["void_if"]) == 4
    capsys.readouterr()
    assert call(ledger, "status") == 0
    told = capsys.readouterr().out
    assert told.count("holds") == 2
    page = (ledger / "ledger.html").read_text()
    assert "case 7" in page
    assert "It is 0 ada" not in page + (ledger / "ledger.json").read_text()
    assert run(ledger) == 0
    assert "Nothing is open." in capsys.readouterr().out

    # What makes a manifest void, and what does not.
    (ledger.parent / "ada.jsonl").unlink()
    assert call(ledger, "status") == 0
    rows(ledger.parent / "bob.jsonl", "other")
    assert call(ledger, "status") == 1
    assert "void: its data have been changed" in capsys.readouterr().out
    (weights,) = (ledger / "001" / "model").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes() + b" ")
    (ledger / "002" / "manifest.json").write_text("{}")
    assert call(ledger, "status", "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert [each["void_because"] for each in told] == [
        "the weights of its model have been changed",
        "its manifest.json has been changed",
    ]


def test_data_that_were_deleted_are_not_tested_again(ledger):
    first(ledger)
    assert run(ledger) == 0
    (ledger.parent / "ada.jsonl").unlink()
    assert add(ledger, "bob") == 0
    assert run(ledger) == 0
    tests = read_ledger(ledger).requests[0].tests
    assert "figures" in tests[0]
    assert "ada.jsonl" in tests[1]["skipped"]


def test_the_audit_of_a_request_is_in_the_ledger(ledger, monkeypatch):
    called = []

    def audited(command, words):
        called.append(words)
        out = ledger / "001" / "audit"
        out.mkdir()
        (out / "audit.json").write_text('{"verdict": "FAIL"}')
        return 1

    from mollm.commands import audit, request

    before = request.call
    monkeypatch.setattr(request, "call", lambda c, w: audited(c, w) if c is audit else before(c, w))
    first(ledger)
    assert call(ledger, "run", "--device", "cpu") == 0
    assert read_ledger(ledger).requests[0].verdict == "FAIL"
    assert called[0][1:5] == [
        *("--model", str(ledger / "001" / "model")),
        *("--original", str(ledger.parent / "tiny")),
    ]


def test_a_run_that_fails_is_in_the_ledger_and_the_next_one_starts_before_it(ledger, capsys):
    settings = json.loads((ledger.parent / "run.yaml").read_text())
    settings |= {"learning_rate": 0.05, "max_loss_rise": 1e-6}
    (ledger.parent / "run.yaml").write_text(json.dumps(settings))
    first(ledger)
    assert run(ledger) == 1
    found = read_ledger(ledger)
    assert found.requests[0].status == "failed"
    assert found.last_model == found.model


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "ledger must be a folder that `mollm request add` made"),
        (["status"], "ledger must be a folder with a ledger.json"),
        (["add", "--forget", "FORGET"], "model must be given for the first request of a ledger"),
    ],
)
def test_a_ledger_that_is_not_begun(words, message, ledger, capsys):
    forget = rows(ledger.parent / "ada.jsonl", "ada")
    assert call(ledger, *[forget if word == "FORGET" else word for word in words]) == 2
    assert message in capsys.readouterr().err


def test_the_same_rows_are_one_request_and_a_ledger_keeps_its_model(ledger, capsys):
    first(ledger)
    assert add(ledger, "ada") == 2
    assert "but 001 is for the same" in capsys.readouterr().err
    assert add(ledger, "bob", "--model", "other") == 2
    assert "model must be left out once a ledger is begun" in capsys.readouterr().err


def test_data_that_have_changed_are_not_run(ledger, capsys):
    first(ledger)
    rows(ledger.parent / "ada.jsonl", "changed")
    assert run(ledger) == 2
    assert "have another hash now" in capsys.readouterr().err


def test_a_request_whose_data_changed_is_dropped_with_its_reason(ledger, capsys):
    first(ledger)
    assert add(ledger, "bob") == 0
    rows(ledger.parent / "ada.jsonl", "changed")
    assert run(ledger) == 2
    told = capsys.readouterr().err
    assert "mollm request drop 1 --reason TEXT" in told
    assert call(ledger, "drop", "1", "--reason", "Ada sent another file") == 0
    assert "001 is dropped" in capsys.readouterr().out
    assert run(ledger) == 0
    one, two = read_ledger(ledger).requests
    assert (one.status, one.reason, one.run) == ("dropped", "Ada sent another file", None)
    assert one.dropped >= one.added
    assert (two.status, two.before) == ("done", read_ledger(ledger).model)
    assert "Ada sent another file" in (ledger / "ledger.html").read_text()
    assert call(ledger, "status") == 0
    assert "001: Ada sent another file" in capsys.readouterr().out

    # The rows of before may be asked for again, as a request of their own.
    assert add(ledger, "ada") == 0
    assert read_ledger(ledger).requests[2].name == "003"
    assert call(ledger, "drop", "2", "--reason", "no") == 2
    assert "request 002 must be open to be taken out, but it is done" in capsys.readouterr().err
    assert call(ledger, "drop", "003", "--reason", " ") == 2
    assert "reason must say why" in capsys.readouterr().err
    assert call(ledger, "drop", "4", "--reason", "no") == 2
    assert "one of 001, 002, 003, but got '4'" in capsys.readouterr().err


def test_a_request_that_was_begun_and_dropped_names_what_is_left(ledger, capsys):
    first(ledger)
    (ledger / "001").mkdir()
    assert call(ledger, "drop", "1", "--reason", "withdrawn") == 0
    assert f"delete {ledger / '001'}" in capsys.readouterr().out


def test_a_ledger_of_before_requests_could_be_dropped_is_read(ledger):
    first(ledger)
    told = json.loads((ledger / "ledger.json").read_text())
    del told["requests"][0]["dropped"]
    (ledger / "ledger.json").write_text(json.dumps(told))
    assert read_ledger(ledger).requests[0].dropped is None


def test_retain_data_that_the_model_makes_are_those_of_each_run(ledger, monkeypatch, capsys):
    from mollm.commands import audit, request
    from mollm.training import own_retain

    for name, few in (("_LEAST", 12), ("_ANSWER_TOKENS", 8), ("_QUESTION_TOKENS", 8)):
        monkeypatch.setattr(own_retain, name, few)
    called, before = [], request.call

    def call_or_note(command, words):
        if command is not audit:
            return before(command, words)
        called.append(words)
        raise UsageError("not now.")

    monkeypatch.setattr(request, "call", call_or_note)
    assert add(ledger, "ada", "--config", str(ledger.parent / "run.yaml"), "--retain", "auto") == 0
    assert call(ledger, "run", "--device", "cpu") == 0
    (made,) = (ledger / "001").glob("retain-auto-*.jsonl")
    assert called[0][called[0].index("--retain") + 1] == str(made)
    assert call(ledger, "status") == 0
    whole = made.read_text()
    for changed in (whole.replace('"answer": "', '"answer": "No. ', 1), whole[:-30]):
        made.write_text(changed)
        capsys.readouterr()
        assert call(ledger, "status") == 1
        assert "the data to retain have been changed" in capsys.readouterr().out
    made.unlink()
    assert call(ledger, "status") == 0


def interrupt(monkeypatch, module, error):
    """Has a command raise in place of what it does; gives the words of its calls."""
    from mollm.commands import request

    called, before = [], request.call

    def call_or_raise(command, words):
        called.append(words[0])
        if command is module:
            raise error
        return before(command, words)

    monkeypatch.setattr(request, "call", call_or_raise)
    return called


def test_a_request_that_was_interrupted_after_its_run_is_not_run_again(ledger, monkeypatch):
    first(ledger)
    with monkeypatch.context() as patched:
        interrupt(patched, evaluate, KeyboardInterrupt())
        assert run(ledger) == 130
    (found,) = read_ledger(ledger).requests
    assert found.status == "trained"
    # So it is where the process was killed before the ledger was written.
    text = (ledger / "ledger.json").read_text()
    (ledger / "ledger.json").write_text(text.replace('"trained"', '"open"'))
    called = interrupt(monkeypatch, None, None)
    assert run(ledger) == 0
    assert called == ["evaluate"]
    (found,) = read_ledger(ledger).requests
    assert found.status == "done"
    assert found.weights_sha256 == hash_of_model(ledger / "001" / "model")
    assert call(ledger, "status") == 0


def test_data_that_were_deleted_after_the_run_do_not_hold_up_the_request(ledger, monkeypatch):
    first(ledger)
    with monkeypatch.context() as patched:
        interrupt(patched, evaluate, KeyboardInterrupt())
        assert run(ledger) == 130
    (ledger.parent / "ada.jsonl").unlink()
    assert call(ledger, "run", "--device", "cpu") == 0
    (found,) = read_ledger(ledger).requests
    assert found.status == "done"
    assert "ada.jsonl" in found.tests[0]["skipped"]
    assert "not audited: " in found.reason


def test_a_request_that_cannot_be_tested_is_done_and_says_so(ledger, monkeypatch, capsys):
    first(ledger)
    interrupt(monkeypatch, evaluate, UsageError("the rows are too long."))
    assert run(ledger) == 0
    assert "Request 001 was not tested: the rows are too long." in capsys.readouterr().out
    (found,) = read_ledger(ledger).requests
    assert (found.status, found.tests) == (
        "done",
        [{"run": "001", "skipped": "the rows are too long."}],
    )


def test_a_request_of_three_rows_is_not_audited_and_one_of_a_row_is_refused(ledger, capsys):
    few = rows(ledger.parent / "one.jsonl", "one", 1)
    config = ("--config", str(ledger.parent / "run.yaml"))
    assert call(ledger, "add", "--forget", few, *config) == 2
    assert "at least 2 rows to be tested, but got 1" in capsys.readouterr().err
    assert not ledger.exists()
    few = rows(ledger.parent / "few.jsonl", "few", 3)
    assert call(ledger, "add", "--forget", few, *config) == 0
    assert call(ledger, "run", "--device", "cpu") == 0
    (found,) = read_ledger(ledger).requests
    assert (found.status, found.verdict) == ("done", None)
    assert "not audited: an audit needs at least 4 forget rows" in found.reason
    capsys.readouterr()
    assert call(ledger, "status") == 0
    assert "001: not audited: an audit needs" in capsys.readouterr().out


def test_an_original_that_does_not_know_the_rows_is_said(ledger):
    first(ledger)
    assert call(ledger, "run", "--device", "cpu") == 0
    (found,) = read_ledger(ledger).requests
    assert (found.status, found.verdict) == ("done", None)
    assert "the original must know what was to be forgotten" in found.reason


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batch-size", "0"), "batch-size must be at least 1"),
        (("--device", "nowhere"), "device"),
    ],
)
def test_what_no_test_could_do_is_refused_before_the_run(words, message, ledger, capsys):
    first(ledger)
    assert call(ledger, "run", *words) == 2
    assert message in capsys.readouterr().err
    assert read_ledger(ledger).requests[0].status == "open"


def test_a_request_that_failed_can_be_added_again(ledger):
    first(ledger)
    found = read_ledger(ledger)
    found.requests[0].status, found.requests[0].run = "failed", "001"
    found.write()
    assert add(ledger, "ada") == 0
    assert run(ledger) == 0
    one, two = read_ledger(ledger).requests
    assert (one.status, one.tests) == ("failed", [])
    assert (two.status, two.sha256) == ("done", one.sha256)
    assert add(ledger, "ada") == 2


def test_a_ledger_keeps_every_setting_or_refuses_it(ledger, capsys, monkeypatch):
    path = ledger.parent / "run.yaml"
    settings = json.loads(path.read_text())
    rows(ledger.parent / "more.jsonl", "more")
    retain = {"a": "retain.jsonl", "b": {"path": "more.jsonl"}}
    kept = {**settings, "retain": retain, "eval_retain": "more.jsonl", "out": "runs/x"}
    path.write_text(json.dumps({**kept, "eval_forget": "more.jsonl"}))
    monkeypatch.chdir(ledger.parent)
    config = ("--config", str(path))
    assert add(ledger, "ada", *config) == 2
    assert "eval_forget must be left out" in capsys.readouterr().err
    path.write_text(json.dumps(kept))
    assert add(ledger, "ada", *config) == 0
    assert "Not used: out, runs/x" in capsys.readouterr().out
    found = read_ledger(ledger)
    where = str(ledger.parent)
    assert found.retain == {"a": f"{where}/retain.jsonl", "b": {"path": f"{where}/more.jsonl"}}
    assert found.settings["eval_retain"] == f"{where}/more.jsonl"
    (ledger.parent / "elsewhere").mkdir()
    monkeypatch.chdir(ledger.parent / "elsewhere")
    assert run(ledger) == 0
    manifest = json.loads((ledger / "001" / "manifest.json").read_text())
    assert manifest["data"]["retain"].keys() == {"retain_a", "retain_b", "eval retain"}
    assert call(ledger, "status") == 0
    rows(ledger.parent / "more.jsonl", "other")
    capsys.readouterr()
    assert call(ledger, "status") == 1
    assert "void: the data to retain have been changed" in capsys.readouterr().out


def test_a_ledger_holds_no_rows(ledger, capsys):
    row = '[{"prompt": "Who?", "answer": "Ada."}, {"prompt": "When?", "answer": "Now."}]'
    config = ("--config", str(ledger.parent / "run.yaml"))
    assert call(ledger, "add", "--forget", row, *config) == 2
    assert (
        "forget must be a path or a name, since a ledger holds no rows" in capsys.readouterr().err
    )
    assert add(ledger, "ada", *config, "--retain", row) == 2
    assert "retain must be a path or a name" in capsys.readouterr().err


def test_the_status_shows_no_figure_of_an_earlier_model(ledger, capsys):
    first(ledger)
    found = read_ledger(ledger)
    figures = {"forget_probability": 0.125, "forget_rouge_l": 0.5}
    found.requests[0].tests = [{"run": "001", "figures": figures}]
    found.write()
    assert call(ledger, "status") == 0
    assert "0.1250" in capsys.readouterr().out
    found.requests[0].tests.append({"run": "002", "skipped": "the data are gone."})
    found.write()
    assert call(ledger, "status") == 0
    assert "0.1250" not in capsys.readouterr().out


def test_a_ledger_that_is_in_use_is_refused_by_the_name_of_its_flag(ledger, capsys):
    first(ledger)
    with locked(ledger):
        assert add(ledger, "bob") == 2
    told = capsys.readouterr().err
    assert "ledger must be a folder of no other run" in told
    assert "--ledger" in told
    assert "--out" not in told


def test_a_damaged_ledger_is_refused(ledger):
    first(ledger)
    for text in ("{}", '{"format": 1, "requests": [{}]}'):
        (ledger / "ledger.json").write_text(text)
        with pytest.raises(UsageError, match="from a backup"):
            read_ledger(ledger)


@pytest.mark.parametrize(
    "change",
    [
        {"number": 2}, {"number": "x"}, {"run": "javascript:alert(1)"}, {"run": "../x"},
        {"status": "x"}, {"status": "done", "run": None}, {"tests": [3]}, {"tests": [{"run": "1"}]},
        {"tests": [{"run": "001", "figures": {"forget_probability": "x"}}]}, {"note": []},
        {"forget": 3}, {"nosuch": 1}, {"rows": None},
    ],
)  # fmt: skip
def test_a_request_that_is_not_as_it_was_written_is_named(change, ledger):
    first(ledger)
    told = json.loads((ledger / "ledger.json").read_text())
    told["requests"][0] |= change
    (ledger / "ledger.json").write_text(json.dumps(told))
    with pytest.raises(UsageError, match=r"its requests\[0\] is damaged: take it from a backup"):
        read_ledger(ledger)
