"""Figures of a suite along runs that follow one another, and along sets of growing size."""

from __future__ import annotations

import json

import pytest
import tiny

from mollm.cli import main
from mollm.commands import curve
from mollm.data.files import sample_path
from mollm.models import loading
from mollm.report.ledger import hash_of_model


@pytest.fixture
def folder(tmp_path):
    loading.save(tiny.model(max_position_embeddings=512), tiny.tokenizer(), tmp_path / "tiny")
    for name, count in (("a", 3), ("b", 6), ("retain", 6)):
        rows = [{"prompt": f"What is {name} {n}?", "answer": f"{n} {name}."} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": str(tmp_path / "tiny"),
        "retain": str(tmp_path / "retain.jsonl"),
        "max_length": 128,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "sample_replies": 0,
        "disable_tqdm": True,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    return tmp_path


def run(folder, kind, *more):
    words = ["curve", kind, "--config", str(folder / "run.yaml"), "--device", "cpu"]
    words += ["--forget", str(folder / "a.jsonl"), "--forget", str(folder / "b.jsonl")]
    words += ["--suite", "wmdp", "--data", str(sample_path("wmdp")), "--metrics", "wmdp_bio,mmlu"]
    return main([*words, "--out", str(folder / kind), *more])


def test_requests_one_after_another_are_measured_after_each(folder, capsys, monkeypatch):
    assert run(folder, "sustainability") == 0
    out = folder / "sustainability"
    told = json.loads((out / "curve.json").read_text())
    assert [point["run"] for point in told["points"]] == ["000", "001", "002"]
    assert [one["rows"] for one in told["forget"]] == [3, 6]
    before = [json.loads((out / f"{n}.yaml").read_text())["model"] for n in ("001", "002")]
    assert before == [str(folder / "tiny"), str(out / "001" / "model")]
    for point in told["points"]:
        measured = json.loads((out / point["run"] / "suite" / "metrics.json").read_text())
        assert point["figures"].keys() == {"wmdp_bio", "mmlu"}
        for name, figure in point["figures"].items():
            assert figure["value"] == measured["metrics"][name]["value"]
    page = (out / "curve.html").read_text()
    assert page.count("<svg") >= 2
    assert "mmlu ↑" in page
    assert "002" in capsys.readouterr().out

    # What is there is not made again, and another curve is not mixed with it.
    monkeypatch.setattr(curve, "_call", lambda *_: pytest.fail("made again"))
    assert run(folder, "sustainability") == 0
    (folder / "b.jsonl").write_text((folder / "retain.jsonl").read_text())
    assert run(folder, "sustainability") == 2
    assert "must be of the same forget" in capsys.readouterr().err


def test_growing_sets_start_from_the_same_model(folder):
    assert run(folder, "scalability") == 0
    out = folder / "scalability"
    before = [json.loads((out / f"{n}.yaml").read_text())["model"] for n in ("001", "002")]
    assert before == [str(folder / "tiny")] * 2
    assert hash_of_model(out / "001" / "model") != hash_of_model(out / "002" / "model")


def test_a_run_that_fails_ends_the_curve_with_the_points_so_far(folder, capsys):
    settings = json.loads((folder / "run.yaml").read_text())
    settings |= {"learning_rate": 0.05, "max_steps": 3, "max_loss_rise": 1e-6}
    (folder / "run.yaml").write_text(json.dumps(settings))
    assert run(folder, "sustainability") == 1
    assert "Run 001 failed" in capsys.readouterr().out
    told = json.loads((folder / "sustainability" / "curve.json").read_text())
    assert [point["run"] for point in told["points"]] == ["000"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "wmpd"], "did you mean wmdp"),
        (["--data", "/nowhere/at/all"], "hf download cais/wmdp"),
        (["--device", "abacus"], "device must be"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_run(folder, words, message, capsys):
    assert run(folder, "scalability", *words) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "scalability" / "001").exists()


def test_a_curve_needs_a_model_and_retain_data(tmp_path, capsys):
    words = ["curve", "scalability", "--forget", "f.jsonl", "--suite", "wmdp", "--model", "m"]
    assert main(words) == 2
    assert "retain must be given for a curve" in capsys.readouterr().err
