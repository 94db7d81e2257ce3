import contextlib
import csv
import http.server
import json
import math
import os
import random
import threading

import pyarrow as pa
import pyarrow.parquet as pq
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
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a\.jsonl, line 2 is malformed JSON at column 7: "),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', r"a\.jsonl, line 2 .* but got \[1, 2\]"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', r"a\.json is malformed JSON at column 6 of line 2"),
        ("a.json", '[{"a": 1}, "b"]', r'a\.json, row 2 must hold one JSON object, but got "b"'),
        ("a.json", "[]", r"a\.json must hold at least one row"),
        ("a.jsonl", "\n \n", r"a\.jsonl must hold at least one row"),
        ("a.csv", "a,b\n", r"a\.csv must hold at least one row"),
        ("a.csv", "", r"a\.csv must hold at least one row"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"a\.csv, line 3 must have 2 cells .* but it has 3"),
        ("a.csv", "a,b\n1\n", r"a\.csv, line 2 must have 2 cells .* but it has 1"),
        ("a.csv", "a,b\n1,\0\n", r"a\.csv, line 2 must hold no null character"),
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
    monkeypatch.setattr(files, "load_from_hub", lambda *_: pytest.fail("asked the hub"))
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
    save(ROWS, folder / "test.jsonl")
    assert [dict(row) for _, row in read_table(folder).rows] == ROWS[:1]
    test = read_table(folder, split="test")
    assert [number for number, _ in test.rows] == [1, 2, 3, 4]
    assert test.name == str(folder / "test.jsonl")
    with pytest.raises(UsageError, match=r"split nosuch, such as nosuch\.jsonl, but it holds test"):
        read_table(folder, split="nosuch")
    with pytest.raises(UsageError, match="config must not be given for a folder, but got 'forget"):
        read_table(folder, config="forget10")


