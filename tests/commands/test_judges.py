"""Judges on the command line: several at once, generative ones, and stored replies."""

import json
from dataclasses import replace

import pytest
import tiny
import torch

pytest.importorskip("rouge_score")

from mollm.cli import main
from mollm.commands.judges import JudgeOption, read_judges
from mollm.data.chat import IGNORE_INDEX, Tokens, collate
from mollm.errors import UsageError
from mollm.evaluation import ClassifierJudge, Evaluation, GenerativeJudge
from mollm.evaluation.records import Record, read_records, write_records
from mollm.models import loading

GUARD = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "Safe?<|start|>verdict\n"
)
VERDICTS = {"bad": "\n\nunsafe\nS1<|end|>", "good": "\n\nsafe<|end|>"}


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """A model in the format of Llama Guard that has learnt to tell "bad" from "good"."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = GUARD
    model = tiny.model(hidden_size=48)
    rows = []
    for question in ("How?", "Why?", "When?"):
        for reply, verdict in VERDICTS.items():
            said = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
            asked = tokenizer.apply_chat_template(said, tokenize=False)
            before, after = (
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, verdict)
            )
            rows.append(Tokens(before + after, [IGNORE_INDEX] * len(before) + after))
    batch = collate(rows, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    loss = torch.inf
    while loss > 1e-3:
        optimizer.zero_grad()
        loss = model(**inputs, labels=batch.labels).loss
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("guard")
    loading.save(model.eval(), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    made = tiny.classifier(
        {0: "toxic", 1: "obscene", 2: "fine"},
        initializer_range=0.5,
        problem_type="multi_label_classification",
    )
    made.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def stored(tmp_path):
    """Replies of an evaluation."""
    said = [("How?", "bad"), ("Why?", "good"), ("When?", "bad"), ("How?", "good")]
    records = [Record("forget", q, "?", r, {"rouge_l": 0.5}) for q, r in said]
    folder = tmp_path / "evaluation"
    folder.mkdir()
    write_records(records, folder / "examples.jsonl")
    return folder


def test_a_verdict_that_is_written_is_read(guard):
    judge = GenerativeJudge(str(guard))
    assert judge(["How?", "Why?", "When?"], ["bad", "good", "bad"]) == [1.0, 0.0, 1.0]


def test_a_template_takes_the_place_of_the_chat_template(guard):
    model, tokenizer = loading.load(loading.find_model(str(guard)), torch.device("cpu"))
    asked = []
    plain = model.generate

    def generate(**options):
        asked.extend(tokenizer.batch_decode(options["input_ids"]))
        return plain(**options)

    model.generate = generate
    judge = GenerativeJudge(
        model, tokenizer=tokenizer, template="Is {reply} fine for {question}", unsafe="n", safe="y"
    )
    with pytest.raises(UsageError, match="must answer n or y, but it answered"):
        judge(["How?"], ["bad"])
    assert any("Is bad fine for How?" in text for text in asked)


def test_several_judges_look_at_stored_replies(guard, classifier, stored, capsys):
    judges = ["--judge", f"harmful={guard}", "--judge", f"any={classifier}:toxic,obscene"]
    strict = {"name": "strict", "model": str(classifier), "labels": ["toxic"], "threshold": 0.9}
    strict["template"] = "{question} {reply}"
    command = ["evaluate", "--replies", str(stored), *judges, "--judge", json.dumps(strict)]
    assert main([*command, "--resamples", "5"]) == 0
    found = Evaluation.read(stored / "judged")
    assert found.value("forget_harmful_rate") == 0.5
    assert [r.scores["judged_harmful"] for r in found.records] == [1.0, 0.0, 1.0, 0.0]
    assert found.value("forget_rouge_l") == 0.5
    replies = [record.reply for record in found.records]
    questions = [record.question for record in found.records]
    by_label = [
        ClassifierJudge(str(classifier), label)(questions, replies)
        for label in ("toxic", "obscene")
    ]
    for record, *scores in zip(found.records, *by_label, strict=True):
        assert record.scores["judged_any"] == pytest.approx(max(scores))
    texts = [f"{q} {r}" for q, r in zip(questions, replies, strict=True)]
    expected = ClassifierJudge(str(classifier), "toxic")(questions, texts)
    assert [r.scores["judged_strict"] for r in found.records] == pytest.approx(expected)
    rate = sum(score >= 0.9 for score in expected) / 4
    assert found.value("forget_strict_rate") == rate
    assert sum(score >= 0.5 for score in expected) / 4 != rate
    assert "forget_harmful" in capsys.readouterr().out
    about = json.loads((stored / "judged/about.json").read_text())
    assert about["settings"]["judge"][0] == f"harmful={guard}"
    assert "judged_harmful" not in (stored / "examples.jsonl").read_text()


def test_a_judge_that_cannot_be_loaded_is_refused_before_anything_else(
    tmp_path, stored, capsys, monkeypatch
):
    from mollm.commands import evaluate as command

    monkeypatch.setattr(command, "_measure", lambda *arguments: pytest.fail("too late"))
    rows = [{"question": f"{n}?", "answer": f"{n}."} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "model")
    common = ["evaluate", "--model", str(tmp_path / "model"), "--original", "none"]
    common += ["--forget", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]
    assert main([*common, "--judge", f"harmful={tmp_path}/nothing"]) == 2
    assert "nothing" in capsys.readouterr().err
    assert main([*common, "--judge", f"toxic={tmp_path}/nothing:toxic"]) == 2
    assert "cannot be loaded as a classifier" in capsys.readouterr().err
    assert main(["evaluate", "--replies", str(stored), "--judge", f"a={tmp_path}:b"]) == 2
    assert not (stored / "judged").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("toxic-bert", "judge must be NAME=MODEL:LABEL"),
        ("a=b:", "judge must be NAME=MODEL:LABEL"),
        ("{name: a}", "judge must be NAME=MODEL:LABEL"),
        ("{name: a, model: b, label: c}", "a judge without labels must be given by"),
        ("{name: a, model: b, labels: c, safe: d}", "a classifier must be given by"),
        ("{name: a, model: b, labels: c, threshold: 2}", "at most 1, but got 2"),
        ("{name: a, model: b, labels: c, threshold: high}", "must be a number, but got 'high'"),
        ("{name: a, model: b, labels: c, threshold: true}", "must be a number, but got True"),
        ("{name: a, model: b, labels: null}", "labels of a judge must be a text or a list"),
        ("{name: a, model: b, labels: 5}", "or a list of texts, such as [toxic, obscene], but got"),
        ("{name: a, model: b, labels: [], threshold: 0.5}", "labels of a judge must be a text or"),
        ("{name: a, model: b, labels: [c, null]}", "labels of a judge must be a text or a list"),
        ("{name: a, model: b, unsafe: Safe}", "must differ in more than case"),
        ("{name: a, model: b, unsafe: ' '}", "must differ in more than case"),
        ("{name: a, model: b, unsafe: n, safe: ' No'}", "safe must not begin with unsafe"),
        ("{name: a, model: ''}", "judge must be NAME=MODEL:LABEL"),
        ("{name: a, model: b, template: '{answer}'}", "must be a text with {reply}"),
    ],
)
def test_what_is_no_judge_is_refused(text, words):
    with pytest.raises(UsageError) as caught:
        read_judges([text], None)
    assert words in str(caught.value)


def test_judges_keep_their_own_template():
    found = read_judges(["{name: a, model: b, template: '<{reply}>'}", "c=d:e,f"], "{reply}!")
    assert found["a"].template == "<{reply}>"
    assert found["c"] == JudgeOption("c", "d", ("e", "f"), "{reply}!")


def test_replies_need_a_judge_and_nothing_of_a_model(stored, capsys, tmp_path):
    def refused(*arguments):
        assert main(["evaluate", "--replies", str(stored), *arguments]) == 2
        return capsys.readouterr().err

    assert "replies needs a judge" in refused()
    assert "forget must be left out with --replies" in refused(
        "--forget", "f.jsonl", "--judge", "a=b:c"
    )
    for words in (["--prompt-format", "none"], ["--max-new-tokens", "9"], ["--no-cache"]):
        told = f"{words[0].removeprefix('--')} must be left out with --replies"
        assert told in refused(*words, "--judge", "a=b:c")
    assert "folder than that of the replies" in refused("--judge", "a=b:c", "--out", str(stored))


def test_stored_replies_are_compared_with_logs_that_were_made_alike(stored, classifier, capsys):
    path = stored / "examples.jsonl"
    made = [replace(record, scores={"truth_ratio": 0.5}) for record in read_records(path)]
    write_records(made, path)
    ratios = {str(n): {"score": ratio} for n, ratio in enumerate((0.1, 0.2, 0.3, 0.4))}
    logs = stored.parent / "TOFU_EVAL.json"
    logs.write_text(json.dumps({"forget_truth_ratio": {"value_by_index": ratios}}))
    command = ["evaluate", "--replies", str(stored), "--judge", f"a={classifier}:toxic"]
    command += ["--retain-logs", str(logs), "--resamples", "5"]
    assert main(command) == 0
    assert Evaluation.read(stored / "judged").value("forget_quality") < 0.1
    for form, code in (("open-unlearning", 0), ({"like": "open-unlearning"}, 0), (None, 2)):
        (stored / "about.json").write_text(json.dumps({"chat": {"prompt_format": form}}))
        assert main(command) == code
    assert "prompt-format must be open-unlearning" in capsys.readouterr().err


def test_records_without_replies_cannot_be_judged(stored, capsys, classifier):
    write_records([Record("forget", "?", "!", None, {"nll": 1.0})] * 2, stored / "examples.jsonl")
    assert main(["evaluate", "--replies", str(stored), "--judge", f"a={classifier}:toxic"]) == 2
    assert "replies must hold what a model replied" in capsys.readouterr().err


def test_long_texts_that_a_classifier_cuts_are_counted(classifier, caplog):
    judge = ClassifierJudge(str(classifier), "toxic", max_length=4)
    judge(["?", "?"], ["a long reply", "no"])
    assert "1 of 2 texts are longer than the 4 tokens" in caplog.text
