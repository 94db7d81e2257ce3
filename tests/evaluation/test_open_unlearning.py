"""Figures as open-unlearning has them, against plain code that follows its definitions.

The golden values are computed here, from the tokenizer and the model alone: tokens by
`apply_chat_template` or by tags, a mask that is 0 for every id that equals padding, a forward pass
of the whole batch, and a call of `generate`.
"""

import json
import math
import zlib

import chat_templates
import pytest
import tiny
import torch
from counted_metrics import longest_common
from nltk.stem.porter import PorterStemmer

from mollm.data.chat import ChatFormat, Example
from mollm.errors import UsageError
from mollm.evaluation import Row, Suite, evaluate, load_suite

QUESTIONS = ("Where was Ilvane Torsk born?", "What did she write?", "When was it?")
ANSWERS = ("She was born in Merrow Quay.", "A novel of the sea.", "In 1950, in spring.")
WRONG = (("She was born in Oslo.", "In Rome."), ("A play.", "Songs."), ("In 1800.", "Never."))
SYSTEM, DATE = "You are a helpful assistant.", "10 Apr 2025"


def rows(start=0):
    turned = [*range(start, 3), *range(start)]
    return [
        Row(QUESTIONS[i], ANSWERS[j], f"{ANSWERS[j]} Yes.", WRONG[j])
        for i, j in zip(range(3), turned, strict=True)
    ]


def padded_as_end():
    """ChatML, where padding is the token that ends a turn: both prompts have masked tokens."""
    return tiny.tokenizer(), None, {}


def dated():
    tokenizer = chat_templates.make("llama 3")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, None, {"date_string": DATE}


def tagged():
    return tiny.tokenizer(template=False, bos=True), ("Question: ", "\nAnswer: "), {}


def instructed():
    tokenizer = tiny.tokenizer(bos=True)
    return tokenizer, ("[INST] ", " [/INST]"), {}


FORMATS = {
    "padded_as_end": "open-unlearning",
    "dated": "open-unlearning",
    "tagged": "open-unlearning",
    "instructed": {
        "like": "open-unlearning",
        "template": "[INST] {question} [/INST]{answer}",
    },
}
CONFIGURATIONS = [padded_as_end, dated, tagged, instructed]


