"""What of the data becomes what a model is asked."""

import json

import pytest
import tiny

pytest.importorskip("transformers")

from mollm.data.chat import IGNORE_INDEX, ChatFormat
from mollm.data.records import Record
from mollm.errors import UsageError
from mollm.evaluation import Row, Suite, evaluate, load_suite


def test_a_limit_takes_rows_of_every_set(tmp_path):
    sets = {}
    for name in ("ada", "bob"):
        rows = [{"question": f"Is it {name} {n}?", "answer": "Yes."} for n in range(5)]
        sets[name] = str(tmp_path / f"{name}.jsonl")
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [row.question for row in load_suite(sets, limit=2).forget]
    assert asked == ["Is it ada 0?", "Is it ada 1?", "Is it bob 0?", "Is it bob 1?"]


def test_an_answer_that_has_begun_and_does_not_end_is_scored_as_it_trains():
    record = Record("Where?", "Rome", opening="In the city of", closed=False)
    suite = load_suite([record, Record("When?", "Now.")])
    chat = ChatFormat(tiny.tokenizer())
    opened, whole = (chat.encode(row.example(row.answer)) for row in suite.forget)

    def scored(tokens):
        return chat.tokenizer.decode([label for label in tokens.labels if label != IGNORE_INDEX])

    assert "In the city of Rome" in chat.tokenizer.decode(opened.ids)
    assert scored(opened).strip() == "Rome"
    assert scored(whole) == "Now.<|end|>"


def test_a_text_beyond_the_context_is_asked_about_its_beginning():
    texts = [" ".join(f"{name}{n}" for n in range(60)) for name in ("dog", "cat")]
    rows = [Row(text[:200], text[200:], is_text=True) for text in texts]
    said = []
    found = evaluate(
        tiny.model(max_position_embeddings=128),
        tiny.tokenizer(),
        Suite(forget=rows),
        names=["forget_probability", "forget_rouge_l"],
        max_new_tokens=8,
        resamples=5,
        say=said.append,
    )
    for record, text in zip(found.records, texts, strict=True):
        asked = record.question + record.answer
        assert text.startswith(asked)
        assert 90 < len(asked) <= 128
    assert "2 of 2 texts of forget do not fit into the model's context of 128 tokens" in said[0]


def test_a_text_that_no_shortening_makes_fit_is_refused():
    row = Row("a b", " c d", is_text=True)
    model = tiny.model(max_position_embeddings=8)
    with pytest.raises(UsageError, match="max_new_tokens must leave room"):
        evaluate(model, tiny.tokenizer(), Suite(forget=[row, row]), max_new_tokens=8)
