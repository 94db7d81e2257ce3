"""Which rows are meant: filters, labels of safety, and a prompt with two replies."""

import json
import re

import pytest

from mollm.data.files import sample_path
from mollm.data.records import load_records
from mollm.errors import UsageError
from mollm.evaluation import load_suite

BEAVER = [
    {"prompt": "How?", "response": "Like this.", "is_safe": False, "category": {"theft": True}},
    {
        "prompt": "How?",
        "response": "I will not say.",
        "is_safe": True,
        "category": {"theft": False},
    },
    {
        "prompt": "How?",
        "response": "Take a crowbar.",
        "is_safe": False,
        "category": {"theft": True},
    },
    {"prompt": "Why?", "response": "For fun.", "is_safe": False, "category": {"theft": False}},
]


def written(tmp_path, rows, ending="jsonl"):
    path = tmp_path / f"rows.{ending}"
    if ending == "csv":
        lines = [",".join(rows[0])] + [",".join(map(str, row.values())) for row in rows]
    else:
        lines = map(json.dumps, rows)
    path.write_text("\n".join(lines) + "\n")
    return path


def answers(path, role, **options):
    return [record.answer for record in load_records(path, role=role, **options)]


def test_beavertails_is_split_by_is_safe(tmp_path):
    path = written(tmp_path, BEAVER)
    assert answers(path, "forget") == ["Like this.", "Take a crowbar.", "For fun."]
    assert answers(path, "retain") == ["I will not say."]
    assert len(answers(path, "retain", where={})) == 4
    assert answers(path, "retain", where={"is_safe": False}) == answers(path, "forget")


def test_a_label_in_words_is_read_whatever_the_shape(tmp_path):
    rows = [{"text": "Be kind.", "label": "safe"}, {"text": "Be cruel.", "label": "Harmful"}]
    path = written(tmp_path, rows)
    assert answers(path, "forget") == ["Be cruel."]
    assert answers(path, "retain") == ["Be kind."]


def test_a_csv_says_it_in_words(tmp_path):
    rows = [{"prompt": f"{n}?", "response": f"{n}.", "is_safe": n % 2 == 0} for n in range(4)]
    path = written(tmp_path, rows, "csv")
    assert answers(path, "forget") == ["1.", "3."]
    assert answers(path, "forget", where={"is_safe": True}) == ["0.", "2."]


def test_labels_that_say_nothing_stop_the_run(tmp_path):
    rows = [{"text": f"News {n}.", "label": n} for n in range(2)]
    path = written(tmp_path, rows)
    with pytest.raises(UsageError, match=re.escape("label with the values 0, 1, which do not say")):
        load_records(path, role="forget")
    assert answers(path, "forget", where={"label": 1}) == ["News 1."]
    assert len(answers(path, "retain", where={})) == 2
    one = written(tmp_path, [{"text": "News.", "label": "news"}] * 2)
    assert len(answers(one, "forget")) == 2


def test_a_set_without_a_row_for_its_role_is_refused(tmp_path):
    path = written(tmp_path, [row for row in BEAVER if row["is_safe"]])
    with pytest.raises(UsageError, match="column is_safe calls unsafe for the role forget"):
        load_records(path, role="forget")


def test_rows_are_chosen_by_columns_and_paths(tmp_path):
    path = written(tmp_path, BEAVER)
    assert answers(path, "forget", where={"category.theft": True}) == [
        "Like this.",
        "Take a crowbar.",
    ]
    assert answers(path, "forget", where={"prompt": ["Why?", "When?"]}) == ["For fun."]
    with pytest.raises(UsageError, match=r"where must name columns of .* but got 'categry'"):
        load_records(path, role="forget", where={"categry": 1})
    with pytest.raises(UsageError, match="must have rows where"):
        load_records(path, role="forget", where={"prompt": "Whence?"})
    with pytest.raises(UsageError, match="where must give values"):
        load_records(path, role="forget", where="unsafe")


@pytest.mark.parametrize(
    ("value", "wanted", "same"),
    [
        (1, True, False),
        (True, 1, False),
        (1, 1.0, True),
        ("true", True, True),
        ("3", 3, True),
        ("3", "3", True),
        (3, "3", False),
        (None, None, True),
    ],
)
def test_values_are_compared_by_kind(tmp_path, value, wanted, same):
    rows = [{"text": "One.", "kind": value}, {"text": "Two.", "kind": "other"}]
    path = written(tmp_path, rows)
    if same:
        assert answers(path, "forget", where={"kind": wanted}) == ["One."]
    else:
        with pytest.raises(UsageError, match="must have rows where"):
            load_records(path, role="forget", where={"kind": wanted})


def test_a_prompt_with_two_replies_is_asked_once(tmp_path):
    suite = load_suite(written(tmp_path, BEAVER))
    assert [row.question for row in suite.forget] == ["How?", "Why?"]
    assert suite.forget[0].answer == "Like this."
    assert suite.forget[0].accepted_answers == ("Like this.", "Take a crowbar.")
    assert suite.notes[0].startswith("1 of 3 forget answers share their question")
    both = {"prompt": "How?", "response_0": "So.", "response_1": "Thus."}
    both |= {"is_response_0_safe": False, "is_response_1_safe": False}
    suite = load_suite(written(tmp_path, [both, {**both, "prompt": "Why?"}]))
    assert [row.accepted_answers for row in suite.forget] == [("So.", "Thus.")] * 2
    assert load_suite(sample_path("authors-forget.jsonl")).notes == ()


def test_rows_of_no_known_shape_are_told_the_nearest(tmp_path):
    path = written(tmp_path, [{"questions": "Who?", "anwser": "Ann."}])
    with pytest.raises(
        UsageError, match="question and answer, lacks question and answer"
    ) as caught:
        load_records(path, role="forget")
    assert "its columns are questions, anwser" in str(caught.value)
    path = written(tmp_path, [{"instruction": "Say.", "result": "Ann."}])
    with pytest.raises(UsageError, match="nearest shape, instruction and output, lacks output"):
        load_records(path, role="forget")
