"""The report: one page, nothing from outside, everything escaped, the curve drawn to scale."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("jinja2")

from mollm.audit import Audit, CurvePoint, Finding
from mollm.audit.report import panels, render, write_html, write_json

EVIL = "<script>alert('x')</script>&\"'"
ABOUT = {
    "model": EVIL,
    "original": "SmolLM2",
    "retain_only": None,
    "forget": "forget.jsonl",
    "device": EVIL,
    "versions": {"mollm": "0", EVIL: "1"},
    "finished": "2026-01-01",
}
CURVE = tuple(
    CurvePoint(size, f"{kind}, lr {lr:g}", share, base)
    for kind in ("full", "LoRA")
    for lr, share, base in ((5e-4, 0.25, 0.0), (1.5e-3, 1.4, 0.5))
    for size in (1, 10, 100)
)


def made(**changes):
    finding = Finding(
        *(EVIL, 0.5, (0.25, 0.75), 0.1, 0.3, "FAIL", EVIL, 0.45, 0.9, None, 12), setting=EVIL
    )
    settings = {"learning_rates": [5e-4], "seed": 0, "chat": {"template": None, "prompt": EVIL}}
    rows = {"forget": 24, "to teach": 12, "measured": 12}
    values = ("FAIL", (finding,), CURVE, {EVIL: EVIL}, (EVIL,), rows, settings)
    return Audit(*values, **changes)


class Page(HTMLParser):
    """Every element is closed, and what it is told is kept."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_escapes_all_that_it_is_given():
    page = Page(render(made(), ABOUT))
    assert "script" not in page.tags
    assert page.text.count(EVIL) >= 9
    assert "FAIL" in page.text
    assert "50%" in page.text
    assert "25% to 75%" in page.text


def test_the_page_needs_no_other_file_and_follows_the_colours_of_the_reader():
    text = render(made(), ABOUT)
    page = Page(text)
    assert not {"img", "link", "script", "iframe"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text


def test_the_curve_has_a_line_for_each_rate_and_model():
    page = Page(render(made(), ABOUT))
    assert page.tags.count("svg") == 2
    assert page.tags.count("polyline") == 2 * 2 * 2
    without = [CurvePoint(p.examples, p.setting, p.model, None) for p in CURVE]
    audit = made()
    page = Page(render(Audit(**{**vars(audit), "curve": tuple(without)}), ABOUT))
    assert page.tags.count("polyline") == 4
    page = Page(render(Audit(**{**vars(audit), "curve": ()}), ABOUT))
    assert "svg" not in page.tags


def test_the_curve_is_drawn_to_scale():
    full, lora = panels(CURVE)
    assert (full.title, lora.title) == ("full", "LoRA")
    low, high = full.lines
    (x1, y1), (x10, _), (x100, _) = low.model
    assert x10 - x1 == pytest.approx(x100 - x10)  # the axis is logarithmic
    ys = {label: y for y, label in full.ys}
    assert y1 == pytest.approx(ys["25%"], abs=0.1)
    assert high.model[0][1] == pytest.approx(ys["100%"], abs=0.1)  # not beyond the top
    assert high.retain_only[0][1] == pytest.approx(ys["50%"], abs=0.1)
    assert [size for _, size in full.xs] == [1, 10, 100]


def test_a_curve_of_one_point_is_drawn():
    (panel,) = panels(CURVE[:1])
    assert panel.lines[0].model == [(40.0, panel.lines[0].model[0][1])]


def test_the_files_say_the_same(tmp_path):
    audit = made(seconds=1.5)
    write_json(audit, ABOUT, tmp_path)
    write_html(audit, ABOUT, tmp_path)
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["verdict"] == "FAIL"
    assert found["about"]["model"] == EVIL
    (finding,) = found["findings"]
    keys = {"name", "value", "interval", "threshold", "verdict", "original", "retain_only"}
    assert keys <= finding.keys()
    assert finding["interval"] == [0.25, 0.75]
    assert len(found["curve"]) == len(CURVE)
    assert "1.5" in (tmp_path / "audit.html").read_text()


def test_no_page_says_certified():
    assert not re.search("certif", render(made(), ABOUT), re.IGNORECASE)
