import pytest
import tiny

pytest.importorskip("transformers")

from mollm.data.chat import IGNORE_INDEX, ChatFormat
from mollm.data.preview import pieces_of, preview_of
from mollm.data.records import Record
from mollm.data.sets import read_data

FORGET = [
    Record("Who wrote it?", "Ann Øre.", "a.jsonl", 1),
    Record("When?", "In 1950.", "a.jsonl", 2),
    Record("who  wrote it?", "ann øre.", "a.jsonl", 3),
    Record("Long " * 60 + "?", "Yes.", "a.jsonl", 4),
]
RETAIN = [Record("When?", "In 1950."), Record("Where?", "Here."), Record("Why?", "So.")]


@pytest.fixture
def chat():
    return ChatFormat(tiny.tokenizer())


@pytest.fixture
def data(chat):
    return read_data(FORGET, RETAIN, {"forget": FORGET[:1]}, chat, 128)


def test_a_row_is_read_back_from_the_ids_that_are_trained(chat, data):
    found = preview_of(data, chat, 128)
    row, shown = data.rows["forget"][0], found.sets["forget"].shown[0]
    assert shown.text == chat.tokenizer.decode(row.ids)
    assert shown.tokens == len(row.ids)
    labels = [i for i in row.labels if i != IGNORE_INDEX]
    assert shown.loss_text == chat.tokenizer.decode(labels) == "Ann Øre.<|end|>"
    assert shown.loss_tokens == len(labels)
    assert found.end == "<|end|>"
    assert [p.text for p in shown.pieces if p.special][:2] == ["<|start|>", "<|end|>"]


def test_findings_name_their_rows(chat, data):
    found = preview_of(data, chat, 128).sets["forget"]
    assert found.duplicates == ("row 3",)
    assert found.also_retained == ("row 2",)
    assert found.cut == ("row 4",)
    assert preview_of(data, chat, 128, rows=4).sets["forget"].shown[3].cut
    least, median, most = found.tokens
    assert least <= median <= most == max(len(row.ids) for row in data.rows["forget"])


def test_evaluation_sets_are_shown_too(chat, data):
    found = preview_of(data, chat, 128, rows=0)
    assert list(found.sets) == ["forget", "retain", "eval forget"]
    assert not found.sets["retain"].shown
    assert found.sets["retain"].duplicates == ()
    assert found.sets["retain"].also_retained == ()


def test_windows_of_a_text_belong_to_their_record(chat):
    texts = [Record("", "a" * 300, "t.txt", n, is_text=True) for n in (1, 2)]
    data = read_data(texts, RETAIN, None, chat, 128)
    found = preview_of(data, chat, 128, rows=9).sets["forget"]
    assert found.records == 2
    assert found.rows == len(data.rows["forget"]) > 4
    assert {row.place for row in found.shown[: found.rows // 2]} == {"row 1"}
    assert data.encoded["forget"].origins[-1] == 1


def test_pieces_of_letters_of_several_bytes(chat):
    row = chat.encode_text("日本語 and ø", 100)[0]
    assert "".join(p.text for p in pieces_of(row, chat.tokenizer)) == "日本語 and ø"
