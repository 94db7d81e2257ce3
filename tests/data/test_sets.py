from pathlib import Path

import pytest
import tiny

from mollm.data import sets
from mollm.data.chat import ChatFormat
from mollm.data.conversations import Turn
from mollm.data.files import sample_path
from mollm.data.records import Record
from mollm.data.sets import read_data, records_of, role_of
from mollm.errors import UsageError

FORGET = [Record(f"Who wrote book {n}?", "Ada") for n in range(4)]
RETAIN = [Record(f"How many legs has animal {n}?", "four") for n in range(6)]


def read(forget=FORGET, retain=RETAIN, evaluate=None, **options):
    return read_data(forget, retain, evaluate, ChatFormat(tiny.tokenizer(**options)), 400)


def test_sets_have_names_rows_and_hashes():
    path = sample_path("authors-retain.jsonl")
    data = read(retain=Path(path), evaluate={"retain": RETAIN[:2], "forget": FORGET[:1]})
    sizes = {name: len(rows) for name, rows in data.rows.items()}
    assert sizes == {"forget": 4, "retain": 24, "eval retain": 2, "eval forget": 1}
    assert {name: len(rows) for name, rows in data.evaluated.items()} == {"retain": 2, "forget": 1}
    assert {name: fact["rows"] for name, fact in data.facts.items()} == sizes
    assert data.facts["forget"]["source"] == "records"
    assert str(path) in data.facts["retain"]["source"]
    assert data.facts["forget"]["sha256"] == read().facts["forget"]["sha256"]
    assert data.facts["forget"]["sha256"] != read(forget=FORGET[:3]).facts["forget"]["sha256"]
    assert read().evaluated == {}


def test_rows_may_be_dicts():
    rows = [{"question": r.prompt, "answer": r.answer} for r in FORGET]
    assert [(r.prompt, r.answer) for r in records_of(rows, "forget")] == [
        (r.prompt, r.answer) for r in FORGET
    ]


def test_a_note_is_given_once():
    notes = read(retain=[*RETAIN, FORGET[0]], template=False).notes
    assert notes[0] == "1 of 4 forget rows are also retain rows."
    assert sum("has no chat template" in note for note in notes) == 1
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "the forget data must hold at least one row"),
        ({"split": "train"}, "by a path, but got only split"),
        ({"path": "x.jsonl", "splits": "x"}, "but got splits"),
        ([*FORGET, "more"], "but row 0 is Record and row 4 str"),
        (["more"], "but row 0 is str: give several files as sets by name"),
        ([{"question": "Who?", "answer": "Ada"}, {"question": "When?", "answer": 7}], "one kind"),
        ([{"question": "Who?", "reply": "Ada"}], "reply"),
    ],
)
def test_what_is_no_set_is_refused(data, words):
    with pytest.raises(UsageError, match=words):
        records_of(data, "forget")
    with pytest.raises(UsageError, match="'forget' and 'retain' alone, but got 'test'"):
        role_of("test")


def test_a_stream_is_read_up_to_a_limit(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [{"question": r.prompt, "answer": r.answer} for r in FORGET]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    assert [r.prompt for r in records_of(stream, "forget")] == [r.prompt for r in FORGET]
    monkeypatch.setattr(sets, "STREAMED_ROWS", 3)
    with pytest.raises(UsageError, match=r"at most 3 rows .* with \.shuffle\(seed=0\)\.take\(3\)"):
        records_of(stream, "forget")
    assert len(records_of(stream.take(3), "forget")) == 3


def test_of_a_data_set_with_splits_one_is_to_be_chosen():
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list([{"text": "a"}]))
    with pytest.raises(UsageError, match="choose one of its splits train"):
        records_of(splits, "forget")


def test_the_turns_to_train_on_reach_the_rows():
    talk = (Turn("user", "Who?"), Turn("assistant", "Ann."))
    forget = [Record("Where?", "Here.", history=talk), *FORGET]
    chat = ChatFormat(tiny.tokenizer())
    last, each = (
        read_data(forget, RETAIN, None, chat, 400, turns).rows["forget"][0]
        for turns in ("last", "all")
    )
    assert last.ids == each.ids
    assert chat.answer_length(last) < chat.answer_length(each)
