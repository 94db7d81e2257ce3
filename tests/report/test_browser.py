"""The report in a real browser; skipped where there is none."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jinja2")

import reported_runs as runs

from mollm.audit import report as audit_page
from mollm.report.page import read_reported, render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
AXE = next(
    (
        path
        for path in (
            Path(os.environ.get("AXE_CORE", "node_modules/axe-core/axe.min.js")),
            *(Path(place) / "axe_core_python/axe.min.js" for place in sys.path),
        )
        if path.is_file()
    ),
    None,
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, and it is not installed")

FRAME = """<!doctype html><title>frame</title><body style="margin:0"><script>
addEventListener('message', e => {{ document.body.textContent = e.data; }});
</script><iframe style="border:0;width:{width}px;height:1200px" srcdoc="{page}"></iframe>"""
LOOK = """<script>
const errors = [];
addEventListener('error', e => errors.push(e.message));
addEventListener('load', async () => {
  const wide = [...document.querySelectorAll('body *')].filter(
    e => !e.closest('thead') && e.getBoundingClientRect().right > innerWidth + 1
  ).map(e => e.outerHTML.slice(0, 80));
  const found = { errors, wide, width: innerWidth, scroll: document.documentElement.scrollWidth,
    requests: performance.getEntriesByType('resource').map(r => r.name),
    charts: [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height) };
  if (window.axe) {
    const { violations } = await axe.run();
    found.axe = violations.map(v => [v.impact, v.id, v.nodes[0].html.slice(0, 120)]);
  }
  parent.postMessage('LOOKED' + JSON.stringify(found) + 'LOOKED', '*');
});
</script>"""


@pytest.fixture
def pages(tmp_path):
    first, second = runs.run(tmp_path / "one"), runs.run(tmp_path / "two", steps=300)
    for folder in (first, second):
        runs.evaluated(folder / "evaluation")
        runs.evaluated(folder / "evaluation/original", value=0.5)
        runs.audited(folder)
    read = read_reported(first), read_reported(second)
    audit = audit_page.render(runs.audit(), runs.ABOUT)
    return {"one": render(read[:1]), "two": render(read), "audit": audit}


def look(page, folder, width, *, script=""):
    inner = page.replace("</head>", f"<script>{script}</script>{LOOK}</head>")
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(inner)), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]
    command = [CHROMIUM, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return json.loads(html.unescape(re.search(r"LOOKED(.*)LOOKED", done.stdout, re.DOTALL)[1]))


@pytest.mark.parametrize("width", [390, 1100])
@pytest.mark.parametrize("name", ["one", "two", "audit"])
def test_it_fits_loads_nothing_and_is_without_errors(name, width, pages, tmp_path):
    found = look(pages[name], tmp_path, width)
    assert found["width"] == width
    assert not found["wide"]
    assert found["scroll"] <= width
    assert not found["errors"]
    assert not found["requests"]
    assert len(found["charts"]) == {"one": 7, "two": 3, "audit": 2}[name]
    assert min(found["charts"]) > 40


@pytest.mark.skipif(
    AXE is None,
    reason="needs axe-core: pip install axe-core-python, npm install axe-core, or AXE_CORE",
)
@pytest.mark.parametrize("name", ["one", "two", "audit"])
def test_everybody_can_read_it(name, pages, tmp_path):
    found = look(pages[name], tmp_path, 1100, script=AXE.read_text(encoding="utf-8"))
    assert [v for v in found["axe"] if v[0] in ("serious", "critical")] == []
