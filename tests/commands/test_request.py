"""A ledger of requests: added, run one after the other, tested again, bound by manifests."""

from __future__ import annotations

import json

import pytest
import tiny

from mollm.cli import main
from mollm.errors import UsageError
from mollm.models import loading
from mollm.report.ledger import hash_of_model, read_ledger


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

    before = request._call
    monkeypatch.setattr(
        request, "_call", lambda c, w: audited(c, w) if c is audit else before(c, w)
    )
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


def test_a_damaged_ledger_is_refused(ledger):
    first(ledger)
    for text in ("{}", '{"format": 1, "requests": [{}]}'):
        (ledger / "ledger.json").write_text(text)
        with pytest.raises(UsageError, match="from a backup"):
            read_ledger(ledger)
