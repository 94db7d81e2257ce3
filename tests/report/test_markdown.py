"""Texts of strangers in a card."""

from __future__ import annotations

import re

import pytest

from mollm.report.markdown import as_code, as_text

ACTS = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&lt;b&gt;", "![x](http://evil)",
    "[x](javascript:alert(1))", "[x]: http://evil", "<javascript:alert(1)>", "http://evil.example",
    "www.evil.example", "ann@evil.example", "`code`", "``` ", "a|b", "# heading", "> quote",
    "- item", "+ item", "1. item", "2) item", "---", "===", "$x^2$", "@ann", "*a* _b_ ~c~",
    "a\n\n# b", "\\[x\\](y)", "| a | b |\n|---|---|", "<!-- x", "{{ x }}", "a  \nb",
)  # fmt: skip


@pytest.mark.parametrize("text", ACTS)
@pytest.mark.parametrize("show", [as_text, as_code])
def test_nothing_in_a_text_acts(text, show):
    markdown = pytest.importorskip("markdown_it")
    shown = show(text)
    assert "\n" not in shown
    reader = markdown.MarkdownIt("gfm-like", {"html": True, "linkify": False}).enable("table")
    for where in (shown, f"| a | b |\n| --- | --- |\n| {shown} | 2 |"):
        html = reader.render(where)
        tags = set(re.findall(r"<(\w+)", html)) - {"p", "table", "thead", "tbody", "tr", "th", "td"}
        assert tags <= ({"code"} if show is as_code else set())
        assert html.count("<td") == (0 if where == shown else 2)
        words = re.sub(r"<[^>]+>", "", html)
        kept = (
            " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        )
        assert kept in words.replace("&quot;", '"')


@pytest.mark.parametrize(
    "text", ["www.evil.example", "http://evil", "a@evil.example", "@ann", "$x$"]
)
def test_what_sites_make_links_and_formulas_of_is_broken_up(text):
    assert "\\" in as_text(text)


def test_what_turns_a_line_around_shows_as_a_sign():
    for show in (as_text, as_code):
        assert "\u202e" not in show("a\u202eb")
        assert "x202e" in show("a\u202eb")
        assert "\x1b" not in show("a\x1b[31mb")


def test_of_a_path_the_last_part_is_shown():
    assert as_text("see /home/ada/notes.txt.") == "see notes.txt."
    assert as_code("/home/ada/notes.txt") == "`notes.txt`"
    assert as_code("") == ""
