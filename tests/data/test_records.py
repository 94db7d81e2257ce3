import json
import time

import pytest

from mollm.data.conversations import Turn
from mollm.data.files import sample_path
from mollm.data.records import Record, check_overlap, content_hash, load_records
from mollm.errors import UsageError

PKU = {
    "prompt": "p",
    "response_0": "bad",
    "response_1": "good",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
}


@pytest.fixture
def write(tmp_path):
    def written(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return written


def pairs(records):
    return [(record.prompt, record.answer) for record in records]


def test_the_role_chooses_the_responses_of_pku_saferlhf(write):
    path = write(
        PKU,
        PKU | {"is_response_1_safe": False},
        PKU | {"is_response_0_safe": True},
        PKU | {"is_response_0_safe": "True", "is_response_1_safe": "false"},
    )
    forget = load_records(path, role="forget")
    assert [(r.row, r.answer_field) for r in forget] == [
        (1, "response_0"),
        (2, "response_0"),
        (2, "response_1"),
        (4, "response_1"),
    ]
    assert pairs(forget)[:3] == [("p", "bad"), ("p", "bad"), ("p", "good")]
    retain = load_records(path, role="retain")
    assert [(r.row, r.answer_field) for r in retain] == [
        (1, "response_1"),
        (3, "response_0"),
        (3, "response_1"),
        (4, "response_0"),
    ]
    assert forget[0].place == f"{path}, line 1"


@pytest.mark.parametrize(("role", "kind"), [("forget", "unsafe"), ("retain", "safe")])
def test_nothing_left_for_a_role_is_refused(write, role, kind):
    safe = role == "forget"
    path = write(PKU | {"is_response_0_safe": safe, "is_response_1_safe": safe})
    with pytest.raises(UsageError, match=f"a response judged {kind} for the role {role}"):
        load_records(path, role=role)


def test_tofu_keeps_what_the_evaluation_asks_for(write):
    row = {
        "question": "q",
        "answer": "a",
        "paraphrased_answer": "b",
        "perturbed_answer": ["c", "d"],
        "paraphrased_question": None,
        "other": 7,
    }
    (record,) = load_records(write(row), role="forget", schema="tofu")
    assert pairs([record]) == [("q", "a")]
    assert record.extra == {"paraphrased_answer": "b", "perturbed_answer": ["c", "d"]}
    assert load_records(write(row), role="retain") == [record]


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("prompt", "answer"),
        ("question", "answer"),
        ("prompt", "response"),
        ("instruction", "output"),
        ("prompt", "completion"),
    ],
)
@pytest.mark.parametrize("schema", ["auto", "prompt-answer"])
def test_usual_columns_are_recognised(write, schema, prompt, answer):
    path = write({"id": 3, answer: " a ", prompt: "p"})
    (record,) = load_records(path, role="forget", schema=schema)
    assert pairs([record]) == [("p", " a ")]
    assert record.answer_field == answer


def test_an_instruction_is_asked_with_its_input(write):
    rows = [{"instruction": "Sum up.", "input": text, "output": "a"} for text in ("A tale.", "")]
    records = load_records(write(*rows), role="retain")
    assert [record.prompt for record in records] == ["Sum up.\n\nA tale.", "Sum up."]


def test_the_caller_may_name_the_columns(write):
    path = write({"prompt": "x", "answer": "y", "german": "p", "Antwort": "a"})
    records = load_records(path, role="forget", prompt_field="german", answer_field="Antwort")
    assert pairs(records) == [("p", "a")]
    assert records[0].answer_field == "Antwort"


