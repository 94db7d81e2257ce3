import csv
import json

import pytest

from mollm.data import files
from mollm.data.files import read_table, sample_path
from mollm.errors import UsageError

datasets = pytest.importorskip("datasets")

ROWS = [
    {"prompt": "How many?", "answer": "42"},
    {"prompt": "Which country is meant by NA?", "answer": "NA"},
    {"prompt": "When, precisely?", "answer": "2020-01-01"},
    {"prompt": 'Two "lines"?', "answer": "first\nsecond, ô là!\u2028third"},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Nothing is written to the user's cache, and the hub is never asked."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def write(tmp_path):
    def written(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return written


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def save(rows, path):
    """Writes `rows` in the format of the path's ending."""
    table = datasets.Dataset.from_list(rows)
    if path.suffix == ".csv":
        table.to_pandas().to_csv(path, index=False)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        path.write_text(as_lines(rows) if path.suffix == ".jsonl" else json.dumps(rows, indent=1))
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_texts_as_they_were_written(tmp_path, ending):
    path = save(ROWS, tmp_path / f"rows.{ending}")
    table = read_table(path)
    assert [dict(row) for _, row in table.rows] == ROWS
    assert table.columns == ("prompt", "answer")
    assert table.name == str(path)


def test_a_name_is_no_pattern(tmp_path):
    for ending in ("jsonl", "parquet"):
        path = save(ROWS, tmp_path / f"part[1]*.{ending}")
        assert [dict(row) for _, row in read_table(path).rows] == ROWS


def test_an_ending_may_be_in_capitals(write):
    assert read_table(write("A.CSV", "prompt,answer\np,a\n")).columns == ("prompt", "answer")


def test_a_packed_file_is_refused_with_a_way_out(write):
    with pytest.raises(UsageError, match=r"but got .*a\.jsonl\.gz: unpack or convert it"):
        read_table(write("a.jsonl.gz", b"\x1f\x8b"))


def test_an_answer_may_be_long(tmp_path):
    limit = csv.field_size_limit()
    rows = [{"prompt": "p", "answer": "long " * 40_000}]
    for ending in ("jsonl", "csv", "parquet"):
        table = read_table(save(rows, tmp_path / f"rows.{ending}"))
        assert [dict(row) for _, row in table.rows] == rows
    assert csv.field_size_limit() == limit


def test_several_splits_at_once_and_other_objects_are_refused():
    rows = datasets.Dataset.from_list(ROWS)
    with pytest.raises(UsageError, match="a DatasetDict: choose one of its splits train, test"):
        read_table(datasets.DatasetDict(train=rows, test=rows))
    with pytest.raises(UsageError, match=r"or a datasets\.Dataset, but got list"):
        read_table(ROWS)


def test_numbers_are_lines_of_text_files_and_rows_of_others(tmp_path, write):
    def numbers(path):
        table = read_table(path)
        return table.unit, [number for number, _ in table.rows]

    assert numbers(write("a.jsonl", '{"a": 1}\n\n{"a": 2}\r\n')) == ("line", [1, 3])
    assert numbers(write("a.csv", 'a,b\n"two\nlines",x\n\ny,z\n')) == ("line", [2, 5])
    assert numbers(write("a.json", '[{"a": 1},\n\n{"a": 2}]')) == ("row", [1, 2])
    assert numbers(save(ROWS, tmp_path / "a.parquet")) == ("row", [1, 2, 3, 4])


def test_a_json_file_may_hold_an_object_on_every_line_and_a_byte_order_mark(write):
    table = read_table(write("a.json", '\ufeff{"a": "x"}\n{"b": "y"}\n'))
    assert table.columns == ("a", "b")
    assert table.unit == "line"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a\.jsonl, line 2 must hold one JSON object, but at c"),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', r"a\.jsonl, line 2 .* but got \[1, 2\]"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', r"a\.json, line 2 is malformed JSON at column 6"),
        ("a.json", '[{"a": 1}, "b"]', r'a\.json, row 2 must hold one JSON object, but got "b"'),
        ("a.json", "[]", r"a\.json must hold at least one row"),
        ("a.jsonl", "\n \n", r"a\.jsonl must hold at least one row"),
        ("a.csv", "a,b\n", r"a\.csv must hold at least one row"),
        ("a.csv", "", r"a\.csv must hold at least one row"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"a\.csv, line 3 must have 2 cells .* but it has 3"),
        ("a.csv", "a,b\n1\n", r"a\.csv, line 2 must have 2 cells .* but it has 1"),
        ("a.csv", 'a,b\n1,2\n1,"2\n', r"a\.csv, line 3 is malformed CSV: unexpected end"),
        ("a.csv", "a,a\n1,2\n", r"a\.csv must have columns of different names, but got a, a"),
        ("a.jsonl", b'{"a": "\xe9"}', r"a\.jsonl must be UTF-8 text, but its byte 7 is not"),
        ("a.parquet", "no parquet", r"a\.parquet cannot be read: Parquet magic"),
        ("a.txt", "text", r"must be a \.jsonl, \.json, \.csv or \.parquet file, but got .*a\.txt"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(write, name, content, words):
    with pytest.raises(UsageError, match=words):
        read_table(write(name, content))


def test_a_parquet_file_without_rows_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"prompt": [], "answer": []}).to_parquet(path)
    with pytest.raises(UsageError, match=r"a\.parquet must hold at least one row"):
        read_table(path)


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "some/rows.parquet", "./rows", "/no/rows", "~/x", ""]
)
def test_a_missing_file_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(files, "_read_dataset", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(UsageError, match="which is not on this machine"):
        read_table(name)


@pytest.mark.parametrize("options", [{"config": "forget10"}, {"split": "train"}])
def test_a_file_has_no_config_and_no_split(write, options):
    with pytest.raises(UsageError, match="config and split must not be given for a file"):
        read_table(write("a.jsonl", '{"a": 1}'), **options)


def test_a_folder_of_files_is_read_by_split(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    save(ROWS[:1], folder / "train.parquet")
    save(ROWS, folder / "test.parquet")
    assert [dict(row) for _, row in read_table(folder).rows] == ROWS[:1]
    test = read_table(folder, split="test")
    assert [number for number, _ in test.rows] == [1, 2, 3, 4]
    assert test.name == f"{folder} test"
    with pytest.raises(UsageError, match=r"set nosuch cannot be loaded: Unknown split"):
        read_table(folder, split="nosuch")


def test_a_saved_data_set_is_read_with_and_without_splits(tmp_path):
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    assert [dict(row) for _, row in read_table(tmp_path / "one").rows] == ROWS
    datasets.DatasetDict({"train": one, "test": one.select([2])}).save_to_disk(tmp_path / "two")
    assert [dict(row) for _, row in read_table(tmp_path / "two", split="test").rows] == ROWS[2:3]
    with pytest.raises(UsageError, match="its splits are train, test, but got 'dev'"):
        read_table(tmp_path / "two", split="dev")


def test_the_hub_is_asked_for_config_and_split_and_never_for_code(monkeypatch):
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    table = read_table("somebody/set", config="forget10", split="test")
    assert asked == [(("somebody/set", "forget10"), {"split": "test"})]
    assert table.name == "somebody/set forget10 test"
    read_table("somebody/set")
    assert asked[1] == (("somebody/set", None), {"split": "train"})


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (datasets.exceptions.DatasetNotFoundError("It is not there."), "It is not there"),
        (ConnectionError("no network"), "no network"),
        (ValueError("Config name is missing.\nPick one."), r"Config name is missing\. Pick one"),
        (
            RuntimeError("Dataset scripts are no longer supported"),
            "Dataset scripts are no longer supported",
        ),
        (StopIteration(), "StopIteration"),
    ],
)
def test_what_the_hub_refuses_is_told_with_its_reason(monkeypatch, error, words):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UsageError, match=f"data set somebody/set cannot be loaded: {words}\\.$"):
        read_table("somebody/set")


def test_an_unknown_sample_is_refused_with_the_known_ones():
    words = r"a sample must be one of authors-forget\.jsonl, .*, text\.jsonl, but got 'x'"
    with pytest.raises(UsageError, match=words):
        sample_path("x")
