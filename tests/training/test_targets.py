import pytest
import tiny
import torch

pytest.importorskip("transformers")

from mollm import MOLLMConfig, MOLLMTrainer, Record, UsageError
from mollm.evaluation.records import Record as Measured
from mollm.evaluation.records import write_records
from mollm.training.targets import StopRule, measured

FORGET = [Record(f"Who wrote book {n}?", f"Ann {n}.") for n in range(4)]
RETAIN = [Record(f"Who drew map {n}?", f"Oda {n}.") for n in range(4)]


def trainer(folder, stop_when, **options):
    settings = {"max_steps": 12, "learning_rate": 2e-2, "per_device_train_batch_size": 4}
    settings |= {"save_strategy": "no", "use_cpu": True, "method": "ga"} | options
    return MOLLMTrainer(
        tiny.model(),
        MOLLMConfig(
            output_dir=str(folder), stop_when=stop_when, freeze_embeddings=False, **settings
        ),
        forget_dataset=FORGET,
        retain_dataset=RETAIN,
        processing_class=tiny.tokenizer(),
    )


def looks(made):
    return [log for log in made.state.log_history if "stop_forget_probability" in log]


def test_figures_are_those_of_plain_loops():
    from mollm.data.chat import ChatFormat
    from mollm.data.sets import read_data

    model, chat = tiny.model(), ChatFormat(tiny.tokenizer())
    rows = read_data(FORGET, RETAIN, None, chat, 400).rows
    found = measured(model.double(), rows, chat.pad_id, 3)
    likelihoods, hits = [], []
    for row in rows["forget"]:
        logits = model(torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
        labels = torch.tensor(row.labels[1:])
        kept = labels >= 0
        chosen = logits[kept].gather(1, labels[kept, None])[:, 0]
        likelihoods.append(chosen.mean().exp().item())
        hits.append((logits[kept].argmax(-1) == labels[kept]).double().mean().item())
    assert found["forget_probability"] == pytest.approx(sum(likelihoods) / 4, rel=1e-9)
    assert found["forget_accuracy"] == pytest.approx(sum(hits) / 4)
    assert found.keys() == {
        f"{role}_{what}" for role in rows for what in ("probability", "accuracy")
    }


def test_a_run_stops_at_its_target(tmp_path):
    made = trainer(tmp_path, {"forget_probability": 1e-4, "steps": 2}, max_steps=40)
    made.train()
    assert made.stop_reason is None
    assert made.state.global_step < 40
    assert [log["step"] for log in looks(made)] == list(range(2, made.state.global_step + 1, 2))
    values = [log["stop_forget_probability"] for log in looks(made)]
    assert values[-1] <= 1e-4 < min(values[:-1])
    assert "for the target is reached: forget_probability is" in made.target_told
    assert made.target_told in (tmp_path / "README.md").read_text().replace("\\", "")


def test_a_target_that_is_not_reached_is_said_with_the_best(tmp_path):
    made = trainer(tmp_path, {"forget_probability": 0.0, "steps": 5})
    made.train()
    assert [log["step"] for log in looks(made)] == [5, 10, 12]
    best = min(looks(made), key=lambda log: log["stop_forget_probability"])
    assert "was not reached in 12 steps" in made.target_told
    assert f"after step {best['step']}: forget_probability" in made.target_told


def test_a_run_stops_where_too_little_is_kept(tmp_path):
    made = trainer(tmp_path, {"retain_probability": 0.5, "steps": 3})
    made.train()
    assert made.state.global_step == 3
    assert "retain_probability is" in made.target_told
    assert "less than 0.5" in made.target_told


def test_a_resumed_run_stops_where_the_whole_one_does(tmp_path):
    rule = {"forget_probability": 1e-4, "steps": 2}
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 40}
    whole = trainer(tmp_path / "whole", rule, **options)
    whole.train()
    cut = trainer(tmp_path / "cut", {"forget_probability": 0.0, "steps": 2}, **options)
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 4

    cut.add_callback(Stop())
    cut.train()
    again = trainer(tmp_path / "cut", rule, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == whole.state.global_step
    assert looks(again) == looks(whole)
    assert again.target_told == whole.target_told


def test_looking_changes_nothing(tmp_path):
    weights = []
    for rule in (None, {"forget_probability": 0.0, "steps": 1}):
        made = trainer(tmp_path / str(len(weights)), rule, max_steps=3)
        made.train()
        weights.append(made.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_target_can_be_that_of_a_retain_only_model(tmp_path):
    records = [Measured("forget", "?", "!", None, {"probability": p}) for p in (0.25, 0.75)]
    records.append(Measured("retain", "?", "!", None, {"probability": 1.0}))
    write_records(records, tmp_path / "examples.jsonl")
    rule = StopRule.of({"forget_probability": str(tmp_path / "examples.jsonl")})
    assert rule.at_most == {"forget_probability": 0.5}
    assert rule.steps == 10


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"forget_probabilty": 0.1}, "did you mean forget_probability"),
        ({"forget_probability": 2}, "from 0 to 1, but got 2"),
        ({"forget_accuracy": "x"}, "from 0 to 1, but got 'x'"),
        ({"retain_probability": True}, "from 0 to 1, but got True"),
        ({"steps": 3}, "must hold one of"),
        ({"forget_accuracy": 0.1, "steps": 0}, "steps must be a whole number from 1"),
    ],
)
def test_mistakes(told, said):
    with pytest.raises(UsageError, match=said):
        StopRule.of(told)


def test_it_is_a_setting_of_the_command_line():
    from mollm.commands.settings_file import read_settings

    found = read_settings({"set": ["stop_when={forget_probability: 0.1}"]})
    assert found == {"stop_when": {"forget_probability": 0.1}}
