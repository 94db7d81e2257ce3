import io
import sys
import types

import pytest

from mollm.system import terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("settings", "stream", "shown"),
    [
        ({}, io.StringIO(), False),
        ({}, Terminal(), True),
        ({"NO_COLOR": "1"}, Terminal(), False),
        ({"FORCE_COLOR": "1"}, io.StringIO(), True),
        ({"TERM": "dumb"}, Terminal(), False),
    ],
)
def test_when_there_is_colour(settings, stream, shown, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert terminal.has_colour(stream) == shown


def test_each_line_is_painted_for_itself():
    assert terminal.paint("a\n\nb", "bad", colour=True) == "\x1b[31ma\x1b[0m\n\n\x1b[31mb\x1b[0m"
    assert terminal.paint("a", "bad", colour=False) == "a"


def test_what_would_act_on_the_terminal_is_shown():
    assert terminal.printable("a\x1b[2Jb\tc\nd\u202e") == "a\\x1b[2Jb\tc\nd\\x202e"


def test_wide_letters_count_twice():
    assert terminal.width_of("a日e\u0301") == 4


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    "text", ["one two three four", "日本語の文字は広い", "a\n\nb", "x" * 30, ""]
)
def test_lines_fit_and_lose_nothing_but_spaces(text, size):
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    lines = list(terminal.wrapped(pieces, 9))
    assert all(terminal.width_of(line) <= 9 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert lines == list(terminal.wrapped([text], 9))


def test_a_line_is_there_as_soon_as_it_is_full():
    def pieces():
        yield "one two "
        yield "three"
        raise AssertionError("asked for too much")

    assert next(terminal.wrapped(pieces(), 9)) == "one two"


def test_columns_stand_beside_each_other():
    lines = list(terminal.side_by_side([["a", "b"], ["日", "y", "z"]], 4))
    assert lines == ["a    │ 日", "b    │ y", "     │ z"]


def test_progress_without_a_terminal_is_a_line_now_and_then():
    out = io.StringIO()
    with terminal.progress(100, "Asking", out) as done:
        for _ in range(100):
            done(1)
    lines = out.getvalue().splitlines()
    assert 9 <= len(lines) <= 11
    assert lines[0].startswith("Asking 10%")
    assert lines[-1] == "Asking 100%, 0 s left"


def test_progress_on_a_terminal_is_a_bar():
    pytest.importorskip("tqdm")
    out = Terminal()
    with terminal.progress(2, "Asking", out) as done:
        done(1)
    assert "Asking" in out.getvalue()
    assert "left" in out.getvalue()


def test_nothing_to_do_shows_nothing():
    out = io.StringIO()
    with terminal.progress(0, "Asking", out) as done:
        done(1)
    assert out.getvalue() == ""


def test_a_notebook_is_told_by_its_kernel_and_its_widgets(monkeypatch):
    assert not terminal.in_notebook()
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    for widgets in (True, False):
        monkeypatch.setattr(terminal, "find_spec", lambda name, there=widgets: there or None)
        assert terminal.in_notebook() == widgets
    shell.config = {"TerminalIPythonApp": {}}
    assert not terminal.in_notebook()
