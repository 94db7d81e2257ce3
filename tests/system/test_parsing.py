import os
from pathlib import Path

import pytest

from mollm.errors import UsageError
from mollm.system.parsing import (
    is_file,
    is_folder,
    lines_of,
    parse_json_lines,
    parse_yaml,
    read_text,
    user_path,
)


def test_yaml_gives_plain_values():
    text = "a: 1\nb: [x, 1.5, true, null]\nc: {d: 2020-01-01}\n'on': '1'\ne: |\n  two\n  lines\n"
    assert parse_yaml(text, "run.yaml") == {
        "a": 1,
        "b": ["x", 1.5, True, None],
        "c": {"d": "2020-01-01"},
        "on": "1",
        "e": "two\nlines\n",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [x, x]\nb: [*a, *a]", r"must hold no alias \(\*\): write the value out.* line 2"),
        ("a: &a [*a]", "must hold no alias"),
        ("a: 1\na: 2", "must have every key once, but 'a' stands twice.* line 2, column 1"),
        ("a: {b: 1, b: 2}", "'b' stands twice"),
        ("1: 2", "must have texts as keys, but got 1: quote it"),
        ("on: yes", "must have texts as keys, but got True"),
        ("? [a]\n: b", "must have texts as keys"),
        ("a: !!python/object/apply:os.system ['true']", "no value with the tag tag:yaml.org"),
        ("a: !!python/name:os.system", "no value with the tag"),
        ("a: !!binary aGk=", "no value with the tag tag:yaml.org,2002:binary"),
        ("a: !!set {b}", "no value with the tag"),
        ("a: !own 3", "no value with the tag !own"),
        ("a: b: c", "mapping values are not allowed here"),
        ("--- 1\n--- 2", "expected a single document"),
        ("\x00", "special characters are not allowed"),
        ("[" * 50_000, "is nested too deeply to be read"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        ("a: 0x" + "f" * 5000, "must hold whole numbers of at most 64 bits"),
        ("a: !!int x", "must be valid YAML"),
        ("a: 1:30:00", "must hold numbers without colons, but got 1:30:00"),
        ("a: 1:30.5", "must hold numbers without colons, but got 1:30.5"),
        ("a: !!float ''", "must be valid YAML"),
        ("a: !!bool 7", "must be valid YAML"),
        ("a: !!map 3", "must hold a mapping"),
        ("x" * 2_000_000, "at most 262,144 characters"),
    ],
)
def test_yaml_of_another_kind_is_refused_in_a_sentence(text, words):
    with pytest.raises(UsageError, match=words) as caught:
        parse_yaml(text, "run.yaml")
    assert str(caught.value).startswith("run.yaml must") or "nested" in words
    assert "\n" not in str(caught.value)


def test_a_text_has_its_own_line_ends_and_no_mark(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert read_text(path) == "a\r\nb"
    with pytest.raises(UsageError, match="must have at most 3 bytes, but has 7"):
        read_text(path, 3)
    with pytest.raises(UsageError, match="must be a file, but it is a folder"):
        read_text(tmp_path)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_text(tmp_path / "b")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-here/x"])
def test_what_cannot_be_a_path_is_neither_file_nor_folder(name):
    path = user_path(name)
    assert not is_file(path)
    assert not is_folder(path)
    assert user_path("~") == Path.home()


def test_what_may_never_end_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UsageError, match="must be a file, but it is a pipe, a socket or a dev"):
            read_text(path)


@pytest.mark.parametrize("before", [b"", b"a\nb\n"])
def test_a_hole_in_a_file_is_refused_before_it_fills_the_memory(tmp_path, before):
    path = tmp_path / "a"
    path.write_bytes(before)
    os.truncate(path, 1 << 40)  # takes no room on the disk
    line = before.count(b"\n") + 1
    with pytest.raises(UsageError, match=f"line {line} must hold no null character"):
        read_text(path, None)
    with pytest.raises(UsageError, match="must have at most 268,435,456 bytes"):
        read_text(path)


def test_the_byte_that_is_no_utf_8_is_named(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * (1 << 20) + b"\xff")
    with pytest.raises(UsageError, match="its byte 1048576 is not"):
        read_text(path)


def test_a_line_of_json_ends_at_a_line_feed_alone():
    odd = "a\u2028b\u2029c\x85d"
    text = f'{{"a": "{odd}"}}\r\n\n  \n[1]'
    assert list(parse_json_lines(text, "rows.jsonl")) == [(1, {"a": odd}), (4, [1])]
    assert list(parse_json_lines("", "rows.jsonl")) == []


def test_a_line_that_is_cut_is_named_and_those_above_it_are_given():
    rows = parse_json_lines('{"a": 1}\n\n{"a": ', "rows.jsonl")
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(UsageError, match=r"rows\.jsonl, line 3 is malformed JSON at column"):
        next(rows)


def test_the_lines_of_a_person_s_text():
    assert lines_of("a\u2028b\r\nc\rd\x0ce\n") == ["a\u2028b", "c", "d\x0ce"]
    assert lines_of("") == [""]
