"""The report: one page, nothing from outside, everything escaped, the curve drawn to scale."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("jinja2")

from reported_runs import ABOUT, CURVE
from reported_runs import EVIL_NAME as EVIL
from reported_runs import audit as made

from mollm.audit import Audit, CurvePoint
from mollm.audit.report import panels, render, write_html, write_json


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


def test_a_way_to_teach_is_a_panel_with_a_line_for_each_model_and_rate():
    full, lora = panels(CURVE)
    assert (full.title, lora.title) == ("full", "LoRA")
    assert list(full.rates) == ["lr 0.0005", "lr 0.0015"]
    base, model = full.curves[:2]
    assert (base.dashed, model.dashed) == (True, False)
    assert base.colour == model.colour == full.rates["lr 0.0005"]
    assert model.points == [(1, 0.25), (10, 0.25), (100, 0.25)]
    assert [share for _, share in full.curves[2].points] == [0.5] * 3
    assert full.compared
    assert panels([]) == []


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
