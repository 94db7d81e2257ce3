import math

import pytest
import tiny
import torch

from mollm.errors import UsageError
from mollm.evaluation.judges import ClassifierJudge, judge_replies

QUESTIONS = ["How?", "Why is it so?", "When?"]
REPLIES = ["so", "because of the rather long story", "never"]
LABELS = {0: "toxic", 1: "obscene", 2: "fine"}


def classifier(labels=None, **options):
    return tiny.classifier(labels or LABELS, initializer_range=0.5, **options).double()


def logits_of(model, text):
    ids = torch.tensor([tiny.tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits[0].double().tolist()


def test_one_label_of_many_is_a_softmax():
    model = classifier()
    judge = ClassifierJudge(model, "obscene", tokenizer=tiny.tokenizer(), batch_size=2)
    for reply, score in zip(REPLIES, judge(QUESTIONS, REPLIES), strict=True):
        weights = [math.exp(z) for z in logits_of(model, reply)]
        assert score == pytest.approx(weights[1] / sum(weights), rel=1e-9)


@pytest.mark.parametrize(
    ("labels", "kind"), [(LABELS, "multi_label_classification"), ({0: "toxic"}, None)]
)
def test_labels_that_do_not_exclude_each_other_are_sigmoids(labels, kind):
    model = classifier(labels, problem_type=kind).train()
    judge = ClassifierJudge(model, "toxic", tokenizer=tiny.tokenizer())
    scores = judge(QUESTIONS, REPLIES)
    assert model.training
    for reply, score in zip(REPLIES, scores, strict=True):
        assert score == pytest.approx(1 / (1 + math.exp(-logits_of(model, reply)[0])), rel=1e-9)


def test_a_template_shows_the_question_too():
    model = classifier()
    template = "Q: {question} A: {reply}"
    judge = ClassifierJudge(model, "toxic", tokenizer=tiny.tokenizer(), template=template)
    (score,) = judge(["How?"], ["so"])
    weights = [math.exp(z) for z in logits_of(model, "Q: How? A: so")]
    assert score == pytest.approx(weights[0] / sum(weights), rel=1e-9)


def test_a_judge_loads_from_a_folder(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    loaded = ClassifierJudge(str(tmp_path), "toxic")
    given = ClassifierJudge(model, "toxic", tokenizer=tiny.tokenizer())
    assert loaded(QUESTIONS, REPLIES) == pytest.approx(given(QUESTIONS, REPLIES), rel=1e-9)


def test_without_a_padding_token_replies_are_judged_one_by_one():
    model = classifier()
    expected = ClassifierJudge(model, "toxic", tokenizer=tiny.tokenizer())(QUESTIONS, REPLIES)
    model.config.pad_token_id = None
    found = ClassifierJudge(model, "toxic", tokenizer=tiny.tokenizer())(QUESTIONS, REPLIES)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("pads", [True, False], ids=["padded", "one by one"])
@pytest.mark.parametrize("replies", [["", ""], ["no, never", ""]])
def test_a_reply_without_a_token_is_judged_as_a_space_in_whatever_company(pads, replies):
    model = classifier()
    if not pads:
        model.config.pad_token_id = None
    judge = ClassifierJudge(model, "toxic", tokenizer=tiny.tokenizer())
    space = torch.tensor(logits_of(model, " ")).softmax(-1)[judge.indices[0]]
    assert judge(["Who?"] * 2, replies)[1] == pytest.approx(float(space), abs=1e-6)


def test_a_pickled_judge_and_code_of_its_own_are_refused(tmp_path, monkeypatch):
    model = classifier()
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"cannot be loaded as a classifier: .*safetensors"):
        ClassifierJudge(str(tmp_path), "toxic")
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "o.C"}}'
    )
    (tmp_path / "o.py").write_text("from transformers import LlamaConfig as C\n")
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asks"))
    with pytest.raises(UsageError, match="contains custom code"):
        ClassifierJudge(str(tmp_path), "toxic")


def test_mistakes_are_told(tmp_path):
    with pytest.raises(UsageError, match="toxic, obscene, fine, but got 'rude'"):
        ClassifierJudge(classifier(), "rude", tokenizer=tiny.tokenizer())
    with pytest.raises(UsageError, match="needs its tokenizer"):
        ClassifierJudge(classifier(), "toxic")
    with pytest.raises(UsageError, match="is a regression"):
        regression = classifier({0: "toxic"}, problem_type="regression")
        ClassifierJudge(regression, "toxic", tokenizer=tiny.tokenizer())
    with pytest.raises(UsageError, match="cannot be loaded as a classifier"):
        ClassifierJudge(str(tmp_path), "toxic")


def test_a_model_without_a_trained_head_is_no_judge(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has no trained classification head"):
        ClassifierJudge(str(tmp_path), "LABEL_0")


def test_any_function_can_judge():
    def judge(questions, replies):
        return [len(reply) / 100 for reply in replies]

    assert judge_replies(judge, "length", QUESTIONS, REPLIES) == [0.02, 0.32, 0.05]
    with pytest.raises(UsageError, match="judge few must give one score per reply, but gave 1"):
        judge_replies(lambda questions, replies: [0.5], "few", QUESTIONS, REPLIES)
    for bad in (-0.1, 1.5, math.nan):
        with pytest.raises(UsageError, match=f"between 0 and 1, but gave {bad}"):
            judge_replies(lambda questions, replies, b=bad: [b] * 3, "far", QUESTIONS, REPLIES)


def test_a_template_with_other_fields_is_refused():
    for template in ("{answer}", "{}", "{reply", "{reply[x]}", "{question}"):
        with pytest.raises(UsageError, match=r"with \{reply\}, and no other field but .*, but got"):
            ClassifierJudge(classifier(), "toxic", tokenizer=tiny.tokenizer(), template=template)
