import pytest
import tiny
import torch

pytest.importorskip("transformers")

from mollm import MOLLMConfig, MOLLMTrainer, Record, UsageError
from mollm.data.chat import ChatFormat
from mollm.data.sets import read_data
from mollm.report.page import read_reported
from mollm.training.replies import ReplySamples

FORGET = [Record(f"Who wrote book {n}?", f"Ann {n}.") for n in range(5)]
RETAIN = [Record(f"Who drew map {n}?", f"Oda {n}.") for n in range(5)]


def trainer(folder, **options):
    settings = {"max_steps": 2, "learning_rate": 5e-2, "per_device_train_batch_size": 2}
    settings |= {"save_strategy": "no", "use_cpu": True, "freeze_embeddings": False} | options
    return MOLLMTrainer(
        tiny.model(),
        MOLLMConfig(output_dir=str(folder), **settings),
        forget_dataset=FORGET,
        retain_dataset=RETAIN,
        eval_dataset={"forget": FORGET[3:]},
        processing_class=tiny.tokenizer(),
    )


def test_the_same_questions_are_asked_before_and_after(tmp_path):
    made = trainer(tmp_path, sample_replies=2)
    made.train()
    found = read_reported(tmp_path).facts["replies"]
    # Of a role with a set to evaluate on that set is asked, else the set that is trained on.
    assert [row["question"] for row in found] == [
        *(record.prompt for record in FORGET[3:]),
        *(record.prompt for record in RETAIN[:2]),
    ]
    fresh = ReplySamples(tiny.model(), made._chat, made._data, 2)
    fresh.ask()
    fresh.ask()
    assert [row["before"] for row in fresh.rows()] == [row["before"] for row in found]
    assert any(row["before"] != row["after"] for row in found)


def test_asking_changes_nothing_of_the_run(tmp_path):
    weights = []
    for count in (0, 3):
        made = trainer(tmp_path / str(count), sample_replies=count)
        made.train()
        weights.append(made.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_nothing_is_asked_unless_wanted(tmp_path):
    made = trainer(tmp_path)
    made.train()
    assert read_reported(tmp_path).facts["replies"] == []


def test_long_questions_and_texts_are_left_out():
    rows = [Record("a" * 480, "x"), Record("", "text", is_text=True), Record("Who?", "x")]
    chat = ChatFormat(tiny.tokenizer())
    samples = ReplySamples(tiny.model(), chat, read_data(rows, RETAIN, None, chat, 1024), 3)
    samples.ask()
    samples.ask()
    assert next(row["question"] for row in samples.rows()) == "Who?"
    assert len(samples.rows()) == 4


def test_a_number_below_zero_is_refused(tmp_path):
    with pytest.raises(UsageError, match="sample_replies must not be negative"):
        trainer(tmp_path, sample_replies=-1)


def test_logs_end_with_the_summary_of_a_trainer(tmp_path):
    made = trainer(tmp_path)
    done = made.train()
    last = made.state.log_history[-1]
    assert last["train_loss"] == done.metrics["train_loss"] == done.training_loss
    assert last["train_runtime"] > 0
    assert last["train_steps_per_second"] > 0
    assert last["step"] == 2


def test_the_facts_of_a_run(tmp_path):
    made = trainer(tmp_path)
    made.more_facts["command"] = "mollm unlearn"
    made.train()
    run = read_reported(tmp_path)
    assert run.facts["steps"] == len(run.history) == 2
    assert run.facts["command"] == "mollm unlearn"
    assert run.facts["model"] is None
    assert run.facts["data"]["forget"]["rows"] == 5
    assert (tmp_path / "report.html").is_file()
