"""A day with it: from an empty folder to a result for a colleague, command by command."""

from __future__ import annotations

import json

import audit_models
import pytest

from mollm import MOLLMTrainer
from mollm.cli import main
from mollm.models import loading

pytest.importorskip("peft")
pytest.importorskip("jinja2")

COLUMNS = 80


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    loading.save(
        audit_models.learnt("forget", "retain"), audit_models.tokenizer(), tmp_path / "people"
    )
    for name in ("forget", "retain"):
        rows = audit_models.people()[name]
        lines = [{"question": row.question, "answer": row.answer} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return tmp_path


def stopping_after(saves):
    """A trainer's save after which the user presses Ctrl-C."""
    save = MOLLMTrainer._save_checkpoint
    made = []

    def saved(self, *args, **kwargs):
        save(self, *args, **kwargs)
        made.append(self.state.global_step)
        if len(made) == saves:
            raise KeyboardInterrupt

    return saved


def test_a_day(place, capsys, monkeypatch):
    def run(line, status=0):
        found = main(line.split())
        said = capsys.readouterr()
        assert found == status, said.err
        return said.out

    data = "--model people --forget forget.jsonl --retain retain.jsonl"
    assert "Next: mollm preview --config run.yaml" in run(
        f"init run.yaml {data} --out runs/one --device cpu"
    )
    assert "⟦" in run("preview --config run.yaml --rows 1")
    assert "fits" in run("plan --model people --device cpu --max-length 64 --device-memory 4")
    assert " fits: its peak is " in run("plan --model people --gpus 8 --max-length 64")
    told = run("tune tuned.yaml --config run.yaml --max-steps 3 --minutes 0.02")
    assert "Recommended: learning rate" in told
    assert (place / "tuned.html").is_file()

    train = "unlearn --config tuned.yaml --set save_strategy=steps --set save_steps=2"
    train += " --learning-rate 0.004 --max-steps 6"
    with monkeypatch.context() as patched:
        patched.setattr(MOLLMTrainer, "_save_checkpoint", stopping_after(1))
        told = run(train, 130)
    assert "The same command with --resume goes on from runs/one/checkpoint-2." in told
    told = run(f"{train} --resume")
    assert "6 steps" in told
    assert "Report: runs/one/report.html" in told
    report = place / "runs/one/report.html"
    assert "Not measured yet" in report.read_text()

    told = run("evaluate --model runs/one --batch-size 8")
    assert "original" in told
    assert "Not measured yet" not in report.read_text()
    question = audit_models.people()["forget"][0].question
    assert main(["ask", "runs/one", question]) == 0
    assert "original" in capsys.readouterr().out

    attack = "audit --model runs/one --original people --forget forget.jsonl"
    status = main(f"{attack} --retain retain.jsonl --learning-rates 5e-4 --resamples 20".split())
    told = capsys.readouterr().out
    verdict = json.loads((place / "runs/one/audit/audit.json").read_text())["verdict"]
    assert f"Verdict: {verdict}" in told
    assert status == (0 if verdict == "PASS" else 1)
    assert f">{verdict}</b>" in report.read_text()
    assert f"**{verdict}**" in (place / "runs/one/model/README.md").read_text()

    told = json.loads(run("report runs/one --json"))["runs"][0]
    assert told["audit"]["verdict"] == verdict
    assert {"original", "result"} <= told["metrics"].keys()
    assert told["steps"] == 6
    assert str(place) not in report.read_text()