HISTORY = [("system", "s"), ("user", "q"), ("assistant", "b")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": r, "content": c} for r, c in [*HISTORY, ("user", "p")]]},
        {"messages": [{"from": r, "value": c} for r, c in [*HISTORY, ("human", "p")]]},
        {"conversations": [{"from": r, "value": c} for r, c in [*HISTORY, ("human", "p")]]},
        {
            "conversations": {
                "role": ["system", "user", "assistant", "user"],
                "content": list("sqbp"),
            }
        },
    ],
)
def test_conversations_of_many_turns_are_records(write, row):
    ((name, turns),) = row.items()
    if isinstance(turns, dict):
        turns = {"role": [*turns["role"], "assistant"], "content": [*turns["content"], "a"]}
    elif "from" in turns[0]:
        turns = [*turns, {"from": "gpt", "value": "a"}]
    else:
        turns = [*turns, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    (record,) = load_records(write({name: turns}), role="forget")
    assert pairs([record]) == [("p", "a")]
    assert record.history == tuple(HISTORY)
    assert record.answer_field == name
    assert content_hash([record]) != content_hash([Record("p", "a")])


def test_a_prompt_may_be_a_list_of_turns(write):
    prompt = [{"role": r, "content": c} for r, c in [*HISTORY, ("user", "p")]]
    for answer in ("a", [{"role": "assistant", "content": "a"}]):
        (record,) = load_records(write({"prompt": prompt, "completion": answer}), role="forget")
        assert pairs([record]) == [("p", "a")]
        assert record.history == tuple(HISTORY)
    with pytest.raises(UsageError, match="the field prompt must end with a turn of the user"):
        load_records(write({"prompt": prompt[:-1], "completion": "a"}), role="forget")
    with pytest.raises(UsageError, match="completion must hold one turn of the assistant"):
        load_records(write({"prompt": prompt, "completion": prompt}), role="forget")


def test_every_accepted_answer_is_a_record(write):
    records = load_records(write({"question": "q", "answer": ["a", "b", "a"]}), role="forget")
    assert pairs(records) == [("q", "a"), ("q", "b")]
    assert all(record.extra == {"accepted_answers": ["a", "b"]} for record in records)
    (record,) = load_records(write({"prompt": "q", "response": ["a"]}), role="forget")
    assert record.extra == {}


def test_running_text_has_no_prompt(write):
    path = write({"text": "Once upon a time.", "topic": "x"})
    (record,) = load_records(path, role="forget")
    assert record.is_text
    assert pairs([record]) == [("", "Once upon a time.")]
    path = write({"body": "Once upon a time."})
    (named,) = load_records(path, role="forget", schema="text", answer_field="body")
    assert content_hash([named]) == content_hash([record])
    other = Record("", "Another tale.", is_text=True)
    assert check_overlap([record], [other]).note is None
    with pytest.raises(UsageError, match="but 1 of 1 are: check that"):
        check_overlap([record], [named])


def test_the_same_question_after_other_words_is_another_question():
    forget = [Record("And then?", "A.", history=(Turn("user", "One"), Turn("assistant", "x")))]
    retain = [Record("And then?", "B.", history=(Turn("user", "Two"), Turn("assistant", "x")))]
    assert check_overlap(forget, retain).note is None


def test_a_conversation_of_two_turns_is_a_record(write):
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    (record,) = load_records(write({"messages": turns}), role="forget")
    assert pairs([record]) == [("p", "a")]
    assert record.answer_field == "messages"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": "p"}], r'but got \["user"\]'),
        ([{"role": r, "content": "p"} for r in ("assistant", "user")], r'\["assistant", "user"\]'),
        ([{"role": "tool", "content": "p"}], r'messages\[0\]\.role must be system, .* got "tool"'),
        ([{"role": "user", "content": [{"type": "image"}]}], "must be of the type text, but got"),
        (None, "must be a list of turns with role and content, but got null"),
        ("hello", 'must be a list of turns with role and content, but got "hello"'),
        (
            [{"role": "user", "content": "p"}, {"role": "assistant", "content": None}],
            r"the field messages\[1\]\.content must be a text that is not blank, but got null",
        ),
    ],
)
def test_other_conversations_are_refused(write, messages, words):
    good = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    path = write({"messages": good}, {"messages": messages})
    with pytest.raises(UsageError, match=rf"rows\.jsonl, line 2: .*{words}"):
        load_records(path, role="forget")


