import yaml

from mollm.methods.method import OBJECTIVES
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
