import io
import json

import pytest
import tiny

pytest.importorskip("transformers")

import reported_runs

from mollm.cli import main
from mollm.models import loading
from mollm.report.run_file import model_of, original_of

FEW = ["--max-new-tokens", "3"]


@pytest.fixture
def run(tmp_path):
    """A run whose original is another model."""
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    folder = reported_runs.run(tmp_path / "run", model=str(tmp_path / "tiny"))
    loading.save(tiny.model(seed=1), tiny.tokenizer(), folder / "model")
    return folder


def test_the_run_says_what_its_original_was(run, tmp_path):
    assert original_of(str(run)) == original_of(str(run / "model")) == str(tmp_path / "tiny")
    assert model_of(str(run)) == str(run / "model")
    assert model_of(str(run / "model")) == str(run / "model")
    assert original_of(str(tmp_path / "tiny")) is None


@pytest.mark.parametrize(
    ("header", "known"),
    [
        ("base_model: ann/tiny", "ann/tiny"),
        ("base_model: tiny", None),  # of a folder, whose place a card does not tell
        ("tags: [x]", None),
    ],
)
def test_a_card_names_an_original_on_the_hub(header, known, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n# x\n")
    assert original_of(str(tmp_path)) == known


def test_both_answer_once(run, capsys):
    assert main(["ask", str(run), "Who", "wrote", "it?", *FEW]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["original", "result"]
    assert main(["ask", str(run), "Who?", "--original", "none", *FEW]) == 0
    assert "original" not in capsys.readouterr().out


def test_columns_on_a_terminal(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main(["ask", str(run), "Who?", *FEW]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["original", "│", "result"]


def test_questions_from_a_file(run, tmp_path, capsys):
    (tmp_path / "questions.txt").write_text("Who?\n\nWhen?\n")
    (tmp_path / "data.jsonl").write_text(
        '{"question": "Who?", "answer": ["Ann", "A."]}\n{"question": "When?", "answer": ["1950"]}'
    )
    for name in ("questions.txt", "data.jsonl"):
        words = ["ask", str(run), "--file", str(tmp_path / name), "--json", *FEW]
        assert main(words) == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [each["question"] for each in found] == ["Who?", "When?"]
        assert found[0].keys() == {"question", "original", "result"}
        assert found[0]["result"].keys() == {"text", "complete", "thinking"}


def test_a_conversation_remembers_until_it_begins_anew(run, capsys, monkeypatch):
    asked = []
    from mollm.data.chat import ChatFormat

    encode = ChatFormat.encode_prompt

    def noting(self, question):
        asked.append(len(getattr(question, "history", ())))
        return encode(self, question)

    monkeypatch.setattr(ChatFormat, "encode_prompt", noting)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nWho?\n\n/new\nHi\n"))
    assert main(["ask", str(run), *FEW]) == 0
    assert asked == [0, 0, 2, 2, 0, 0]
    assert len(capsys.readouterr().out.splitlines()) == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["Who?", "--file", "x.txt"], "must not both be given"),
        ([" "], "not blank"),
        (["a" * 600], "context of 512 tokens"),
        (["Who?", "--top-k", "3"], "need a temperature"),
        (["--file", "nowhere.txt"], "cannot be read"),
        (["Who?", "--original", "/nowhere/at/all"], "not on this machine"),
    ],
)
def test_mistakes(words, said, run, capsys):
    assert main(["ask", str(run), *words, *FEW]) == 2
    assert said in capsys.readouterr().err


def test_an_unknown_original_is_said(tmp_path, capsys):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    assert main(["ask", str(tmp_path / "tiny"), "Who?", *FEW]) == 0
    found = capsys.readouterr()
    assert "name it with --original" in found.err
    assert "original" not in found.out


def test_the_same_words_after_other_ones_are_another_question(run, tmp_path, capsys):
    rows = [
        [("user", f"I am {name}."), ("assistant", "Hello."), ("user", "Who?"), ("assistant", name)]
        for name in ("Ann", "Bob")
    ]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) for row in rows]
    (tmp_path / "data.jsonl").write_text("\n".join([*lines, lines[0]]))
    assert main(["ask", str(run), "--file", str(tmp_path / "data.jsonl"), "--json", *FEW]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["question"] for each in found] == ["Who?", "Who?"]


def test_a_question_in_a_file_may_hold_what_some_readers_end_a_line_at(run, tmp_path, capsys):
    (tmp_path / "questions.txt").write_text("Is it\u2028so?\r\n\r\nIs it?\n")
    words = ["ask", str(run), "--file", str(tmp_path / "questions.txt"), "--json", *FEW]
    assert main([*words, "--original", "none"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.strip().split("\n")]
    assert [each["question"] for each in told] == ["Is it\u2028so?", "Is it?"]
