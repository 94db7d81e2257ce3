import json

import chat_templates
import pytest
import tiny
import torch

pytest.importorskip("transformers")

from mollm import UsageError, preview
from mollm.cli import main
from mollm.commands.preview import shown
from mollm.models import loading
from mollm.system import machine

ROWS = [("Who?", "Ann."), ("When?", "In \x1b[2J1950."), ("Who?", "Ann.")]


@pytest.fixture
def words(tmp_path):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    for name, rows in (("forget", ROWS), ("retain", [("Where?", "Here."), ROWS[0]])):
        lines = [json.dumps({"question": q, "answer": a}) for q, a in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return [
        "preview",
        *("--model", str(tmp_path / "tiny")),
        *("--forget", str(tmp_path / "forget.jsonl")),
        *("--retain", str(tmp_path / "retain.jsonl")),
    ]


def test_it_is_refused_as_the_run_would_be(words, capsys):
    assert main(words) == 2
    assert "at most half of the rows to forget" in capsys.readouterr().err


@pytest.fixture
def few_shared(words):
    path = words[4]
    with open(path, "a") as file:
        file.write("".join(f'\n{{"question": "Is it {n}?", "answer": "Yes."}}' for n in range(4)))
    return words


def test_a_pipe_gets_marks_and_no_control_characters(few_shared, capsys):
    assert main([*few_shared, "--set", "max_length=100"]) == 0
    out = capsys.readouterr().out
    assert "<|start|>assistant\n  ⟦Ann.<|end|>⟧" in out
    assert "\x1b" not in out
    assert "\\x1b[2J1950" in out
    assert "1 of 7 repeat an earlier row of the set: line 3" in out
    assert "2 of 7 are to be forgotten and retained: line 1, line 3" in out
    assert "nothing to forget: 7 of 7 answers, line 1" in out


def test_json_holds_the_same(few_shared, capsys):
    assert main([*few_shared, "--json", "--no-known", "--rows", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sets"]["forget"]["duplicates"] == ["line 3"]
    assert found["likelihoods"] is None
    row = found["sets"]["forget"]["shown"][0]
    assert "".join(p["text"] for p in row["pieces"] if p["carries_loss"]) == "Ann.<|end|>"


def test_colour_in_place_of_marks(few_shared):
    found = preview(few_shared[2], few_shared[4], few_shared[6], rows=1)
    text = shown(found, colour=True)
    assert "\x1b[1;30;43mAnn." in text
    assert "⟦" not in text


def test_a_long_row_is_cut_in_the_middle(few_shared):
    rows = [{"text": "line\n" * 50}]
    found = preview(few_shared[2], rows, [{"text": "other"}], rows=1)
    assert "lines …" in shown(found, colour=False, most_lines=6)


def test_a_negative_number_of_rows_is_refused(few_shared):
    with pytest.raises(UsageError, match="rows must not be negative"):
        preview(few_shared[2], few_shared[4], few_shared[6], rows=-1)


def test_what_is_missing_is_named(capsys):
    assert main(["preview", "--model", "x"]) == 2
    assert "forget must be given" in capsys.readouterr().err


def test_a_date_in_the_template_is_said(few_shared, capsys):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = chat_templates.LLAMA_3
    loading.save(tiny.model(), tokenizer, few_shared[2])
    assert main([*few_shared, "--no-known"]) == 0
    said = "The chat template writes a date: it is "
    assert said in capsys.readouterr().out
    loading.save(tiny.model(), tiny.tokenizer(), few_shared[2])
    assert main([*few_shared, "--no-known"]) == 0
    assert said not in capsys.readouterr().out


def test_large_weights_are_loaded_on_request_alone(few_shared, capsys, monkeypatch):
    loaded = []
    load = loading.load

    def noting(source, device, dtype):
        loaded.append((device.type, dtype))
        return load(source, device, dtype)

    monkeypatch.setattr(loading, "load", noting)
    monkeypatch.setattr(machine, "available_memory", lambda device: 1000)
    assert main(few_shared) == 0
    assert "GiB: add --known to load them." in capsys.readouterr().out
    assert not loaded
    assert main([*few_shared, "--known", "--set", "dtype=bfloat16", "--set", "device=cpu"]) == 0
    assert "nothing to forget: 7 of 7 answers" in capsys.readouterr().out
    assert loaded == [("cpu", torch.bfloat16)]
