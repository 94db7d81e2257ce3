"""Retain data that the model makes itself: what they are, that they come again, who says so."""

from __future__ import annotations

import json

import pytest
import tiny

from mollm import MOLLMConfig, MOLLMTrainer
from mollm.cli import main
from mollm.data.chat import ChatFormat
from mollm.data.records import Record, load_records
from mollm.errors import UsageError
from mollm.evaluation.generation import Reply
from mollm.models import loading
from mollm.training import own_retain
from mollm.training.own_retain import Repetitions, general_questions, make_retain_data, note_on

FORGET = [Record("Who wrote Salt and Ash?", "Mira Dovenko."), Record("When?", "In the year 1962.")]
TEXT = [Record("", "Once upon a time the ferry left at six, and nobody was on it.", is_text=True)]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(own_retain, "_LEAST", 16)
    monkeypatch.setattr(own_retain, "_ANSWER_TOKENS", 12)
    monkeypatch.setattr(own_retain, "_QUESTION_TOKENS", 8)
    monkeypatch.setattr(own_retain, "_TEXT_TOKENS", 12)


def made(folder, forget=FORGET, *, template=True, seed=0):
    model, tokenizer = tiny.model(), tiny.tokenizer(template=template)
    chat = ChatFormat.of(model, tokenizer)
    path = make_retain_data(model, chat, forget, folder=folder, seed=seed, max_length=128)
    return path, [json.loads(line) for line in path.read_text().split("\n") if line]


def says(monkeypatch, *texts, complete=True):
    """Has the model answer these, in turn."""

    def replies(model, chat, questions, **_):
        return [Reply(texts[n % len(texts)], complete) for n in range(len(questions))]

    monkeypatch.setattr(own_retain, "generate_replies", replies)
    monkeypatch.setattr(own_retain, "ask_tokens", lambda m, c, rows, **_: replies(m, c, rows))


@pytest.mark.parametrize("template", [True, False])
def test_half_are_general_questions_and_half_are_the_model_s_own(template, tmp_path):
    path, rows = made(tmp_path, template=template)
    assert 12 <= len(rows) <= 16
    own = [row["question"] for row in rows if row["own"]]
    general = [row["question"] for row in rows if not row["own"]]
    assert own
    assert len(general) >= 8
    assert set(general) <= set(general_questions())
    assert not set(own) & set(general_questions())
    assert all(row["answer"].strip() for row in rows)
    assert [record.answer for record in load_records(path, role="retain")] == [
        row["answer"] for row in rows
    ]
    assert f"{len(rows)} answers, {len(own)} of them to questions of its own" in note_on(path)


def test_a_max_length_without_room_for_the_questions_is_refused(tmp_path, monkeypatch):
    model, tokenizer = tiny.model(), tiny.tokenizer()
    chat = ChatFormat.of(model, tokenizer)
    size = max(len(chat.encode_prompt(question).ids) for question in general_questions())
    told = f"max_length must be at least {min(2 * size - 1, size + 12)} .* up to {size} tokens"
    with monkeypatch.context() as patched, pytest.raises(UsageError, match=f"{told}.* it is 16:"):
        patched.setattr(own_retain, "ask_tokens", lambda *_, **__: pytest.fail("asked"))
        patched.setattr(own_retain, "generate_replies", lambda *_, **__: pytest.fail("asked"))
        make_retain_data(model, chat, FORGET, folder=tmp_path, max_length=16)
    says(monkeypatch, "Red.", "Blue.")
    enough = min(2 * size - 1, size + 12)
    path = make_retain_data(model, chat, FORGET, folder=tmp_path, max_length=enough)
    assert "16 answers" in note_on(path)


def test_for_running_text_the_model_writes_texts(tmp_path):
    path, rows = made(tmp_path, TEXT)
    openings = tuple(general_questions())
    assert len(rows) == 16
    assert sum(row["text"].startswith(openings) for row in rows) == 8
    assert all(record.is_text for record in load_records(path, role="retain"))
    assert "16 texts)" in note_on(path)


def test_the_seed_decides_the_rows_and_a_whole_file_is_taken_as_it_is(tmp_path, monkeypatch):
    _, first = made(tmp_path / "a")
    path, again = made(tmp_path / "b")
    other, different = made(tmp_path / "b", seed=1)
    assert first == again != different
    assert path != other
    monkeypatch.setattr(own_retain, "generate_replies", lambda *_, **__: pytest.fail("asked"))
    assert made(tmp_path / "b")[1] == again
    path.write_text(path.read_text()[:-30])
    with pytest.raises(pytest.fail.Exception, match="asked"):
        made(tmp_path / "b")


