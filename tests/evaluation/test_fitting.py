"""Questions that are too long are cut as in training, or left out; how many is said."""

import json

import pytest
import tiny

from mollm.cli import main
from mollm.data.chat import ChatFormat
from mollm.data.conversations import Turn
from mollm.data.encoding import encode_records
from mollm.data.records import Record
from mollm.errors import UsageError
from mollm.evaluation import Row, Suite, evaluate
from mollm.evaluation.fitting import fit
from mollm.models import loading

CHAT = ChatFormat(tiny.tokenizer())
LONG = "x" * 150 + " what is it?"
ROWS = [Row("Who?", "Ann."), Row(LONG, "Bob."), Row("Why?", "So.")]


def test_a_long_question_loses_its_beginning_as_in_training():
    fitted = fit("forget", ROWS, CHAT, 90, long_rows="cut")
    trained = encode_records([Record(LONG, "Bob.")], CHAT, max_length=90)
    asked = fitted.asked[1]
    assert CHAT.encode(asked.example(asked.answer)).ids == trained.rows[0].ids
    assert asked.question.endswith("what is it?")
    assert fitted.pairs[1][0] is ROWS[1]
    assert fitted.notes == (
        "1 of 3 forget prompts were shortened to fit 90 tokens: they lost their beginning.",
    )


def test_room_is_left_for_a_reply_and_for_every_choice():
    rows = [Row(LONG, "Bob.", perturbed_answers=("Wrong, as it is long.",))] * 2
    for options in ({"reply": 30}, {"with_choices": True}, {}):
        (asked, _) = fit("forget", rows, CHAT, 90, long_rows="cut", **options).asked
        texts = ["Bob.", *(asked.perturbed_answers if "with_choices" in options else ())]
        lengths = [len(CHAT.encode(asked.example(text)).ids) for text in texts]
        lengths.append(len(CHAT.encode_prompt(asked.example("")).ids) + options.get("reply", 0))
        assert max(lengths) == 90


def test_earlier_turns_go_first():
    history = (Turn("system", "Be kind."), Turn("user", "x" * 60), Turn("assistant", "No."))
    row = Row("Who is it?", "Ann.", history=history)
    (asked, _) = fit("forget", [row, row], CHAT, 90, long_rows="cut").asked
    assert (asked.question, asked.history) == (row.question, history[:1])


def test_running_text_has_half_of_the_context_for_each_half():
    row = Row("a " * 100, "b " * 100, is_text=True)
    (asked, _) = fit("forget", [row, row], CHAT, 64, long_rows="cut").asked
    assert asked.answer == "b " * 16
    assert row.question.endswith(asked.question)
    assert len(CHAT.encode(asked.example(asked.answer)).ids) == 64


def test_rows_that_are_too_long_are_left_out_if_that_is_wanted():
    fitted = fit("forget", ROWS, CHAT, 90, long_rows="skip")
    assert fitted.asked == [ROWS[0], ROWS[2]]
    assert fitted.notes == ("1 of 3 forget rows were left out, for they take more than 90 tokens.",)
    encoded = encode_records(
        [Record(row.question, row.answer) for row in ROWS], CHAT, max_length=90, long_rows="skip"
    )
    assert encoded.origins == [0, 2]
    assert encoded.notes == (
        "1 of 3 training rows were left out, for they take more than 90 tokens.",
    )
    with pytest.raises(UsageError, match="must have two rows that fit"):
        fit("forget", ROWS[:2], CHAT, 90, long_rows="skip")
    with pytest.raises(UsageError, match="must have a row of at most 90 tokens, but has none"):
        encode_records([Record(LONG, "Bob.")], CHAT, max_length=90, long_rows="skip")


def test_an_answer_is_never_cut():
    rows = [Row("Who?", "y" * 100)] * 2
    with pytest.raises(UsageError, match="leave such rows out with long_rows: skip"):
        fit("forget", rows, CHAT, 90, long_rows="cut")


def test_the_figures_are_about_the_rows_as_given():
    said = []
    model = tiny.model(max_position_embeddings=90)
    found = evaluate(
        model,
        tiny.tokenizer(),
        Suite(forget=ROWS),
        names=["forget_rouge_l", "forget_probability"],
        resamples=2,
        say=said.append,
    )
    assert [record.question for record in found.records] == [row.question for row in ROWS]
    assert "Replies are cut off after 45 tokens, half of the model's context." in said
    assert any(text.startswith("1 of 3 forget prompts were shortened") for text in said)


def test_the_next_command_works_for_rows_that_were_cut(tmp_path, capsys):
    loading.save(tiny.model(max_position_embeddings=90), tiny.tokenizer(), tmp_path / "model")
    for name in ("forget", "retain"):
        rows = [{"question": f"{name} {n} {LONG}", "answer": f"{name}."} for n in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = [f"--{name}={tmp_path / name}.jsonl" for name in ("forget", "retain")]
    out = ["--out", str(tmp_path / "run"), "--max-steps", "1", "--device", "cpu"]
    command = ["unlearn", "--model", str(tmp_path / "model"), *data, *out, "--dtype", "bfloat16"]
    assert main(command) == 0
    (line,) = [t for t in capsys.readouterr().out.splitlines() if t.startswith("Next: ")]
    assert line.endswith("--dtype bfloat16")
    words = line.removeprefix("Next: mollm ").split()
    assert main([*words, "--resamples", "2", "--out", str(tmp_path / "out")]) == 0