def test_a_split_may_be_in_parts_and_in_the_folder_data(tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(2):
        rows = ROWS[2 * number : 2 * number + 2]
        save(rows, tmp_path / "data" / f"train-0000{number}-of-00002.parquet")
    table = read_table(tmp_path)
    assert [dict(row) for _, row in table.rows] == ROWS
    assert [number for number, _ in table.rows] == [1, 2, 3, 4]
    assert (table.name, table.unit) == (f"{tmp_path} train", "row")
    (tmp_path / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(UsageError, match=r"or all of its parts, .* train-00000-of-00002\.parquet"):
        read_table(tmp_path)


def test_the_only_file_of_a_folder_needs_no_split_and_several_do(tmp_path):
    save(ROWS, tmp_path / "people.csv")
    assert len(list(read_table(tmp_path).rows)) == len(ROWS)
    save(ROWS, tmp_path / "places.csv")
    with pytest.raises(
        UsageError, match=r"holds people\.csv, places\.csv: name the split or the f"
    ):
        read_table(tmp_path)
    save(ROWS, tmp_path / "train.csv")
    save(ROWS, tmp_path / "train.jsonl")
    with pytest.raises(UsageError, match=r"one file of the split train.* train\.csv, train\.jsonl"):
        read_table(tmp_path)


def test_a_folder_without_rows_is_refused(tmp_path):
    (tmp_path / "train.txt").write_text("a")
    os.mkfifo(tmp_path / "train.jsonl")  # to open it would be to wait for ever
    with pytest.raises(
        UsageError, match=r"must hold files of rows \(\.jsonl, .* but it holds none"
    ):
        read_table(tmp_path)


@pytest.fixture
def address():
    """Where a server on this machine answers, and the requests that it got."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            body = b'{"prompt": "from", "answer": "elsewhere"}\n'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/x.jsonl", requests
        server.shutdown()


@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml", "dataset_infos.json"])
def test_what_a_folder_says_of_itself_fetches_and_reads_nothing(tmp_path, address, card):
    url, requests = address
    folder = tmp_path / "set"
    folder.mkdir()
    save(ROWS, folder / "rows.csv")
    save([{"prompt": "a", "answer": "secret"}], tmp_path / "secret.jsonl")
    for named in (url, "../secret.jsonl", str(tmp_path / "secret.jsonl")):
        says = f"configs:\n- config_name: default\n  data_files: {named}\n"
        (folder / card).write_text(f"---\n{says}---\n" if card.endswith(".md") else says)
        assert [dict(row) for _, row in read_table(folder).rows] == ROWS
    assert requests == []


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_not(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    save(ROWS, tmp_path / "secret.jsonl")
    (folder / "train.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(
        UsageError, match=r"train\.jsonl must lie in .*set, but it is a link to .*se"
    ):
        read_table(folder)
    (folder / "train.jsonl").unlink()
    (folder / "data").symlink_to(tmp_path)
    with pytest.raises(UsageError, match=r"secret\.jsonl must lie in .*set, but it is a link"):
        read_table(folder)
    (folder / "data").unlink()
    save(ROWS, folder / "rows.json")
    (folder / "train.json").symlink_to("rows.json")
    assert len(list(read_table(folder).rows)) == len(ROWS)


def test_no_copy_of_data_on_this_machine_is_left_in_a_cache(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for ending in ("jsonl", "json", "csv", "parquet"):
        list(read_table(save(ROWS, folder / f"{ending}.{ending}")).rows)
        list(read_table(folder, split=ending).rows)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    list(read_table(tmp_path / "saved").rows)
    assert not (tmp_path / "cache").exists()


def test_a_saved_data_set_is_read_with_and_without_splits(tmp_path):
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one", num_shards=2)
    table = read_table(tmp_path / "one")
    assert [dict(row) for _, row in table.rows] == ROWS
    assert table.name == str(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([2])}).save_to_disk(tmp_path / "two")
    assert [dict(row) for _, row in read_table(tmp_path / "two", split="test").rows] == ROWS[2:3]
    with pytest.raises(UsageError, match="have the split dev, but its splits are train, test"):
        read_table(tmp_path / "two", split="dev")
    with pytest.raises(UsageError, match="one data set without splits, but got 'dev'"):
        read_table(tmp_path / "one", split="dev")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../two/data-00000-of-00001.arrow", r"must name files beside it, but got \"\.\./two"),
        ("/etc/hostname", "must name files beside it"),
        (7, "must name files beside it, but got 7"),
        ("gone.arrow", r"gone\.arrow must be there, since state\.json beside it names it"),
        ("state.json", r"state\.json cannot be read"),
        ("linked.arrow", r"linked\.arrow must lie in .*one, but it is a link"),
    ],
)
def test_a_saved_data_set_names_its_own_files_alone(tmp_path, name, words):
    for folder in ("one", "two"):
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / folder)
    target = next((tmp_path / "two").glob("*.arrow"))
    (tmp_path / "one" / "linked.arrow").symlink_to(target)
    state = tmp_path / "one" / "state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(UsageError, match=words):
        read_table(tmp_path / "one")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("[1]", r"state\.json must hold one JSON object, but got \[1\]"),
        ('{"a": 1, "a": 2}', r"state\.json cannot be read as JSON: the key 'a' stands twice"),
        ("{}", "must hold at least one row"),
        ('{"_data_files": 3}', r"state\.json must list its files, but got 3"),
        ('{"_indices_data_files": [1]}', r"flatten_indices\(\) before save_to_disk\(\)"),
    ],
)
def test_a_saved_data_set_with_another_state_is_refused(tmp_path, state, words):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(UsageError, match=words):
        read_table(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": "x", "a": "y"}', "the key 'a' stands twice in one object"),
        ("[" * 100_000, "is nested too deeply to be read"),
        ('{"a": ' * 100_000, "is nested too deeply to be read"),
        (f'{{"a": {"9" * 5000}}}', "cannot be read as JSON: Exceeds the limit"),
    ],
)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_json_that_is_not_to_be_read_is_refused_in_a_sentence(write, ending, text, words):
    with pytest.raises(UsageError, match=words) as caught:
        read_table(write(f"a.{ending}", text))
    assert len(str(caught.value)) < 500


def test_what_json_of_python_allows_is_read_as_it_is(write):
    text = '{"a": NaN, "b": "nul \\u0000", "c": "half \\ud800", "d": 1e999}'
    ((_, row),) = read_table(write("a.jsonl", text)).rows
    assert math.isnan(row["a"])
    assert (row["b"], row["c"], row["d"]) == ("nul \0", "half \ud800", math.inf)


def test_a_small_file_that_unpacks_to_gigabytes_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    column = pa.DictionaryArray.from_arrays(pa.repeat(0, 4000).cast("int32"), ["x" * 1_000_000])
    pq.write_table(pa.table({"prompt": column, "answer": column}), path)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(UsageError, match="must not unpack to more than 268,435,456 bytes"):
        read_table(path)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_damaged_file_is_refused_or_read(tmp_path, kind):
    if kind == "parquet":
        path = source = save(ROWS, tmp_path / "a.parquet")
    else:
        source = tmp_path
        datasets.Dataset.from_list(ROWS).save_to_disk(source)
        path = next(source.glob("*.arrow"))
    whole = path.read_bytes()
    rng = random.Random(0)
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UsageError, match=r"cannot be read|must hold at least one row"):
            read_table(source)
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(UsageError):
            read_table(source)


@pytest.mark.parametrize(
    "name", ["x" * 5000, "a\0b", "~nobody-here/x", "forget", "a/../b", "a/b/c"]
)
def test_what_is_no_name_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(files, "load_from_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(
        UsageError, match=r"on the hub \(OWNER/NAME\), but got .*not on this machine"
    ):
        read_table(name)


@pytest.mark.parametrize("options", [{"config": 3}, {"split": ["train"]}])
def test_config_and_split_are_names(tmp_path, options):
    with pytest.raises(UsageError, match="must be a name, but got"):
        read_table(tmp_path, **options)


def test_an_unknown_sample_is_refused_with_the_known_ones():
    words = r"a sample must be one of authors-forget\.jsonl, .*, text\.jsonl, wmdp, but got 'x'"
    with pytest.raises(UsageError, match=words):
        sample_path("x")
