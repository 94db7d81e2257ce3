"""The README: short, every block runs as it is printed, and the table says what the study says."""

from __future__ import annotations

import re
import shlex

import pytest

pytest.importorskip("transformers")

import pages

from mollm import cli
from mollm.methods.common_descent import COMMON_DESCENT

README = (pages.ROOT / "README.md").read_text(encoding="utf-8")
STUDY = (pages.ROOT / "docs/study.md").read_text(encoding="utf-8")
OURS = {method.name for method in COMMON_DESCENT}
SECTIONS = {
    **{f"facts, K = {k}": f"Synthetic facts, {k} objectives" for k in (2, 3, 4, 6, 8)},
    "TOFU forget10, small Llama": "TOFU forget10 on a small Llama",
}


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return pages.furnish(tmp_path)


def test_it_is_short():
    assert len(README) <= 7000


def test_every_block_is_of_a_kind_that_a_test_runs():
    assert set(re.findall(r"^```(\w*)\n(?=.)", README, flags=re.MULTILINE)) == {"python", "sh"}


@pytest.mark.parametrize("block", pages.blocks(README, "python"))
def test_python_runs_as_printed(block, scene, tmp_path):
    exec(block, scene)
    if "MOLLMTrainer" in block:
        assert (tmp_path / "runs/forget/model/config.json").is_file()
        assert scene["trainer"].history
    else:
        assert scene["optimizer"].last_step.conflicts.keys() == {"forget", "kl", "retain"}


def test_the_shell_lines_of_mollm_run_one_after_the_other(scene, tmp_path):
    lines = [shlex.split(line) for line in pages.commands(README) if line.startswith("mollm ")]
    assert [words[1] for words in lines] == ["plan", "unlearn", "evaluate"]
    for words in lines:
        assert cli.main(words[1:]) == 0, words
    assert (tmp_path / "runs/shell/model/config.json").is_file()


def test_every_make_target_and_extra_that_the_documents_name_exists():
    targets = set(re.findall(r"^(\w+):", (pages.ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    extras = set(
        re.findall(r"^(\w+) = \[\"", (pages.ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    )
    for path in (pages.ROOT / "CONTRIBUTING.md", *pages.ROOT.glob("docs/**/*.md"), None):
        text = README if path is None else path.read_text(encoding="utf-8")
        assert set(re.findall(r"(?:^|`)make (\w+)", text, flags=re.MULTILINE)) <= targets, path
        named = re.findall(r"pip install \"?(?:\.|mollm)\[([\w,]+)\]", text)
        assert {extra for group in named for extra in group.split(",")} <= extras, path
    assert {"demo", "test", "docs"} <= targets


# ---- the table


def study_rows(section):
    """By method: hypervolume with interval as the README writes it."""
    (text,) = re.findall(
        rf"^## {re.escape(section)}\n(.*?)(?=^## )", STUDY, re.DOTALL | re.MULTILINE
    )
    cells = [line.split("|")[1:] for line in text.splitlines() if line.startswith("| ")]
    return {c[0].strip(): f"{c[1].strip()} ({c[2].strip()})" for c in cells if "–" in c[2]}


def readme_rows():
    lines = README.split("| task |")[1].split("\n\n")[0].splitlines()[2:]
    return {
        cells[1].strip(): [c.strip() for c in cells[2:-1]]
        for cells in (line.split("|") for line in lines)
    }


def test_the_table_has_a_row_for_every_task_that_all_methods_ran():
    assert readme_rows().keys() == SECTIONS.keys()


@pytest.mark.parametrize("task", SECTIONS)
def test_a_row_says_what_the_study_says(task):
    row, study = readme_rows()[task], study_rows(SECTIONS[task])
    plain = [cell.replace("*", "") for cell in row]
    unit = {name: study[name] for name in ("project-unit", "upgrad-unit")}
    baselines = {n: v for n, v in study.items() if n.partition("+")[0] not in OURS}
    assert plain == [study["mollm"], max(unit.values()), max(baselines.values()), study["sum"]]
    assert [cell.startswith("**") for cell in row] == [cell == max(plain) for cell in plain]
