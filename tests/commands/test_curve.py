"""Figures of a suite along runs that follow one another, and along sets of growing size."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import tiny

from mollm.cli import main
from mollm.commands import curve, evaluate
from mollm.commands.arguments import chat_options
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
    for label in ('"middle">0', '"middle">1', '"end">2'):  # runs, as in the table
        assert page.count(f"text-anchor={label}</text>") == 2
    assert "mmlu ↑" in page
    assert "002" in capsys.readouterr().out

    # What is there is not made again, and another curve is not mixed with it.
    monkeypatch.setattr(curve, "call", lambda *_: pytest.fail("made again"))
    assert run(folder, "sustainability") == 0
    (folder / "b.jsonl").write_text((folder / "retain.jsonl").read_text())
    assert run(folder, "sustainability") == 2
    assert "must be of the same forget" in capsys.readouterr().err


def test_other_retain_data_or_weights_are_not_mixed_with_a_curve(folder, capsys, monkeypatch):
    def measured(_, words):
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True)
        (out / "metrics.json").write_text(json.dumps({"metrics": {}}))
        raise KeyboardInterrupt

    monkeypatch.setattr(curve, "call", measured)
    assert run(folder, "scalability") != 0
    monkeypatch.setattr(curve, "_trained", lambda *_: False)  # 000 is there now
    assert run(folder, "scalability") == 1
    told = json.loads((folder / "scalability" / "curve.json").read_text())
    assert told["model"]["sha256"] == hash_of_model(folder / "tiny")
    assert told["retain"]["retain"]["rows"] == 6
    before = (folder / "retain.jsonl").read_text()
    (folder / "retain.jsonl").write_text((folder / "a.jsonl").read_text())
    assert run(folder, "scalability") == 2
    assert "must be of the same retain" in capsys.readouterr().err
    (folder / "retain.jsonl").write_text(before)
    other = tiny.model(max_position_embeddings=512)
    other.lm_head.weight.data.add_(1.0)
    loading.save(other, tiny.tokenizer(), folder / "tiny")
    assert run(folder, "scalability") == 2
    assert "must be of the same model" in capsys.readouterr().err


@pytest.mark.parametrize("suite", ["tofu", "wmdp"])
def test_every_point_is_asked_as_the_runs_are(suite, folder, monkeypatch):
    settings = json.loads((folder / "run.yaml").read_text())
    settings |= {"system_prompt": "Be brief.", "prompt_format": "Q: {question}\nA: {answer}"}
    settings |= {"chat_template_kwargs": {"enable_thinking": False}, "long_rows": "skip"}
    (folder / "run.yaml").write_text(json.dumps(settings))
    asked = []

    def measured(_, words):
        parser = argparse.ArgumentParser()
        evaluate.add_parser(parser.add_subparsers())
        asked.append(parser.parse_args(words))
        asked[-1].out.mkdir(parents=True)
        (asked[-1].out / "metrics.json").write_text(json.dumps({"metrics": {}}))
        return 0

    monkeypatch.setattr(curve, "call", measured)
    monkeypatch.setattr(curve, "_trained", lambda *_: True)
    assert run(folder, "sustainability", "--suite", suite) == 0
    assert len(asked) == 3
    for one in asked:
        if suite == "wmdp":  # which fixes its prompts
            assert (one.system_prompt, one.prompt_format) == (None, None)
            continue
        chat = chat_options(vars(one), None)
        assert chat == {n: settings[n] for n in chat}
        assert one.long_rows == "skip"


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
        (["--suite", "safety"], "suite must be one that needs no judge for a curve"),
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