@pytest.mark.parametrize("value", [None, 3, "", " \n", [], [""], [3], True])
@pytest.mark.parametrize("field", ["prompt", "answer"])
def test_a_value_that_is_no_text_is_refused_with_its_place(write, field, value):
    good = {"prompt": "p", "answer": "a"}
    path = write(good, good | {field: value})
    with pytest.raises(UsageError, match=rf"rows\.jsonl, line 2: the field {field} must be a text"):
        load_records(path, role="forget")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"is_response_0_safe": None}, "the field is_response_0_safe must be true or false, but g"),
        ({"is_response_1_safe": "maybe"}, r"is_response_1_safe .* but got \"maybe\""),
        ({"is_response_0_safe": 1}, "is_response_0_safe must be true or false, but got 1"),
        ({"response_0": None}, "the field response_0 must be a text that is not blank"),
        ({"prompt": ""}, "the field prompt must be a text that is not blank"),
    ],
)
def test_pku_rows_are_checked(write, change, words):
    with pytest.raises(UsageError, match=rf"line 2: .*{words}"):
        load_records(write(PKU, PKU | change), role="forget")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"perturbed_answer": "wrong"},
            'perturbed_answer must be a list of texts, but got "wrong"',
        ),
        ({"perturbed_answer": []}, r"perturbed_answer must be a list of texts, but got \[\]"),
        ({"perturbed_answer": ["x", " "]}, "perturbed_answer must be a text that is not blank"),
        ({"paraphrased_answer": 1}, "paraphrased_answer must be a text that is not blank"),
    ],
)
def test_tofu_rows_are_checked(write, change, words):
    row = {"question": "q", "answer": "a"}
    with pytest.raises(UsageError, match=rf"line 2: the field {words}"):
        load_records(write(row, row | change), role="forget")


def test_a_field_that_one_row_lacks_is_named(write):
    path = write({"prompt": "p", "answer": "a"}, {"prompt": "p"})
    with pytest.raises(UsageError, match=r"line 2 must have the field answer, but it has prompt\."):
        load_records(path, role="forget")


def test_half_a_surrogate_pair_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "answer": "a\\ud83d"}\n')
    with pytest.raises(UsageError, match=r"line 1: the field answer must be valid Unicode"):
        load_records(path, role="forget")


def test_unknown_columns_are_listed_with_the_way_out(write):
    words = r"are words, topic, and the nearest .* lacks .*: name the two with prompt_field and"
    with pytest.raises(UsageError, match=words):
        load_records(write({"words": "t", "topic": "x"}), role="forget")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"role": "keep"}, "role must be one of forget, retain, but got 'keep'"),
        ({"schema": "alpaca"}, "schema must be one of auto, pku-saferlhf, .* but got 'alpaca'"),
        ({"prompt_field": "text"}, "must be given together, but got 'text' alone"),
        ({"answer_field": "text"}, "must be given together, but got 'text' alone"),
        (
            {"schema": "tofu", "prompt_field": "a", "answer_field": "b"},
            "must go with the schema prompt-answer, but got tofu",
        ),
        (
            {"prompt_field": "prompt", "answer_field": "b"},
            "but b is not among its columns prompt, answer",
        ),
        ({"schema": "pku-saferlhf"}, "but response_0, response_1, is_response_0_safe, is_respon"),
        ({"schema": "tofu"}, "columns question, answer for the schema tofu, but question is not"),
    ],
)
def test_what_does_not_fit_is_refused(write, options, words):
    path = write({"prompt": "p", "answer": "a"})
    with pytest.raises(UsageError, match=words):
        load_records(path, **({"role": "forget"} | options))


def records(*texts):
    return [Record(prompt, answer) for prompt, answer in texts]


def test_overlap_is_counted_whatever_case_and_spacing():
    forget = records(("Who?", "Ann."), ("Where?", "Here."), ("When?", "Now."), ("Why?", "So."))
    retain = records(("WHO?", " ann.\n"), ("Where?", "There."), ("How?", "Now."))
    overlap = check_overlap(forget, retain)
    assert (overlap.rows, overlap.pairs, overlap.prompts) == (4, 1, 1)
    assert overlap.note == (
        "1 of 4 forget rows are also retain rows, and 1 of 4 forget rows share their prompt with "
        "a retain row that has another answer."
    )
    assert check_overlap(forget, records(("Else?", "Ann."))).note is None


def test_more_than_half_in_common_is_refused_and_half_is_not():
    forget = records(("a", "1"), ("b", "2"), ("c", "3"), ("d", "4"))
    assert check_overlap(forget, forget[:2]).pairs == 2
    with pytest.raises(UsageError, match="but 3 of 4 are: check that forget and retain are not"):
        check_overlap(forget, forget[:3])


def test_prompts_in_common_are_no_error():
    forget, retain = records(("a", "bad")), records(("a", "good"))
    assert check_overlap(forget, retain).prompts == 1


