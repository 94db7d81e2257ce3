"""The documentation: its code runs, its commands are accepted, and no public name is missing."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import shutil

import pytest

pytest.importorskip("transformers")

import pages

from mollm.cli import _parser
from mollm.commands.settings_file import read_settings
from mollm.methods import METHODS
from mollm.training.config import MOLLMConfig

DOCS = pages.ROOT / "docs"
PAGES = {
    str(path.relative_to(DOCS)): path.read_text(encoding="utf-8")
    for path in sorted(DOCS.glob("**/*.md"))
}
PACKAGES = (
    *("mollm", "mollm_ops", "mollm_ops.reference"),
    *("mollm.methods", "mollm.evaluation", "mollm.audit"),
)
SETTINGS = pages.blocks(PAGES["guide/trainer.md"], "yaml")[0]


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(SETTINGS)
    shutil.copytree(pages.ROOT / "recipes", tmp_path / "recipes")
    return pages.furnish(tmp_path)


@pytest.mark.parametrize("name", [n for n, text in PAGES.items() if pages.blocks(text, "python")])
def test_the_python_of_a_page_runs(name, scene):
    for block in pages.blocks(PAGES[name], "python"):
        exec(block, scene)


def sides(text):
    """What the loop of a diff was before and after."""
    (block,) = pages.blocks(text, "diff")
    for sign in "-+":
        yield "\n".join(line[1:] for line in block.splitlines() if line[:1] in ("", " ", sign))


@pytest.mark.parametrize("code", sides(PAGES["guide/optimizer.md"]), ids=["before", "after"])
def test_both_sides_of_the_diff_run(code, scene):
    before = [p.detach().clone() for p in scene["model"].parameters()]
    exec(code, scene)
    now = list(scene["model"].parameters())
    assert any(not p.equal(b) for p, b in zip(now, before, strict=True))
    assert all(p.isfinite().all() for p in now)


COMMANDS = [
    (name, shlex.split(line)[shlex.split(line).index("mollm") + 1 :])
    for name, text in PAGES.items()
    for line in (command.partition(" > ")[0] for command in pages.commands(text))
    if re.match(r"(mollm|torchrun .* -m mollm) ", line)
]


@pytest.mark.parametrize(("name", "words"), COMMANDS, ids=[f"{n} {w[0]}" for n, w in COMMANDS])
@pytest.mark.usefixtures("scene")
def test_a_command_is_accepted(name, words):
    given = vars(_parser().parse_args(words))
    if words[0] == "unlearn":
        own = ("run", "resume")
        read_settings({name: value for name, value in given.items() if name not in own})


def test_the_settings_of_the_memory_page_are_those_of_the_optimizer():
    pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
    texts = re.findall(r'`--set "(optimizer_options=.*?)"`', PAGES["guide/memory.md"])
    assert len(texts) == 6
    for text in texts:
        MOLLMConfig(output_dir="runs", **read_settings({"set": [text]}))


def test_every_public_name_is_in_the_reference():
    shown = set(
        re.findall(
            r"^\.\. (?:auto|py:)\w+:: ([\w.]+)", "\n".join(PAGES.values()), flags=re.MULTILINE
        )
    )
    for package in PACKAGES:
        module = importlib.import_module(package)
        missing = {f"{package}.{name}" for name in module.__all__} - shown
        assert not missing
    assert {"mollm.distributed.answer_tokens", "mollm.distributed.expect_backward"} <= shown


def test_every_method_is_in_the_reference():
    (table,) = re.findall(r"^\| `METHODS.*?\n\n", PAGES["api/methods.md"], re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"`([a-z][a-z-]*)`", table)) == METHODS.keys()


def test_every_page_is_in_the_contents():
    listed = re.findall(r"^(?:.* <)?([\w/]+)>?$", PAGES["index.md"], flags=re.MULTILINE)
    listed += [
        f"api/{name}" for name in re.findall(r"^(\w+)$", PAGES["api/index.md"], re.MULTILINE)
    ]
    assert {name.removesuffix(".md") for name in PAGES} - {"index"} <= set(listed)


def test_the_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    notebook = nbformat.read(DOCS / "notebooks/unlearn.ipynb", as_version=4)
    client.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    texts = ["".join(str(o) for o in c.outputs) for c in notebook.cells if c.cell_type == "code"]
    assert "'forget': 0.0" in texts[3]


def test_the_picture_is_what_its_script_draws():
    script = DOCS / "figures/draw_cone.py"
    drawn = runpy.run_path(str(script))["draw"]()
    assert drawn == script.with_name("direction.svg").read_text(encoding="utf-8")