class Golden:
    """open-unlearning's definitions for one configuration."""

    def __init__(self, model, tokenizer, tags, options):
        self.model, self.tokenizer, self.tags, self.options = model, tokenizer, tags, options
        pad = tokenizer.pad_token_id
        self.pad = tokenizer.eos_token_id if pad is None else pad

    def ids(self, question, answer):
        """Of the prompt, and of the whole row."""
        if self.tags is not None:
            asked = self.tags[0] + question + self.tags[1]
            prompt = self.tokenizer(asked)["input_ids"]
            whole = self.tokenizer(asked + answer)["input_ids"]
        else:
            said = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
            answered = [*said, {"role": "assistant", "content": answer}]
            made = {"tokenize": True, "return_dict": False, **self.options}
            prompt = self.tokenizer.apply_chat_template(said, add_generation_prompt=True, **made)
            whole = self.tokenizer.apply_chat_template(answered, **made)
        end = self.tokenizer.eos_token_id
        return list(prompt), list(whole) + ([] if whole[-1] == end else [end])

    def batch(self, items):
        """Log-probabilities of the labels of each item, the whole batch in one pass."""
        made = [self.ids(*item) for item in items]
        width = max(len(whole) for _, whole in made)
        ids = torch.tensor([whole + [self.pad] * (width - len(whole)) for _, whole in made])
        with torch.no_grad():
            logits = self.model(input_ids=ids, attention_mask=ids.ne(self.pad)).logits
        logs = logits.double().log_softmax(-1)
        found = []
        for i, (prompt, whole) in enumerate(made):
            places = range(len(prompt), len(whole))
            found.append([(whole[t], logs[i, t - 1]) for t in places])
        return found

    def losses(self, items):
        return [-sum(float(d[t]) for t, d in tokens) / len(tokens) for tokens in self.batch(items)]

    def ratios(self, members):
        right = self.losses([(r.question, r.paraphrased_answer) for r in members])
        wrong = [
            self.losses([(r.question, r.perturbed_answers[k]) for r in members]) for k in (0, 1)
        ]
        return [
            math.exp(-(a + b) / 2) / (math.exp(-c) + 1e-10)
            for c, a, b in zip(right, *wrong, strict=True)
        ]

    def min_k(self, members):
        found = []
        for tokens in self.batch([(r.question, r.answer) for r in members]):
            logs = sorted(float(d[t]) for t, d in tokens[:-1])
            lowest = logs[: max(1, int(0.4 * len(logs)))]
            found.append(-sum(lowest) / len(lowest))
        return found

    def zlib(self, members):
        losses = self.losses([(r.question, r.answer) for r in members])
        texts = []
        for row in members:
            prompt, whole = self.ids(row.question, row.answer)
            texts.append(self.tokenizer.decode(whole[len(prompt) :], skip_special_tokens=True))
        sizes = [len(zlib.compress(text.encode())) for text in texts]
        return [loss / size for loss, size in zip(losses, sizes, strict=True)]

    def rouge(self, members, limit):
        scores = []
        prompts = [self.ids(row.question, row.answer)[0] for row in members]
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(p)) + p for p in prompts])
        written = self.model.generate(
            input_ids=ids,
            attention_mask=ids.ne(self.pad),
            max_new_tokens=limit,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        replies = self.tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        for reply, row in zip(replies, members, strict=True):
            scores.append(recall(reply.strip(), row.answer))
        return scores


def recall(reply, answer):
    def stems(text):
        words = "".join(
            c if c in "abcdefghijklmnopqrstuvwxyz0123456789" else " " for c in text.lower()
        )
        return [PorterStemmer().stem(word) if len(word) > 3 else word for word in words.split()]

    return longest_common(stems(answer), stems(reply)) / len(stems(answer))


def average(values):
    values = list(values)
    return sum(values) / len(values)


def auc(forget, holdout):
    return average((h > f) + 0.5 * (h == f) for f in forget for h in holdout)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_figures_are_those_of_open_unlearning(configuration):
    tokenizer, tags, options = configuration()
    model = tiny.model(seed=2, vocab_size=len(tokenizer), initializer_range=0.25)
    suite = Suite(forget=rows(), holdout=rows(1))
    names = ["forget_probability", "forget_truth_ratio", "forget_rouge_l", "exact_memorization"]
    names += ["extraction_strength", "mia_loss", "mia_min_k", "mia_zlib"]
    found = evaluate(
        model,
        tokenizer,
        suite,
        names=names,
        prompt_format=FORMATS[configuration.__name__],
        resamples=2,
        max_new_tokens=12,
    )
    golden = Golden(model, tokenizer, tags, options)
    pairs = [(row.question, row.answer) for row in suite.forget]
    held = [(row.question, row.answer) for row in suite.holdout]
    hits = [[int(d.argmax()) == t for t, d in tokens[:-1]] for tokens in golden.batch(pairs)]
    wrong = [max((k + 1 for k, hit in enumerate(h) if not hit), default=0) for h in hits]
    expected = {
        "forget_probability": average(math.exp(-loss) for loss in golden.losses(pairs)),
        "forget_truth_ratio": average(min(r, 1 / (r + 1e-10)) for r in golden.ratios(suite.forget)),
        "forget_rouge_l": average(golden.rouge(suite.forget, 12)),
        "exact_memorization": average(average(each) for each in hits),
        "extraction_strength": average(
            1 - min(k, len(h) - 1) / len(h) for k, h in zip(wrong, hits, strict=True)
        ),
        "mia_loss": auc(golden.losses(pairs), golden.losses(held)),
        "mia_min_k": auc(golden.min_k(suite.forget), golden.min_k(suite.holdout)),
        "mia_zlib": auc(golden.zlib(suite.forget), golden.zlib(suite.holdout)),
    }
    for name, value in expected.items():
        assert found.value(name) == pytest.approx(value, abs=1e-4), name
    for record, z, k in zip(
        found.records, golden.zlib(suite.forget), golden.min_k(suite.forget), strict=False
    ):
        assert record.scores["zlib"] == pytest.approx(z, rel=1e-4)
        assert record.scores["min_k"] == pytest.approx(k, rel=1e-4)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_rows_and_prompts_are_its_tokens(configuration):
    tokenizer, tags, options = configuration()
    chat = ChatFormat(tokenizer, prompt_format=FORMATS[configuration.__name__])
    golden = Golden(None, tokenizer, tags, options)
    prompt, whole = golden.ids(QUESTIONS[0], ANSWERS[0])
    (row, asked) = (chat.encode(rows()[0].example(ANSWERS[0])), chat.encode_prompt(QUESTIONS[0]))
    assert (row.ids, asked.ids) == (whole, prompt)
    assert row.labels == [-100] * len(prompt) + whole[len(prompt) :]
    assert row.attention == [int(token != golden.pad) for token in whole]
    if configuration is not tagged and configuration is not instructed:
        assert 0 in asked.attention  # the end of a turn, which is padding too


def test_every_prompt_is_a_question_to_it():
    chat = ChatFormat(tiny.tokenizer(template=False), prompt_format="open-unlearning")
    asked = Example("Once upon", " a time.", is_question=False)
    assert not chat.is_plain(asked)
    assert chat.tokenizer.decode(chat.encode_prompt(asked).ids).startswith("Question: Once upon")


def test_the_default_differs_where_tokens_do():
    """Else the mode would have nothing to show."""
    tokenizer, model = tiny.tokenizer(), tiny.model(seed=2, initializer_range=0.25)
    values = [
        evaluate(
            model,
            tokenizer,
            Suite(forget=rows()),
            names=["forget_probability"],
            prompt_format=form,
            resamples=2,
        ).value("forget_probability")
        for form in (None, "open-unlearning")
    ]
    assert abs(values[0] / values[1] - 1) > 1e-3


def eval_json(path, ratios, questions=QUESTIONS):
    found = {
        "forget_truth_ratio": {
            "agg_value": 0.5,
            "value_by_index": {str(i): {"score": r} for i, r in enumerate(ratios)},
        },
        "forget_Q_A_ROUGE": {
            "agg_value": 0.1,
            "value_by_index": {
                str(i): {"rougeL_recall": 0.1, "input": f"user\n{q}assistant\n"}
                for i, q in enumerate(questions)
            },
        },
        "mia_min_k": {
            name: {"value_by_index": {str(i): {"score": s + i} for i in range(3)}}
            for name, s in (("forget", 1.0), ("holdout", 1.5))
        },
    }
    path.write_text(json.dumps(found))
    return path


def test_its_results_are_taken_as_retain_logs(tmp_path):
    data = tmp_path / "rows.jsonl"
    made = [
        {"question": r.question, "answer": r.answer, "perturbed_answer": list(r.perturbed_answers)}
        for r in rows()
    ]
    data.write_text("\n".join(map(json.dumps, made)))
    file = eval_json(tmp_path / "TOFU_EVAL.json", [0.5, 1.0, 2.0])
    suite = load_suite(data, holdout=data, retain_logs=tmp_path)
    assert [r.scores["truth_ratio"] for r in suite.retain_logs[:3]] == [0.5, 1.0, 2.0]
    assert [r.scores["min_k"] for r in suite.retain_logs] == [1.0, 2.0, 3.0, 1.5, 2.5, 3.5]
    assert load_suite(data, holdout=data, retain_logs=file).retain_logs == suite.retain_logs
    names = ["forget_quality", "privleak"]
    found = evaluate(tiny.model(), tiny.tokenizer(), suite, names=names, resamples=2)
    own = auc(
        [r.scores["min_k"] for r in found.records[:3]],
        [r.scores["min_k"] for r in found.records[3:]],
    )
    reference = 1 - auc([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    expected = 100 * ((1 - own) - reference) / (reference + 1e-10)
    assert found.value("privleak") == pytest.approx(expected, abs=1e-6)
    assert 0 <= found.value("forget_quality") <= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ratios": [0.5, 1.0]}, "is about 2, and the set holds 3"),
        ({"questions": QUESTIONS[::-1]}, "must be about the same forget questions"),
    ],
)
def test_results_about_other_rows_are_refused(tmp_path, change, words):
    data = tmp_path / "rows.jsonl"
    made = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    data.write_text("\n".join(map(json.dumps, made)))
    file = eval_json(tmp_path / "TOFU_EVAL.json", **{"ratios": [0.5, 1.0, 2.0], **change})
    with pytest.raises(UsageError, match=words):
        load_suite(data, retain_logs=file)
    file.write_text("{}")
    with pytest.raises(UsageError, match=r"must be a TOFU_EVAL\.json of open-unlearning"):
        load_suite(data, retain_logs=file)