def test_the_hash_is_of_what_the_records_say():
    first = Record("pé", "a", "x.jsonl", 1, extra={"b": "1", "a": ["2", "3"]})
    second = Record("q", "b", "x.jsonl", 2)
    # written down once: a model card must mean the same data in later versions
    assert content_hash([first, second]) == (
        "38c8c207b253d81452c720bb0949ab5ffa3349545e70e5ddf9192f286161b617"
    )
    moved = Record("pé", "a", "y.csv", 9, extra={"a": ["2", "3"], "b": "1"})
    assert content_hash([moved, second]) == content_hash([first, second])
    others = (
        [second, first],
        [first],
        [Record("pé", "A"), second],
        [Record("pé", "a"), second],
    )
    assert len({content_hash(other) for other in ([first, second], *others)}) == 5


def test_the_hash_does_not_depend_on_the_format(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = sample_path("authors-forget.jsonl")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    hashes = {
        content_hash(load_records(path, role="forget"))
        for path in (lines, tmp_path / "rows.parquet", tmp_path / "rows.json")
    }
    assert len(hashes) == 1


def test_the_samples_fit_their_schemas():
    unsafe = load_records(sample_path("safety.jsonl"), role="forget", schema="pku-saferlhf")
    safe = load_records(sample_path("safety.jsonl"), role="retain", schema="pku-saferlhf")
    assert len({record.row for record in (*unsafe, *safe)}) == 12
    assert len(unsafe) + len(safe) == 24
    forget, retain = (
        load_records(sample_path(f"authors-{role}.jsonl"), role=role, schema="tofu")
        for role in ("forget", "retain")
    )
    assert (len(forget), len(retain)) == (12, 24)
    for record in (*forget, *retain):
        assert set(record.extra) == {"paraphrased_answer", "perturbed_answer"}
        wrong = record.extra["perturbed_answer"]
        assert 3 <= len(set(wrong)) == len(wrong) <= 5
        assert not {record.answer, record.extra["paraphrased_answer"]} & set(wrong)
    assert check_overlap(forget, retain).note is None
    everyday = load_records(sample_path("everyday.csv"), role="retain")
    assert len(everyday) == 12
    assert "42" in [record.answer for record in everyday]


def test_every_shape_has_a_sample():
    def of(name):
        return load_records(sample_path(name), role="retain")

    messages, sharegpt = of("messages.jsonl"), of("sharegpt.jsonl")
    assert {record.answer_field for record in messages} == {"messages"}
    assert {record.answer_field for record in sharegpt} == {"conversations"}
    for records in (messages, sharegpt, of("completions.jsonl")):
        roles = [[turn.role for turn in record.history] for record in records]
        assert any(said[:1] == ["system"] for said in roles)
        assert any("assistant" in said for said in roles)
    several = of("several-answers.jsonl")
    assert len(several) > len({record.prompt for record in several})
    texts = of("text.jsonl")
    assert all(record.is_text for record in texts)
    assert max(len(record.answer.split()) for record in texts) > 150


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "p", "input": "", "output": "a"},
        {"prompt": [{"role": "user", "content": "p"}], "answer": "a"},
    ],
    ids=["ShareGPT", "Alpaca", "turns"],
)
def test_a_column_for_the_system_is_its_turn(write, row):
    (record,) = load_records(write(row | {"system": "Be kind."}), role="forget")
    assert record.history == (Turn("system", "Be kind."),)
    for nothing in (None, "", " "):
        (record,) = load_records(write(row | {"system": nothing}), role="forget")
        assert record.history == ()
    with pytest.raises(UsageError, match=r"line 1: the field system must be a text"):
        load_records(write(row | {"system": 3}), role="forget")
    assert load_records(write(row | {"history": []}), role="forget")
    with pytest.raises(UsageError, match=r"line 1: the field history must be empty"):
        load_records(write(row | {"history": [["q", "a"]]}), role="forget")


def test_the_systems_turn_of_a_conversation_goes_before_that_of_its_column(write):
    turns = [("system", "Be brief."), ("user", "p"), ("assistant", "a")]
    row = {"messages": [{"role": r, "content": c} for r, c in turns], "system": "Be kind."}
    (record,) = load_records(write(row), role="forget")
    assert record.history == (Turn("system", "Be brief."),)


