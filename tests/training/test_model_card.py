import re
from dataclasses import replace

import yaml

from mollm.methods.method import OBJECTIVES
from mollm.system.folders import public
from mollm.training.history import StepRecord
from mollm.training.model_card import model_card


def record(step):
    values = dict.fromkeys(OBJECTIVES, step + 0.5)
    return StepRecord(step, 1e-5, values, values, {}, values, "DUAL", 0.5, {}, {})


def card(base_model="owner/model", source="forget.jsonl", steps=3):
    return model_card(
        base_model=base_model,
        data={"forget": {"source": source, "rows": 7, "sha256": "abc"}},
        settings={"method": "project"},
        history=[record(step) for step in range(steps)],
        versions={"torch": "2"},
        notes=["2 of 7 prompts were shortened."],
    )


HOSTILE = "<script>alert(1)</script> ![x](http://evil.example) `*a*` | b\n# c"


def test_nothing_in_a_card_acts():
    text = model_card(
        base_model=HOSTILE,
        data={HOSTILE: {"source": HOSTILE, "rows": 7, "sha256": HOSTILE}},
        settings={HOSTILE: HOSTILE},
        history=[],
        versions={HOSTILE: HOSTILE},
        notes=[HOSTILE],
        changes=[{"step": 2, "setting": HOSTILE, "was": HOSTILE, "is": [HOSTILE]}],
        failure=HOSTILE,
    )
    assert "<script" not in text
    body = text.split("---", 2)[2]
    assert "![" not in body
    assert "](http://evil" not in body
    assert "http://evil" not in body
    assert "\n# c" not in body
    for heading in ("Data", "Versions"):
        columns = {len(re.findall(r"(?<!\\)\|", row)) for row in rows(text, heading)}
        assert len(columns) == 1


def test_no_folder_of_the_machine_is_in_a_card():
    path = "/home/ada lovelace/data/x.jsonl"
    text = model_card(
        base_model="/home/ada/models/tiny",
        data={"forget": {"source": path, "rows": 7, "sha256": "abc"}},
        settings={"logging_dir": path, "options": {"deep": [path, "~/y/z"]}},
        history=[],
        versions={},
        notes=["see /home/ada/notes/n.txt and ~/y/w.txt."],
        changes=[{"step": 2, "setting": "logging_dir", "was": path, "is": None}],
    )
    assert "/home" not in text
    assert "ada" not in text
    assert "~/" not in text
    for name in ("tiny", "x.jsonl", "n.txt", "w.txt"):
        assert name in text


def test_skipped_steps_changes_and_failures_are_told():
    skipped = [replace(record(step), status="NON_FINITE" if step else "DUAL") for step in range(3)]
    text = model_card(
        base_model="m",
        data={},
        settings={"lr": 1},
        history=skipped,
        versions={},
        changes=[{"step": 2, "setting": "lr", "was": 2, "is": 1}],
        failure="it fell apart.",
    )
    assert "2 of 3 steps were skipped, because a gradient was not finite." in text
    assert "This run failed: it fell apart." in text
    assert "| 3 | `lr` | `2` | `1` |" in text


def header(text):
    return yaml.safe_load(text.split("---")[1])


def rows(text, heading):
    lines = text.partition(f"## {heading}\n")[2].partition("## ")[0].splitlines()
    return [line for line in lines if line.startswith("|")][2:]


def test_the_header_can_be_read_whatever_the_model_is_called():
    for name in ("owner/model", "run #3: 'best' \\ \"last\"", "@home", "[1]", "ô là"):
        assert header(card(name)) == {
            "library_name": "transformers",
            "base_model": name,
            "tags": ["unlearning", "mollm"],
        }


def test_cells_stay_cells_whatever_stands_in_them():
    (row,) = rows(card(source="a|b\nc.jsonl"), "Data")
    assert row == "| forget | a\\|b c.jsonl | 7 | `abc` |"


def test_some_twenty_steps_are_shown_the_first_and_the_last_among_them():
    assert rows(card(steps=0), "Weights") == []
    for steps in (1, 3, 20, 21, 1000):
        shown = [int(row.split("|")[1]) for row in rows(card(steps=steps), "Weights")]
        assert shown[0] == 1
        assert shown[-1] == steps
        assert len(shown) <= 21
        assert shown == sorted(set(shown))


def test_data_settings_versions_and_notes_are_told():
    text = card()
    assert "2 of 7 prompts were shortened." in text
    assert rows(text, "Settings") == ["| `method` | `project` |"]
    assert rows(text, "Versions") == ["| torch | 2 |"]
    assert "3 steps; losses before each" in text


def test_words_stay_where_a_setting_is_a_text_and_paths_in_it_are_short():
    assert public("Answer yes/no/maybe, and be kind.") == "Answer yes/no/maybe, and be kind."
    assert public("Read /home/ann/notes.txt first.") == "Read notes.txt first."
    assert public("/home/ann/my files/rows.jsonl") == "rows.jsonl"
    assert public("~/my files/rows.jsonl") == "rows.jsonl"
