"""Files are written whole or not at all, and JSON lines are read in one way."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WRITES = {
    "mollm/system/folders.py": "is what writes whole files",
    "mollm/system/child.py": "writes to a pipe",
    "mollm/cli.py": "writes the log of a defect, which nobody reads back",
    "mollm/evaluation/journal.py": "adds lines, of which a cut one is thrown away",
    "mollm/training/checkpoint.py": "writes into a folder that gets its name when it is whole",
    "mollm/training/serialization.py": "does so too",
    "mollm/training/reference_model.py": "does so too",
    "mollm/training/trainer.py": "writes a temporary folder that is sent to the hub",
}
"""Files that write by themselves, and why they may."""
SPLITS = {"mollm/system/machine.py": "reads files of the kernel"}


def calls_of(path: Path) -> set[str]:
    """The names of all functions and methods that are called in a file."""
    called = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    names = {f.attr for f in called if isinstance(f, ast.Attribute)}
    return names | {f.id for f in called if isinstance(f, ast.Name)}


def files_that_call(*names: str) -> set[str]:
    found = (ROOT / "mollm").rglob("*.py")
    return {str(p.relative_to(ROOT)) for p in found if calls_of(p) & set(names)}


def test_what_is_written_is_written_whole():
    assert files_that_call("write_text", "write_bytes", "save_file", "open") - set(WRITES) <= {
        "mollm/data/formats.py", "mollm/models/checks.py", "mollm/report/ledger.py",
        "mollm/system/parsing.py",
    }  # fmt: skip  # read


def test_lines_are_split_where_a_line_feed_is():
    assert files_that_call("splitlines", "readlines") == set(SPLITS)


def test_json_lines_have_one_reader():
    by_hand = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "mollm").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.For | ast.comprehension)
        if "split('\\n')" in ast.unparse(node.iter)
        if {"loads", "parse_json"} & calls_of(path)
    ]
    assert by_hand == ["mollm/system/parsing.py"]
