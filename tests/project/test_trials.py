"""The pass of all that is tried on broken input, see tests/trials.py."""

import sys

import pytest
import trials

CALLS = """\
kind                                tried  refused  wrong
ops, invalid                         2000     2000      0
optimizer, made                       300      221      0
optimizer, saved states               100       56      1
    optimizer, saved states 0 15: AttributeError: it is None
all                                  2400     2277      1   103 s
2400 tried, 1 wrong

status 1
"""
KILLS = "run 0: 0.1 s, elsewhere: True\nrun 1: 8 s, too late: True\nkilled 1\n\nstatus 0\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "commit").write_text(trials.commit())
    (tmp_path / "fuzzed_calls.py-0.txt").write_text(CALLS)
    (tmp_path / "fuzzed_calls.py-1.txt").write_text(CALLS)
    (tmp_path / "killed_runs.py-0.txt").write_text(KILLS)
    (tmp_path / "hostile_files.py-0.txt").write_text("{'a': 7} 7 tried, 2 wrong, 9 s\nstatus 1\n")
    (tmp_path / "broken_files.py-0.txt").write_text("Traceback: it broke\nstatus 1\n")
    return tmp_path


def test_the_table_adds_up_what_the_parts_say(folder):
    found = trials.counted(folder)
    assert found["ops, invalid"] == {"tried": 4000}
    assert found["optimizer"] == {"tried": 800, "wrong": 2}
    assert found["killed_runs.py"] == {"tried": 1}
    assert found["hostile_files.py"] == {"tried": 7, "wrong": 2}
    assert found["broken_files.py"] == {"wrong": 1}, "a part that broke down is a fault"
    assert "| the solver | 0 | 0 |" in trials.table(folder)


def test_a_pass_goes_on_where_it_stopped_and_is_of_one_state_of_the_code(
    folder, monkeypatch, capsys
):
    asked = []
    monkeypatch.setattr(trials, "parts", lambda seeds: [["fuzzed_calls.py", "0"], ["x.py", "3"]])
    monkeypatch.setattr(
        trials.subprocess, "run",
        lambda argv, **options: asked.append(argv) or trials.subprocess.CompletedProcess(
            argv, 0, "1 tried, 0 wrong\n", ""),
    )  # fmt: skip
    monkeypatch.setattr(trials, "commit", lambda: (folder / "commit").read_text())
    for part in trials.parts(1):
        trials.run(part, folder)
    assert [argv[1:] for argv in asked] == [[str(trials.TESTS / "x.py"), "3"]]
    assert (folder / "x.py-3.txt").read_text().endswith("status 0\n")
    monkeypatch.setattr(sys, "argv", ["trials.py", str(folder)])
    (folder / "commit").write_text("another")
    monkeypatch.setattr(trials, "commit", lambda: "this")
    with pytest.raises(SystemExit, match="is a pass of another, and this is this"):
        trials.main()


def test_a_pass_has_a_hundred_thousand_calls_and_a_hundred_kills():
    parts = trials.parts(3)
    assert sum(int(part[-1]) for part in parts if part[0] == "fuzzed_calls.py") == 100_000
    assert sum(int(part[2]) for part in parts if part[0] == "killed_runs.py") == 100
    assert len({tuple(part) for part in parts}) == len(parts)
