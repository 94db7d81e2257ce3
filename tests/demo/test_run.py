import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from mollm import MOLLMConfig
from mollm.data.chat import IGNORE_INDEX, ChatFormat
from mollm.data.encoding import example_of
from mollm.demo import facts
from mollm.demo import quiz as quiz_module
from mollm.demo import run as demo
from mollm.demo.facts import Question
from mollm.demo.run import Split, divide, forget_records, retain_records, run_demo
from mollm.demo.settings import DemoSettings
from mollm.errors import UsageError
from mollm.evaluation.generation import Reply
from mollm.models import loading
from mollm.training import passes

SUMMARY_KEYS = {
    *(f"{g}_accuracy_{w}" for g in ("forget", "retain", "heldout", "general")
      for w in ("before", "after")),
    "steps", "seconds", "conflict_rate", "peak_memory_gib", "seed", "method", "lr",
    "lr_schedule", "model", "countries", "versions", "device", "commit", "command",
    "compute_dtype",
}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def knowing(monkeypatch):
    """The first answers are all right; the tiny random model would know nothing."""
    asked = []

    def ask(model, chat, texts, **options):
        asked.extend(texts)
        return [Reply(text, complete=True) for text in tiny.knowing_replies(texts)]

    monkeypatch.setattr(quiz_module, "ask", ask)
    return asked


_WITHOUT_EXTRAS = """
import sys

for name in ("peft", "datasets", "pyarrow", "bitsandbytes", "scipy", "sklearn"):
    sys.modules[name] = None
import tiny
from mollm.data.chat import ChatFormat
from mollm.demo import quiz, run
from mollm.demo.settings import DemoSettings
from mollm.evaluation.generation import Reply

quiz.ask = lambda model, chat, texts, **_: [
    Reply(text, complete=True) for text in tiny.knowing_replies(texts)
]
chat = ChatFormat(tiny.tokenizer())
split = run.Split(["Peru"], ["Japan"], [], {"Peru": "Lima", "Japan": "Tokyo"})
made, _ = run.train(tiny.model(), chat, split, DemoSettings(steps=1), run.Path("out"), print)
made.export("model")
"""
"""A small demo where the packages of the other extras cannot be imported."""


def settings(saved, out, **options):
    return DemoSettings(**({"model": saved, "out": out, "steps": 2, "lr": 1e-3} | options))


def run(saved, out, **options):
    return run_demo(settings(saved, out, **options), say=lambda line: None)


@pytest.mark.usefixtures("knowing")
def test_a_run_leaves_everything_behind(saved, tmp_path):
    out = tmp_path / "out"
    finished = run(saved, out, forget=("japan", "USA"))
    assert {path.name for path in out.iterdir()} == {
        "summary.json", "answers.json", "history.jsonl", "report.html", "model",
        "losses.png", "cosines.png", "weights.png", "conflicts.png", "README.md", "run.json",
    }  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["countries"]["forget"] == ["Japan", "United States"]
    assert summary["forget_accuracy_before"] == 1
    assert summary["steps"] == 2
    assert len((out / "history.jsonl").read_text().splitlines()) == 2
    assert finished.summary == summary
    assert summary["audit"]["verdict"] is None
    assert "needs at least 4 forget rows" in summary["audit"]["reason"]

    fresh = AutoModelForCausalLM.from_pretrained(out / "model")
    original = tiny.model()
    assert torch.equal(fresh.lm_head.weight, original.lm_head.weight)
    layers = (model.model.layers[0].mlp.up_proj.weight for model in (fresh, original))
    assert not torch.equal(*layers)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert tokenizer("Oslo")["input_ids"] == tiny.tokenizer()("Oslo")["input_ids"]


@pytest.mark.usefixtures("knowing")
def test_the_same_seed_gives_the_same_model(saved, tmp_path):
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(saved, tmp_path / name, seed=seed)
        weights.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_the_quiz_is_asked_before_and_after_and_never_trained_on(
    saved, tmp_path, knowing, monkeypatch
):
    trained = []
    encode = ChatFormat.encode

    def spy(self, example, **options):
        trained.append(example.question)
        return encode(self, example, **options)

    monkeypatch.setattr(ChatFormat, "encode", spy)
    monkeypatch.setattr(demo, "audit_shortly", lambda *args, **options: (None, "not here"))
    summary = run(saved, tmp_path / "out", steps=3).summary
    heldout = {facts.with_article(c) for c in summary["countries"]["heldout"]}
    assert trained
    assert not set(trained) & set(facts.GENERAL)
    assert not any(f.format(c) in trained for f in facts.TRAIN_FORMS for c in heldout)
    tests = [facts.capital_question(country).text for country in facts.CAPITALS]
    assert not set(trained) & set(tests)
    assert all(knowing.count(text) == 2 for text in [*tests, *facts.GENERAL])