def test_what_repeats_a_row_to_forget_is_left_out(tmp_path, monkeypatch):
    says(monkeypatch, "It is blue.", "That was in the year 1962.", "Red.")
    _, rows = made(tmp_path)
    assert {row["answer"] for row in rows} == {"It is blue.", "Red."}
    says(monkeypatch, "All of it happened in the year 1962, as I said.")
    with pytest.raises(UsageError, match="all but 0 of those it wrote were blank or repeated"):
        made(tmp_path, seed=1)


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\r"])
def test_signs_that_end_a_line_elsewhere_stay_within_a_row(sign, tmp_path, monkeypatch):
    says(monkeypatch, f"It is{sign}blue.")
    path, rows = made(tmp_path)
    assert {row["answer"] for row in rows} == {f"It is{sign}blue."}
    assert f"{len(rows)} answers" in note_on(path)
    monkeypatch.setattr(own_retain, "generate_replies", lambda *_, **__: pytest.fail("asked"))
    assert made(tmp_path) == (path, rows)
    assert len(load_records(path, role="retain")) == len(rows)


@pytest.mark.parametrize(
    ("question", "answer", "repeats"),
    [
        ("who wrote SALT and ash", "Nobody.", True),
        ("Who is the author of Salt and Ash?", "Mira Dovenko wrote it", True),
        ("Who lives next door?", "Dovenko.", True),
        ("Who lives next door?", "Mira lives there. She has a cat.", True),
        ("Who lives next door?", "When I last asked, a cat did.", False),
        ("What is a constitution?", "A law. In it the rights are kept.", False),
        ("When was it?", "In the year 1962", True),
        ("When was it?", "In the year 1963", False),
    ],
)
def test_repetitions(question, answer, repeats):
    assert Repetitions(FORGET).found(question, answer) == repeats


@pytest.mark.parametrize(
    ("answer", "repeats"),
    [
        ("Anna is here", True),
        ("It is here. She has a bird", False),
        ("Birds live there", False),
        ("However, nobody knows", False),
        ("Elle est là", False),
    ],
)
def test_a_name_with_which_a_sentence_begins(answer, repeats):
    rows = ["Anna lives there.", "However, it has birds. Birds sing.", "Elle est née ici.", "Oslo."]
    assert Repetitions([Record("Where is it?", row) for row in rows]).found("", answer) == repeats


def test_an_answer_of_one_word_is_no_name():
    known = Repetitions([Record("What is the capital of it?", "Oslo.")])
    assert not known.found("Where is it cold?", "Oslo, in winter")
    assert known.found("What is the capital?", "Oslo")


WANG = "王伟在哪里出生？", "他出生于江苏省苏州市。"
TOKYO = "日本的首都在哪里？", "东京。"
KYOTO = "どこ?", "彼はことしの春に京都で生まれました。"
CHIANG_MAI = "ที่ไหน", "เขาเกิดที่จังหวัดเชียงใหม่ทางภาคเหนือ"


@pytest.mark.parametrize(
    ("asked", "told", "question", "answer", "repeats"),
    [
        (*WANG, "王伟的出生地?", "据说他出生于江苏省苏州市", True),
        (*WANG, "", "他出生于江苏省南京市", False),
        (WANG[0], f"{WANG[1]}后来搬到了北京。", "", "他出生于江苏省苏州市", True),
        (*TOKYO, "日本的首都是什么？", "是东京。", True),
        (*TOKYO, "有什么好吃？", "东京拉面。", False),
        (*KYOTO, "", "ことしの春に京都で生まれ、", True),
        (*KYOTO, "", "犬がうちで生まれました。", False),
        (*CHIANG_MAI, "", "ว่าเขาเกิดที่จังหวัดเชียงใหม่", True),
        (*CHIANG_MAI, "", "เขาเกิดที่กรุงเทพ", False),
    ],
)
def test_scripts_without_spaces_are_compared_by_letters(asked, told, question, answer, repeats):
    assert Repetitions([Record(asked, told)]).found(question, answer) == repeats


def test_long_answers_repeat_from_six_words_on():
    known = Repetitions(TEXT)
    assert known.found("", "the ferry left at six, and then it rained")
    assert not known.found("", "the ferry left at six. Then it rained")


def test_a_reply_that_was_cut_off_ends_with_a_sentence(tmp_path, monkeypatch):
    ends = ("It is 3.5 miles. Then one wal", "no end of a sen", "雨です。そして", "one")
    says(monkeypatch, *ends, complete=False)
    _, rows = made(tmp_path)
    told = {"It is 3.5 miles.", "no end of a", "雨です。", "one"}
    assert {row["answer"] for row in rows} == told


def config(folder, **settings):
    return MOLLMConfig(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=2,
        max_length=128,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=1,
        disable_tqdm=True,
        sample_replies=0,
        **settings,
    )


def trainer(folder, retain="auto", **settings):
    return MOLLMTrainer(
        tiny.model(),
        config(folder, **settings),
        forget_dataset=FORGET,
        retain_dataset=retain,
        processing_class=tiny.tokenizer(),
    )


