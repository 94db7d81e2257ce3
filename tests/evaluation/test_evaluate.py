"""`evaluate` from end to end on a tiny model, against plain loops over its logits."""

import dataclasses
import json
import math
import random
import re
import subprocess
import sys
import zlib

import pytest
import tiny
import torch
from counted_metrics import exact_ks_p_value, longest_common
from nltk.stem.porter import PorterStemmer
from tokenizers import normalizers

from mollm.cli import main
from mollm.data.chat import IGNORE_INDEX, ChatFormat, Example
from mollm.data.files import sample_path
from mollm.errors import UsageError
from mollm.evaluation import (
    Evaluation,
    Record,
    Row,
    Suite,
    evaluate,
    load_suite,
    load_tofu,
    read_records,
    summarize,
)
from mollm.evaluation.generation import Reply, ask
from mollm.evaluation.summary import Estimate
from mollm.models import forward, loading
from mollm.system import precision

GROUPS = ("forget", "retain", "real_authors", "world_facts")
ALL = (*GROUPS, "holdout")
FAST = {"max_new_tokens": 6, "resamples": 20}


def rows(group, count):
    """Rows with different numbers of wrong answers of different lengths."""
    rng = random.Random(group)

    def words(n):
        return " ".join(rng.choice(["red", "Oslo", "a", "novel", "was", "1843"]) for _ in range(n))

    paraphrased = group in ("forget", "retain")
    return tuple(
        Row(
            f"{group} {i}: {words(3)}?",
            words(4 + i),
            words(3) if paraphrased else None,
            () if group == "holdout" else tuple(words(2 + j) for j in range(2 + i % 2)),
        )
        for i in range(count)
    )


def make_suite(**more):
    return Suite(**{group: rows(group, 3) for group in GROUPS}, **more)


@pytest.fixture(scope="module")
def model():
    return tiny.model(initializer_range=0.3).double()


@pytest.fixture(scope="module")
def original():
    return tiny.model(seed=1, initializer_range=0.3).double()


def length_judge(questions, replies):
    return [min(1.0, len(reply) / 12) for reply in replies]


def scripted_replies(model, chat, questions, **_):
    """Some right words, some wrong ones, one that repeats itself, one that says nothing."""
    answers = {row.question: row.answer.split() for group in ALL for row in rows(group, 4)}
    replies = []
    for i, question in enumerate(questions):
        words = answers[question]
        texts = (
            " ".join(["Well,", *words[1::2], "novels"]),
            " ".join(words[:3] * 4).upper(),
            "" if "forget" in question else words[-1],
        )
        replies.append(Reply(texts[i % 3], complete=i % 2 == 0))
    return replies


@pytest.fixture(scope="module")
def full(model, original):
    """Everything there is, by the public function."""
    patch = pytest.MonkeyPatch()
    patch.setattr("mollm.evaluation.examine.generate_replies", scripted_replies)
    holdout = rows("holdout", 4)
    logs = evaluate(original, tiny.tokenizer(), make_suite(holdout=holdout), **FAST).records
    suite = make_suite(holdout=holdout, retain_logs=logs)
    judges = {"length": length_judge}
    evaluation = evaluate(model, tiny.tokenizer(), suite, original=original, judges=judges, **FAST)
    patch.undo()
    return suite, evaluation


# ---- the same figures in plain loops