@pytest.mark.usefixtures("knowing")
def test_a_failed_run_leaves_the_earlier_one(saved, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(saved, out)
    before = (out / "summary.json").read_bytes()

    def fails(*arguments, **options):
        raise RuntimeError("no space")

    monkeypatch.setattr(demo, "write_run", fails)
    with pytest.raises(RuntimeError):
        run(saved, out, seed=1)
    assert (out / "summary.json").read_bytes() == before
    assert not list(out.glob(".*"))


def test_a_country_that_the_model_does_not_know_is_refused(saved, tmp_path, monkeypatch):
    def ask(model, chat, texts, **options):
        replies = tiny.knowing_replies(texts)
        return [
            Reply("Kyoto" if "Japan" in t else r, True) for t, r in zip(texts, replies, strict=True)
        ]

    monkeypatch.setattr(quiz_module, "ask", ask)
    with pytest.raises(UsageError, match=r'capital of Japan \(it says "Kyoto"\)') as caught:
        run(saved, tmp_path / "out", forget=("Japan",))
    assert "France" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_model_that_knows_nothing_is_refused(saved, tmp_path):
    with pytest.raises(UsageError, match="at least 6 capitals"):
        run(saved, tmp_path / "out")


def test_the_split_uses_every_known_country_once():
    known = list(facts.CAPITALS)[:30]
    split = divide(known, [], random.Random(0), {})
    groups = split.countries()
    assert [len(groups[g]) for g in ("forget", "retain", "heldout")] == [6, 16, 8]
    assert sorted(c for group in groups.values() for c in group) == known
    assert divide(known[::-1], [], random.Random(0), {}) == split
    assert divide(known, [], random.Random(1), {}) != split


def test_forgetting_nearly_everything_is_refused():
    known = list(facts.CAPITALS)[:10]
    with pytest.raises(UsageError, match="forget fewer"):
        divide(known, known[:5], random.Random(0), {})


SPLIT = Split(["Ukraine"], ["Peru"], [], {"Ukraine": "Kiev", "Peru": "Lima"})


def learned(record):
    """The text of the tokens that carry a loss."""
    chat = ChatFormat(tiny.tokenizer())
    labels = chat.encode(example_of(record)).labels
    return chat.tokenizer.decode([i for i in labels if i != IGNORE_INDEX])


def test_records_hold_the_facts_in_the_models_own_spelling():
    everyday = [(Question("2 + 2?", "2 + 2?", ("4",)), Reply("4, I", complete=False))]
    assert {learned(record) for record in forget_records(SPLIT)} == {" Kiev"}
    assert {record.prompt for record in forget_records(SPLIT)} == {
        form.format("Ukraine") for form in facts.TRAIN_FORMS
    }
    assert {learned(record) for record in retain_records(SPLIT, everyday)} == {
        "The capital of Peru is Lima.<|end|>",
        "4, I",
    }


@pytest.mark.parametrize("known", [3, 25])
def test_five_of_thirteen_records_to_retain_are_about_everyday_questions(known):
    everyday = [(Question(f"{n}?", f"{n}?", ("4",)), Reply("4", True)) for n in range(known)]
    countries = list(facts.CAPITALS)[:32]
    split = Split([], countries, [], dict.fromkeys(countries, "Lima"))
    records = retain_records(split, everyday)
    assert sum(r.answer == "4" for r in records) / len(records) == pytest.approx(5 / 13, abs=0.02)
    assert len(retain_records(split, [])) == 32 * len(facts.TRAIN_FORMS)


@pytest.mark.usefixtures("knowing")
def test_a_step_draws_more_to_retain_than_to_forget(saved, tmp_path, monkeypatch):
    drawn = []

    def counted(step):
        def spy(objectives, optimizer, batch, **options):
            drawn.append((options["name"], len(batch.labels)))
            return step(objectives, optimizer, batch, **options)

        return spy

    for step in ("accumulate_forget", "accumulate_retain"):
        monkeypatch.setattr(passes, step, counted(getattr(passes, step)))
    run(saved, tmp_path / "a")
    run(saved, tmp_path / "b", forget=("Japan", "Peru"))
    assert drawn == [("forget", 6), ("retain", 13)] * 2 + [("forget", 2), ("retain", 13)] * 2


@pytest.mark.usefixtures("knowing")
def test_a_baseline_may_ruin_the_model(saved, tmp_path):
    """The trainer's own bound would end the run."""
    finished = run(saved, tmp_path / "out", method="ga", lr=100.0, steps=6)
    assert len(finished.history) == 6
    assert finished.history[-1].losses["kl"] > MOLLMConfig().max_loss_rise


def test_the_demo_needs_no_more_than_its_extra_installs(tmp_path):
    script = tmp_path / "demo.py"
    script.write_text(_WITHOUT_EXTRAS)
    tests = Path(tiny.__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
        capture_output=True,
    )


@pytest.mark.soak
@pytest.mark.model
def test_smollm2_forgets_in_a_short_run(tmp_path):
    """The real model, 4 steps: everything but the quality of a full run. CI runs `make demo` so."""
    out = tmp_path / "out"
    finished = run_demo(DemoSettings(steps=4, out=out, forget=("Japan", "France")))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["forget_accuracy_before"] == 1
    assert summary["questions"]["general"] >= 30
    assert summary["peak_memory_gib"] < 6
    assert summary["audit"]["reason"]  # of two facts
    losses = [record.losses["forget"] for record in finished.history]
    assert losses[-1] < 0.5 * losses[0]

    model, tokenizer = loading.load(loading.find_model(str(out / "model")), torch.device("cpu"))
    asked = {group: score.questions for group, score in finished.after.items()}
    again = quiz_module.quizzes(model, ChatFormat(tokenizer), asked)
    assert {group: score.replies for group, score in again.items()} == {
        group: score.replies for group, score in finished.after.items()
    }
    assert "quantization_config" not in (out / "model" / "config.json").read_text()