def test_a_trainer_makes_them_and_resumes_with_them(tmp_path):
    first = trainer(tmp_path / "run")
    (path,) = (tmp_path / "run").glob("retain-auto-*.jsonl")
    assert first.retain_dataset == str(path)
    assert first.resume_signature["retain data"] == first._data.facts["retain"]["sha256"]
    first.train()
    card = first.model_card()
    assert path.name in card
    assert "made by the model itself" in card
    weights = first.model.state_dict()
    again = trainer(tmp_path / "run")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert all(weights[name].equal(t) for name, t in again.model.state_dict().items())
    with pytest.raises(UsageError, match=r"retain data was .* and is now"):
        trainer(tmp_path / "run", FORGET_OTHER).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1")
        )


FORGET_OTHER = [Record(f"What is {n}?", f"It is a number, {n}.") for n in range(4)]


def test_they_may_stand_beside_data_of_the_user_s(tmp_path):
    made = trainer(tmp_path, {"mine": FORGET_OTHER, "general": "auto"})
    assert made.objectives == ("forget", "kl", "retain_mine", "retain_general")
    assert made.retain_dataset["mine"] is FORGET_OTHER
    assert "retain-auto-" in made.retain_dataset["general"]


def test_what_else_may_be_wrong_is_found_before_they_are_made(tmp_path, monkeypatch):
    from mollm.planning import run as planning_run

    monkeypatch.setattr(own_retain, "generate_replies", lambda *_, **__: pytest.fail("asked"))
    long = [Record("Who?", "It is a long story. " * 99)]
    sets = {"forget_dataset": FORGET, "retain_dataset": "auto", "args": config(tmp_path)}
    with pytest.raises(UsageError, match="answer takes 1980 tokens"):
        MOLLMTrainer(
            tiny.model(), **sets, processing_class=tiny.tokenizer(), eval_dataset={"forget": long}
        )
    with pytest.raises(UsageError, match="answer takes 1980 tokens"):
        trainer(tmp_path, {"general": "auto", "own": long})
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    named = sets | {"args": config(tmp_path / "run", trainable_parameters=[".mpl."])}
    with pytest.raises(UsageError, match=r"no name holds .\.mpl\."):
        MOLLMTrainer(str(tmp_path / "tiny"), **named)
    monkeypatch.setattr(planning_run.machine, "available_memory", lambda _: -(1 << 40))
    with pytest.raises(UsageError, match="must fit into memory"):
        trainer(tmp_path)


def test_parts_of_a_model_make_none(tmp_path):
    args = config(tmp_path)
    args.sharding = "full_shard"
    sets = {"forget_dataset": FORGET, "retain_dataset": "auto"}
    with pytest.raises(UsageError, match="retain must be data where processes hold parts"):
        MOLLMTrainer(tiny.model(), args, processing_class=tiny.tokenizer(), **sets)


def test_the_command_makes_them_and_names_them_in_what_follows(tmp_path, capsys, monkeypatch):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    forget = tmp_path / "forget.jsonl"
    rows = [{"prompt": r.prompt, "answer": r.answer} for r in FORGET]
    forget.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    words = ["unlearn", "--model", str(tmp_path / "tiny"), "--forget", str(forget)]
    words += ["--retain", "auto", "--out", str(out), "--max-steps", "1", "--max-length", "128"]
    words += ["--device", "cpu", "--set", "sample_replies=0", "--quiet"]
    with monkeypatch.context() as patched:
        patched.setattr(own_retain, "generate_replies", lambda *_, **__: pytest.fail("asked"))
        assert main([*words, "--eval-forget", str(tmp_path / "typo.jsonl")]) == 2
    assert "typo.jsonl" in capsys.readouterr().err
    out.mkdir(exist_ok=True)
    left = out / "retain-auto-of-a-run-that-failed.jsonl"
    left.write_text("")
    assert main(words) == 0
    (path,) = set(out.glob("retain-auto-*.jsonl")) - {left}
    assert f"--retain {path}" in capsys.readouterr().out
    facts = json.loads((out / "run.json").read_text())
    assert facts["given"]["retain"] == str(path)
    assert any("made by the model itself" in note for note in facts["notes"])
    assert "made by the model itself" in (out / "report.html").read_text()
    assert "made by the model itself" in (out / "model" / "README.md").read_text()


@pytest.mark.parametrize("command", ["preview", "evaluate"])
def test_other_commands_say_where_they_are(command, tmp_path, capsys):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    forget = tmp_path / "forget.jsonl"
    forget.write_text('{"prompt": "Who?", "answer": "Ada."}\n{"prompt": "So?", "answer": "No."}')
    words = ["--model", str(tmp_path / "tiny"), "--forget", str(forget), "--retain", "auto"]
    assert main([command, *words]) == 2
    assert "take the file retain-auto-….jsonl in a run's folder" in capsys.readouterr().err