def token_distributions(model, row):
    """(target, log p over the vocabulary) of each token with a loss."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].double().tolist()
    found = []
    for place in range(1, len(row.ids)):
        if row.labels[place] != IGNORE_INDEX:
            z = logits[place - 1]
            lse = max(z) + math.log(sum(math.exp(x - max(z)) for x in z))
            found.append((row.labels[place], [x - lse for x in z]))
    return found


class Plain:
    """Definitions of open-unlearning, one example and one token at a time."""

    def __init__(self, model):
        self.model = model
        self.chat = ChatFormat(tiny.tokenizer())

    def tokens(self, question, answer, closed=True):
        row = self.chat.encode(Example(question, answer, closed=closed))
        return token_distributions(self.model, row)

    def loss(self, question, answer, closed=True):
        tokens = self.tokens(question, answer, closed)
        return -sum(logs[target] for target, logs in tokens) / len(tokens)

    def truth_ratio(self, row):
        wrong = [self.loss(row.question, text) for text in row.perturbed_answers]
        right = self.loss(row.question, row.paraphrased_answer or row.answer)
        return math.exp(-sum(wrong) / len(wrong)) / (math.exp(-right) + 1e-10)

    def choice(self, row):
        right = math.exp(-self.loss(row.question, row.answer))
        wrong = [math.exp(-self.loss(row.question, text)) for text in row.perturbed_answers]
        return right / (right + sum(wrong) + 1e-10)

    def hits(self, row):
        tokens = self.tokens(row.question, row.answer)[:-1]
        return [logs[target] == max(logs) for target, logs in tokens]

    def min_k(self, row, plus):
        scores = []
        for target, logs in self.tokens(row.question, row.answer)[:-1]:
            mu = sum(math.exp(x) * x for x in logs)
            var = sum(math.exp(x) * x * x for x in logs) - mu * mu
            scores.append((logs[target] - mu) / math.sqrt(var) if plus else logs[target])
        lowest = sorted(scores)[: max(1, int(len(scores) * 0.4))]
        return -sum(lowest) / len(lowest)


def average(values):
    values = list(values)
    return sum(values) / len(values)


def auc(forget, holdout):
    return average((h > f) + 0.5 * (h == f) for f in forget for h in holdout)


def rouge_l(reply, answer):
    def stems(text):
        words = re.findall("[a-z0-9]+", text.lower())
        return [PorterStemmer().stem(word) if len(word) > 3 else word for word in words]

    return longest_common(stems(answer), stems(reply)) / len(stems(answer))


def repetition(text):
    words = text.split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def golden_figures(suite, model, original):
    """Every figure there is, from the logits and the scripted replies."""
    plain, first = Plain(model), Plain(original)
    figures = {}
    for group in GROUPS:
        members = suite.groups()[group]
        replies = scripted_replies(None, None, [row.question for row in members])
        texts = [reply.text for reply in replies]
        ratios = [plain.truth_ratio(row) for row in members]
        if group in ("real_authors", "world_facts"):
            probabilities = [plain.choice(row) for row in members]
        else:
            probabilities = [math.exp(-plain.loss(row.question, row.answer)) for row in members]
        if group == "forget":
            truth = average(min(r, 1 / (r + 1e-10)) for r in ratios)
        else:
            truth = average(max(0, 1 - r) for r in ratios)
        under = [
            first.tokens(row.question, reply.text, closed=reply.complete or not reply.text)
            for row, reply in zip(members, replies, strict=True)
        ]
        lengths = [min(1, len(text) / 12) for text in texts]
        figures |= {
            f"{group}_probability": average(probabilities),
            f"{group}_truth_ratio": truth,
            f"{group}_rouge_l": average(
                rouge_l(text, row.answer) for text, row in zip(texts, members, strict=True)
            ),
            f"{group}_repetition": average(map(repetition, texts)),
            f"{group}_perplexity": math.exp(
                average(-logs[target] for tokens in under for target, logs in tokens)
            ),
            f"{group}_kl": average(kl(plain, first, row) for row in members),
            f"{group}_length": average(lengths),
            f"{group}_length_rate": average(x >= 0.5 for x in lengths),
        }
    hits = [plain.hits(row) for row in suite.forget]
    wrong_until = [max((k + 1 for k, hit in enumerate(h) if not hit), default=0) for h in hits]
    pairs = list(zip(wrong_until, hits, strict=True))
    figures |= {
        "exact_memorization": average(average(each) for each in hits),
        "extraction_strength": average(1 - min(k, len(h) - 1) / len(h) for k, h in pairs),
    }

    def area(score):
        return auc(map(score, suite.forget), [*map(score, suite.holdout)])

    def size(row):
        return len(zlib.compress(row.answer.encode()))

    figures |= {
        "mia_loss": area(lambda row: plain.loss(row.question, row.answer)),
        "mia_zlib": area(lambda row: plain.loss(row.question, row.answer) / size(row)),
        "mia_min_k": area(lambda row: plain.min_k(row, plus=False)),
        "mia_min_k_plus_plus": area(lambda row: plain.min_k(row, plus=True)),
    }
    score = 1 - figures["mia_min_k"]
    reference = 1 - area(lambda row: first.min_k(row, plus=False))
    parts = [
        figures[f"{group}_{part}"]
        for group in GROUPS[1:]
        for part in ("probability", "rouge_l", "truth_ratio")
    ]
    return figures | {
        "privleak": 100 * (score - reference) / (reference + 1e-10),
        "forget_quality": exact_ks_p_value(
            *([each.truth_ratio(row) for row in suite.forget] for each in (plain, first))
        ),
        "model_utility": 9 / sum(1 / part for part in parts),
    }


def kl(plain, first, row):
    """KL(original ‖ model), the mean over the tokens of an answer."""
    pairs = zip(
        plain.tokens(row.question, row.answer),
        first.tokens(row.question, row.answer),
        strict=True,
    )
    return average(
        sum(math.exp(r) * (r - q) for q, r in zip(own, ref, strict=True))
        for (_, own), (_, ref) in pairs
    )


def test_every_figure_is_that_of_plain_loops(full, model, original):
    suite, evaluation = full
    golden = golden_figures(suite, model, original)
    assert not evaluation.missing
    assert set(evaluation.estimates) == set(golden)
    for name, estimate in evaluation.estimates.items():
        assert estimate.value == pytest.approx(golden[name], rel=1e-6, abs=1e-9), name
        assert estimate.low <= estimate.high
        assert math.isfinite(estimate.high - estimate.low)
    settled = [name for name, value in golden.items() if value in (0, 1)]
    assert len(settled) < 4, f"too many figures say nothing: {settled}"


@pytest.mark.parametrize("batch_size", [1, 2, 5, 40])
def test_no_figure_depends_on_the_batch(full, model, original, batch_size):
    suite, _ = full
    judges = {"length": length_judge}
    one, other = (
        evaluate(
            model,
            tiny.tokenizer(),
            suite,
            original=original,
            judges=judges,
            batch_size=size,
            **{**FAST, "resamples": 1},
        )
        for size in (3, batch_size)
    )
    assert [r.reply for r in one.records] == [r.reply for r in other.records]
    for name, estimate in one.estimates.items():
        assert other.value(name) == pytest.approx(estimate.value, rel=1e-6, abs=1e-9), name


def test_replies_are_the_model_s_own(model):
    chat = ChatFormat(tiny.tokenizer())
    suite = make_suite()
    names = [f"{group}_rouge_l" for group in GROUPS]
    found = evaluate(model, tiny.tokenizer(), suite, names=names, **FAST)
    for group in GROUPS:
        replies = ask(
            model, chat, [row.question for row in suite.groups()[group]], max_new_tokens=6
        )
        assert [r.reply for r in found.records if r.group == group] == [r.text for r in replies]


def test_model_utility_by_hand():
    scores = {"retain": "probability", "real_authors": "choice_probability"}
    values = {"retain": (0.9, 0.5, 0.25), "real_authors": (0.6, 0.4, 0.5)}
    values["world_facts"] = (0.3, 0.8, 0.75)
    records = [
        Record(
            group,
            f"{i}?",
            "a",
            "r",
            {
                scores.get(group, "choice_probability"): p + 0.1 * (-1) ** i,
                "rouge_l": rouge,
                "truth_ratio": ratio,
            },
        )
        for group, (p, rouge, ratio) in values.items()
        for i in range(2)
    ]
    found = summarize(records, names=["model_utility"], resamples=10)
    nine = [x for p, rouge, ratio in values.values() for x in (p, rouge, 1 - ratio)]
    assert found.value("model_utility") == pytest.approx(9 / sum(1 / x for x in nine))
    with pytest.raises(UsageError, match="model_utility needs the set retain: give it too"):
        summarize(records[2:], names=["model_utility"])


# ---- what it leaves alone, what it refuses


def test_evaluation_in_training_leaves_no_trace():
    model = tiny.model().train()
    model.model.embed_tokens.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    evaluate(model, tiny.tokenizer(), make_suite(), **FAST)
    after = torch.get_rng_state(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weights[n], w) for n, w in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_forward_pass_is_in_the_dtype_of_the_weights():
    """Also where training would autocast: then alone and in company a row scores the same."""
    model = tiny.model(initializer_range=0.3)
    with precision.computing_in("bfloat16"):
        alone, together = (
            evaluate(model, tiny.tokenizer(), make_suite(), batch_size=size, **FAST)
            for size in (1, 8)
        )
    for one, other in zip(alone.records, together.records, strict=True):
        assert one.reply == other.reply
        assert one.scores == pytest.approx(other.scores, rel=1e-4)


def test_only_what_is_named_is_computed(full, monkeypatch):
    suite, evaluation = full
    monkeypatch.setattr(
        "mollm.evaluation.examine.generate_replies", lambda *a, **o: pytest.fail("not needed")
    )
    names = ["forget_quality", "mia_loss"]
    model = tiny.model(initializer_range=0.3).double()
    found = evaluate(model, tiny.tokenizer(), suite, names=names, resamples=20)
    assert list(found.estimates) == names
    assert {record.group for record in found.records} == {"forget", "holdout"}
    for name in names:
        assert found.value(name) == pytest.approx(evaluation.value(name))
    with pytest.raises(UsageError, match="model_utility was not computed; these were: forget_q"):
        found["model_utility"]


def test_missing_inputs_are_named_and_nothing_is_none(monkeypatch):
    model, tokenizer, suite = tiny.model(), tiny.tokenizer(), make_suite()
    found = evaluate(model, tokenizer, suite, **FAST)
    with pytest.raises(UsageError, match="forget_quality needs the records of a retain-only model"):
        found["forget_quality"]
    with pytest.raises(UsageError, match="privleak needs a holdout set"):
        found.value("privleak")
    with pytest.raises(UsageError, match="forget_kl needs the original model: give"):
        found["forget_kl"]
    assert "not computed: forget_quality: needs the records" in found.table(explain=True)
    assert len([x for x in found.table().splitlines() if x.startswith("not computed")]) == 1
    with pytest.raises(UsageError, match="forget_harmful_rate needs a judge of replies called"):
        found["forget_harmful_rate"]
    judged = evaluate(model, tokenizer, suite, judges={"length": length_judge}, **FAST)
    assert "forget_harmful_rate" not in judged.missing
    monkeypatch.setattr("mollm.evaluation.examine.score_rows", lambda *a, **o: pytest.fail("late"))
    for name in ("forget_quality", "mia_zlib", "retain_perplexity"):
        with pytest.raises(UsageError, match=f"{name} needs "):
            evaluate(model, tokenizer, suite, names=[name])
    with pytest.raises(UsageError, match="but got 'utility'"):
        evaluate(model, tokenizer, suite, names=["utility"])
    with pytest.raises(UsageError, match="at least one figure"):
        evaluate(model, tokenizer, suite, names=[])


def test_logs_of_the_retain_only_model_must_fit(full, monkeypatch):
    suite, evaluation = full
    monkeypatch.setattr("mollm.evaluation.examine.score_rows", lambda *a, **o: pytest.fail("late"))
    others = [record for record in suite.retain_logs if record.question != suite.forget[0].question]
    for logs in (others, suite.retain_logs[::-1]):
        with pytest.raises(UsageError, match="must be about the same forget questions"):
            evaluate(tiny.model(), tiny.tokenizer(), make_suite(retain_logs=logs))
    without = [record for record in suite.retain_logs if record.group != "holdout"]
    with pytest.raises(UsageError, match="from the retain-only model the score min_k of"):
        summarize(evaluation.records, without, names=["privleak"])
    bare = [Record(r.group, r.question, r.answer, None, {}) for r in suite.retain_logs]
    with pytest.raises(UsageError, match="from the retain-only model the score truth_ratio of"):
        summarize(evaluation.records, bare, names=["forget_quality"])


def test_rows_that_the_model_cannot_read_are_refused_before_it_runs(monkeypatch):
    monkeypatch.setattr("mollm.evaluation.examine.score_rows", lambda *a, **o: pytest.fail("late"))
    monkeypatch.setattr(
        "mollm.evaluation.examine.generate_replies", lambda *a, **o: pytest.fail("late")
    )
    suite = make_suite()

    def refused(words, changed, **options):
        given = {**suite.groups(), "retain": (suite.retain[0], changed)}
        model = tiny.model(max_position_embeddings=200)
        with pytest.raises(UsageError, match=words):
            evaluate(model, tiny.tokenizer(), Suite(**given), **{**FAST, **options})

    row = suite.retain[1]
    long = dataclasses.replace(row, perturbed_answers=("no", "x" * 190))
    refused("context of 200 tokens, but 'retain 1: .* takes 2.. with an answer", long)
    refused("they have 300 and 259 tokens", row, original=tiny.model(vocab_size=300))
    empty = dataclasses.replace(row, paraphrased_answer="\u00ad")
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u00ad", "")
    monkeypatch.setattr(tiny, "tokenizer", lambda: tokenizer)
    refused("the set retain must hold a token, but the tokenizer makes none of", empty)


def test_a_tokenizer_without_a_template_is_told_about():
    told = []
    evaluate(
        tiny.model(),
        tiny.tokenizer(template=False),
        make_suite(),
        names=["forget_probability"],
        resamples=2,
        say=told.append,
    )
    assert "has no chat template, so rows with a question are written as" in told[0]


def test_a_judge_may_not_take_a_name_that_is_there():
    with pytest.raises(UsageError, match="forget_probability, as there is one already"):
        judges = {"probability": length_judge}
        evaluate(tiny.model(), tiny.tokenizer(), make_suite(), judges=judges)


def test_suites_need_rows():
    sets = {group: rows(group, 3) for group in GROUPS}
    with pytest.raises(UsageError, match="the set retain must hold at least 2 rows"):
        Suite(**(sets | {"retain": rows("retain", 1)}))
    mixed = (*rows("forget", 2), *rows("holdout", 1))
    with pytest.raises(UsageError, match="of the set forget or none must have perturbed answers"):
        Suite(**(sets | {"forget": mixed}))


def test_a_score_that_is_no_number_is_in_no_mean(full):
    _, evaluation = full
    first = evaluation.records[0]
    broken = Record(first.group, first.question, first.answer, None, first.scores | {"nll": 0.1})
    broken.scores["probability"] = math.nan
    with pytest.raises(UsageError, match="must be finite, but got nan"):
        summarize([broken, *evaluation.records[1:]], names=["forget_probability"])


# ---- files


def test_what_is_written_reads_back_to_the_last_bit(full, tmp_path):
    suite, evaluation = full
    evaluation.write(tmp_path / "out")
    assert Evaluation.read(tmp_path / "out") == evaluation
    assert read_records(tmp_path / "out") == evaluation.records
    assert read_records(tmp_path / "out" / "examples.jsonl") == evaluation.records
    again = summarize(
        read_records(tmp_path / "out"), suite.retain_logs, judges=["length"], resamples=20
    )
    assert again == evaluation


def test_other_files_are_no_evaluation(tmp_path):
    path = tmp_path / "examples.jsonl"
    for text, reason in (
        ("{", "line 1 is malformed JSON at column 2"),
        ("[1]", r"line 1 must hold one JSON object, but got \[1\]"),
        ('\n{"group": "forget"}', "line 2 must be a record of `mollm evaluate`"),
        (
            json.dumps(
                {"group": "f", "question": "", "answer": "", "reply": None, "scores": {"a": "b"}}
            ),
            "line 1 must be a record",
        ),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=reason):
            read_records(tmp_path)
    with pytest.raises(UsageError, match=r"none\.jsonl, which is not on this machine"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match=r"metrics\.json cannot be read"):
        Evaluation.read(tmp_path)
    (tmp_path / "metrics.json").write_text('{"metrics": {"a": {"b": 1}}, "missing": {}}')
    with pytest.raises(UsageError, match=r"its metrics\.json cannot be read"):
        Evaluation.read(tmp_path)


def write_tofu(folder, ending=".jsonl", holdout=True):
    for group in (*GROUPS, "holdout"):
        name = {"forget": "forget10_perturbed", "holdout": "holdout10"}.get(
            group, f"{group}_perturbed"
        )
        if group == "holdout" and not holdout:
            continue
        lines = []
        for row in rows(group, 3):
            fields = {"question": row.question, "answer": row.answer, "other": 1}
            if row.paraphrased_answer:
                fields["paraphrased_answer"] = row.paraphrased_answer
            if row.perturbed_answers:
                fields["perturbed_answer"] = list(row.perturbed_answers)
            lines.append(json.dumps(fields))
        (folder / f"{name}{ending}").write_text("\n".join(lines) + "\n")


def test_tofu_is_read_from_parquet_and_from_the_hub_too(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    expected = make_suite(holdout=rows("holdout", 3))
    write_tofu(tmp_path)
    asked = []

    def on_the_hub(source, config, split):
        asked.append((source, config, split))
        lines = (tmp_path / f"{config}.jsonl").read_text().splitlines()
        return datasets.Dataset.from_list([json.loads(line) for line in lines])

    monkeypatch.setattr("mollm.data.files.load_from_hub", on_the_hub)
    assert load_tofu("locuslab/TOFU") == expected
    assert ("locuslab/TOFU", "forget10_perturbed", "train") in asked
    for path in tmp_path.glob("*.jsonl"):
        on_the_hub("", path.stem, split="").to_parquet(path.with_suffix(".parquet"))
        path.unlink()
    assert load_tofu(tmp_path) == expected


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_the_files_of_tofu_are_read(tmp_path, ending):
    write_tofu(tmp_path, ending)
    assert load_tofu(tmp_path) == make_suite(holdout=rows("holdout", 3))
    few = load_tofu(tmp_path, limit=2)
    assert {len(members) for members in few.groups().values()} == {2}
    (tmp_path / f"holdout10{ending}").unlink()
    assert load_tofu(tmp_path).holdout is None


def test_mistakes_in_the_files_are_told_with_their_place(tmp_path):
    write_tofu(tmp_path)
    with pytest.raises(UsageError, match=r"with forget05_perturbed\.jsonl, but .* has none: take"):
        load_tofu(tmp_path, forget_split="forget05")
    with pytest.raises(UsageError, match="limit must be at least 2, but got 1"):
        load_tofu(tmp_path, limit=1)
    path = tmp_path / "retain_perturbed.jsonl"
    good = path.read_text().splitlines()
    for broken, words in (
        (good[1].replace("paraphrased_answer", "b"), " must have the field paraphrased_answer"),
        (good[1].replace(': ["', ': ["", "'), ": the field perturbed_answer must be a text"),
        ('{"question": "Who?", "answer": "Ada", "perturbed_answer": "Bob"}', ": the field pertur"),
        ('{"question": "Who?", "answer": 3}', ": the field answer must be a text"),
        ('{"question": "Who?"}', " must have the field answer, but it has question"),
    ):
        path.write_text("\n".join([good[0], broken]))
        with pytest.raises(UsageError, match=re.escape(f"{path}, line 2{words}")):
            load_tofu(tmp_path)


def test_the_files_of_a_run_are_a_suite_too(tmp_path):
    """Without wrong answers, without the sets that TOFU has besides."""
    for name in ("forget", "retain"):
        lines = [{"prompt": f"{name} {i}?", "answer": f"{name} {i}."} for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    suite = load_suite(tmp_path / "forget.jsonl", retain=tmp_path / "retain.jsonl", limit=2)
    assert [row.question for row in suite.forget] == ["forget 0?", "forget 1?"]
    judges = {"length": length_judge}
    original = tiny.model(seed=1)
    found = evaluate(
        tiny.model(), tiny.tokenizer(), suite, original=original, judges=judges, **FAST
    )
    figures = ("probability", "rouge_l", "repetition", "perplexity", "kl", "length_rate")
    expected = {f"{group}_{figure}" for group in ("forget", "retain") for figure in figures}
    assert expected | {"exact_memorization"} <= set(found.estimates)
    for figure, words in (
        (
            "forget_truth_ratio",
            "wrong answers: rows with question, answer and perturbed_answer in the",
        ),
        (
            "model_utility",
            "wrong answers: rows with question, answer and perturbed_answer in the set retain",
        ),
        ("world_facts_rouge_l", "the set world_facts: give the files of TOFU as data"),
        ("mia_loss", "a holdout set that no model was trained on: give it as holdout"),
    ):
        assert found.missing[figure].startswith(f"{figure} needs {words}")
    alone = load_suite(tmp_path / "forget.jsonl", holdout=tmp_path / "retain.jsonl")
    found = evaluate(tiny.model(), tiny.tokenizer(), alone, names=["mia_loss"], resamples=5)
    assert 0 <= found.value("mia_loss") <= 1
    with pytest.raises(UsageError, match="retain_kl needs the set retain: give it too"):
        evaluate(tiny.model(), tiny.tokenizer(), alone, names=["retain_kl"])


def test_unsafe_replies_are_to_be_forgotten_and_safe_ones_retained(tmp_path):
    row = {
        "prompt": "How?",
        "response_0": "Like this.",
        "response_1": "I will not say.",
        "is_response_0_safe": False,
        "is_response_1_safe": True,
    }
    path = tmp_path / "pku.jsonl"
    path.write_text("\n".join(json.dumps(row | {"prompt": f"How {i}?"}) for i in range(2)))
    suite = load_suite(path, retain={"path": str(path), "schema": "pku-saferlhf"})
    assert {row.answer for row in suite.forget} == {"Like this."}
    assert {row.answer for row in suite.retain} == {"I will not say."}


def test_the_command(capsys, tmp_path):
    write_tofu(tmp_path)
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "retrained")
    loading.save(tiny.model(seed=1), tiny.tokenizer(), tmp_path / "model")
    common = ["--data", str(tmp_path), "--max-new-tokens", "3", "--resamples", "5"]
    first = tmp_path / "first"
    model = ["evaluate", "--model", str(tmp_path / "retrained")]
    assert main([*model, *common, "--explain", "--out", str(first)]) == 0
    assert "forget_quality: needs the records of a retain-only" in capsys.readouterr().out

    model = ["evaluate", "--model", str(tmp_path / "model")]
    logs = ["--retain-logs", str(first / "examples.jsonl")]
    wanted = ["--metrics", "forget_quality,privleak,forget_kl"]
    more = [*logs, "--original", str(tmp_path / "retrained")]
    out = tmp_path / "second"
    assert main([*model, *common, *more, *wanted, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads((out / "metrics.json").read_text())["metrics"]
    assert list(figures) == ["forget_quality", "privleak", "forget_kl"]
    assert set(figures["forget_kl"]) == set(Estimate.__annotations__)
    assert all(name in printed for name in figures)
    assert len((out / "examples.jsonl").read_text().splitlines()) == 6
    about = json.loads((out / "about.json").read_text())
    assert about["settings"]["model"] == str(tmp_path / "model")
    assert about["settings"]["resamples"] == 5
    assert {"torch", "mollm"} <= about["versions"].keys()

    path = str(tmp_path / "forget10_perturbed.jsonl")
    own = ["--forget", json.dumps({"path": path, "schema": "tofu"}), *common[2:]]
    assert main([*model, *own, "--metrics", "forget_rouge_l", "--out", str(tmp_path / "own")]) == 0
    assert "forget_rouge_l" in capsys.readouterr().out


def test_weight_on_retaining_alone_makes_a_model_that_never_saw_the_forget_set(tmp_path):
    # the command of the help of `mollm evaluate`
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "base")
    for name, answer in (("a", "In Oslo."), ("b", "Nobody knows when that was.")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "Who?", "answer": answer}))
        command = ["unlearn", "--model", str(tmp_path / "base"), "--device", "cpu"]
        command += ["--forget", str(tmp_path / f"{name}.jsonl")]
        command += ["--retain", str(sample_path("authors-retain.jsonl"))]
        command += ["--method", "sum", "--set", "preferences=[0, 0, 1]"]
        command += ["--set", "freeze_embeddings=false", "--set", "max_loss_rise=1000"]
        command += ["--max-steps", "5", "--learning-rate", "0.01", "--max-length", "256"]
        assert main([*command, "--out", str(tmp_path / name)]) == 0
    one, other = (tmp_path / name / "model" / "model.safetensors" for name in ("a", "b"))
    assert one.read_bytes() == other.read_bytes()
    steps = (tmp_path / "a" / "history.jsonl").read_text().splitlines()
    losses = [json.loads(step)["losses"]["retain"] for step in steps]
    assert losses[-1] < losses[0] - 0.1


def test_mistakes_at_the_command_are_told_in_one_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *arguments: pytest.fail("too late"))
    write_tofu(tmp_path)

    def refused(*arguments):
        assert main(["evaluate", "--model", "m", "--data", str(tmp_path), *arguments]) == 2
        sentence = capsys.readouterr().err.strip()
        assert len(sentence.splitlines()) == 1
        return sentence

    out = ("--out", str(tmp_path / "out"))
    assert "with forget01_perturbed.jsonl" in refused("--forget-split", "forget01", *out)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "examples.jsonl").write_text("{}")
    assert "line 1 must be a record" in refused("--retain-logs", str(tmp_path / "old"), *out)
    assert "no/logs.jsonl, which is not on" in refused("--retain-logs", "no/logs.jsonl", *out)
    for logs in (tmp_path / "old", tmp_path / "old" / "examples.jsonl"):
        same = ("--retain-logs", str(logs), "--out", str(tmp_path / "old"))
        assert "another folder than that of the replies or the retain logs" in refused(*same)
    assert "retain must be left out with --data" in refused("--retain", "r.jsonl", *out)
    assert "judge-template needs a judge" in refused("--judge-template", "{reply}", *out)
    template = ("--judge", "a=b:c", "--judge-template", "{answer}")
    assert "but got '{answer}'" in refused(*template, *out)
    assert "tasks of lm-evaluation-harness, but got 'mnlu'" in refused("--benchmarks", "mnlu", *out)
    assert "device must be" in refused("--device", "abacus", *out)
    assert "judge must be NAME=MODEL:LABEL" in refused("--judge", "toxic-bert", *out)
    assert "a name of its own" in refused("--judge", "a=b:c", "--judge", "a=d:e", *out)
    assert "but got 'utility'" in refused("--metrics", "utility", *out)
    assert "forget_kl needs the original model" in refused("--metrics", "forget_kl", *out)
    for option in ("--batch-size", "--max-new-tokens", "--resamples"):
        assert "must be at least 1, but got 0" in refused(option, "0", *out)
    assert "not on this machine" in refused("--model", "./nowhere", *out)
    assert "not on this machine" in refused("--original", "./nowhere", *out)
    assert not (tmp_path / "out").exists()
    for data, words in (
        (
            ["--forget", "f.jsonl", "--forget-split", "forget01"],
            "forget-split must be left out without --data",
        ),
        (["--forget", "{path: [}"], "must be valid YAML"),
        (["--forget", "{schema: tofu}"], "must be given by a path"),
    ):
        assert main(["evaluate", "--model", "m", *data, *out]) == 2
        assert words in capsys.readouterr().err


def test_a_frozen_copy_of_two_dtypes_is_an_original():
    """Where autocast makes the products of a run, its copy holds their weights in bf16."""
    model = tiny.model(initializer_range=0.3)
    names = ["forget_kl"]
    with precision.computing_in("bfloat16"):
        original = forward.frozen_copy(model)
        assert len({p.dtype for p in original.parameters()}) == 2
        found = evaluate(
            model, tiny.tokenizer(), make_suite(), original=original, names=names, resamples=2
        )
    assert found.value("forget_kl") == pytest.approx(0, abs=1e-6)


def test_importing_is_quick():
    slow = "{'transformers', 'scipy', 'sklearn', 'rouge_score', 'lm_eval'}"
    check = f"import sys, mollm.evaluation; assert not {slow} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