def test_turns_in_columns_of_unlike_length_are_refused(write):
    columns = {"role": ["user", "assistant"], "content": ["p"]}
    with pytest.raises(UsageError, match=r"line 1: the field messages must be a list of turns"):
        load_records(write({"messages": columns}), role="forget")


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"role": {}, "content": "a"}, r"messages\[0\].role must be system, user or assistant"),
        (
            {"role": "user", "content": [{"type": "image", "text": "a"}]},
            r"every part of messages\[0\].content must be of the type text",
        ),
    ],
)
def test_turns_of_other_kinds_than_text_are_refused(tmp_path, turn, words):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [turn, {"role": "assistant", "content": "b"}]}))
    with pytest.raises(UsageError, match=words):
        load_records(path, role="forget")


CALL = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tool_calls": CALL}, r"messages\[1\]\.tool_calls must be empty"),
        ({"reasoning_content": "So."}, r"messages\[1\]\.reasoning_content must be empty, .*So\."),
        ({"thinking": "So."}, ".* write it into the content or remove the row"),
        ({"function_call": {"name": "f", "arguments": None}}, r"messages\[1\]\.function_call must"),
        ({"weight": 0}, r"messages\[1\]\.weight must not be 0 or false, for the last answer"),
        ({"train": False}, r"messages\[1\]\.train must not be 0 or false"),
        ({"weight": 0.5}, r"messages\[1\]\.weight must be 0 or 1, .* but got 0\.5: remove it"),
    ],
)
def test_what_a_turn_says_beside_its_text_is_refused_and_not_left_out(write, more, words):
    asked, answer = {"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}
    nothing = {"tool_calls": [], "reasoning_content": None, "thinking": "", "weight": 1}
    assert load_records(write({"messages": [asked, answer | nothing]}), role="forget")
    with pytest.raises(UsageError, match=rf"line 1: {words}"):
        load_records(write({"messages": [asked, answer | more]}), role="forget")


@pytest.mark.parametrize(
    "nothing",
    [
        {"reasoning_content": "\n"},
        {"reasoning_content": float("nan")},
        {"function_call": {"name": None, "arguments": None}},
        {"tool_calls": "[]"},
        {"weight": float("nan"), "train": None},
    ],
)
def test_a_field_of_a_turn_that_says_nothing_is_taken(write, nothing):
    asked, answer = {"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}
    (record,) = load_records(write({"messages": [asked, answer | nothing]}), role="forget")
    assert (record.prompt, record.answer, record.weightless) == ("p", "a", "")


@pytest.mark.parametrize("none", [{"weight": 0}, {"train": False}])
def test_an_earlier_answer_may_carry_no_loss_as_only_the_last_one_does(write, none):
    asked, answer = {"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}
    turns = [asked | none, answer | none, asked | none, answer | {"weight": 1}]
    field = f"[1].{next(iter(none))}"
    (record,) = load_records(write({"messages": turns}), role="forget")
    assert record.weightless == f"messages{field}"
    for said in ("a", turns[3:]):
        row = {"prompt": turns[:3], "completion": said}
        (record,) = load_records(write(row), role="forget")
        assert record.weightless == f"prompt{field}"
    row = {"prompt": turns[:1], "completion": [answer | none]}
    with pytest.raises(UsageError, match=r"completion\[0\]\..* must not be 0 or false"):
        load_records(write(row), role="forget")
    (record,) = load_records(write({"messages": [asked | none, answer]}), role="forget")
    assert record.weightless == ""


def test_tools_of_a_conversation_are_refused_and_a_column_of_that_name_elsewhere_is_not(write):
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    assert load_records(write({"messages": turns, "tools": None}), role="forget")
    assert load_records(write({"question": "q", "answer": "a", "tools": "saw"}), role="forget")
    for empty in ("[]", "null", " ", [], {}, float("nan")):
        assert load_records(write({"messages": turns, "tools": empty}), role="forget")
    for row in ({"messages": turns}, {"prompt": turns[:1], "completion": turns[1:]}):
        with pytest.raises(UsageError, match="line 1: the field tools must be empty"):
            load_records(write(row | {"tools": CALL}), role="forget")


def test_a_row_of_a_hundred_thousand_columns_is_refused_at_once(write):
    path = write({f"k{n}": n for n in range(100_000)})
    started = time.process_time()
    with pytest.raises(UsageError, match="99980 more, and the nearest shape"):
        load_records(path, role="forget")
    assert time.process_time() - started < 3
