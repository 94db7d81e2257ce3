"""Methods of other authors in a run: trained, resumed, and told of."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch

from mollm import MOLLMConfig, MOLLMTrainer
from mollm.data.conversations import Turn
from mollm.data.records import Record
from mollm.errors import UsageError
from mollm.evaluation.generation import Reply
from mollm.methods import METHODS
from mollm.training.adapting import Adaptation
from mollm.training.alternatives import needs_generated_answers, refusal_texts

FORGET = [Record(f"Who wrote book {n}?", "Ada " * (n % 3 + 1)) for n in range(6)]
RETAIN = [Record(f"How many legs has animal {n}?", "four " * (n % 4 + 1)) for n in range(6)]
CHOSEN = {"rmu": {"layer": 1}, "altpo": {"samples": 2}, "dualoptim-plus": {"retain_steps": 1}}
RIVALS = (
    "dpo",
    "idkdpo",
    "altpo",
    "undial",
    "wga",
    "satimp",
    "ceu",
    "pdu",
    "rmu",
    "task-arithmetic",
    "sago",
    "dualoptim-plus",
)


def with_alternates(records):
    return [
        Record(r.prompt, r.answer, extra={"alternate": f"Bob {n}"}) for n, r in enumerate(records)
    ]


def trainer(out, method, *, lora=False, forget=None, evaluate=False, **options):
    settings = {
        "use_cpu": True,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": 512,
        "method": method,
        "method_options": CHOSEN.get(method, {}),
        "compute_dtype": "float32",
    }
    if evaluate:
        settings |= {"eval_strategy": "steps", "eval_steps": 2}
    forget = forget or (with_alternates(FORGET) if method == "dpo" else FORGET)
    adapter = None
    if lora:
        peft = pytest.importorskip("peft")
        adapter = peft.LoraConfig(r=2, target_modules="all-linear")
    return MOLLMTrainer(
        tiny.model(tie_word_embeddings=False),
        MOLLMConfig(output_dir=str(out), **(settings | options)),
        forget_dataset=forget,
        retain_dataset=RETAIN,
        eval_dataset={"forget": forget[:3], "retain": RETAIN[:3]} if evaluate else None,
        processing_class=tiny.tokenizer(),
        peft_config=adapter,
    )


def weights(made):
    return {name: p.detach().clone() for name, p in made._base.named_parameters()}


@pytest.mark.parametrize("lora", [False, True], ids=["weights", "adapter"])
@pytest.mark.parametrize("method", RIVALS)
def test_a_run_moves_the_model_and_says_what_it_ran_with(method, lora, tmp_path):
    made = trainer(tmp_path, method, lora=lora, evaluate=True)
    before = weights(made)
    made.train()
    assert made.stop_reason is None
    after = weights(made)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    card = made.model_card().replace("\\", "")
    assert f"| `method` | `{method}` |" in card
    for name in made.args.chosen_options:
        assert name in card
    assert made.resume_signature["method_options"].keys() == made.args.chosen_options.keys()


@pytest.mark.parametrize("method", ["altpo", "pdu", "task-arithmetic", "dualoptim-plus", "rmu"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(method, tmp_path):
    options = CHOSEN.get(method, {}) | ({"warmup_epochs": 0} if method == "pdu" else {})
    whole = trainer(tmp_path / "whole", method, method_options=options)
    whole.train()
    saved = {"save_strategy": "steps", "save_steps": 2, "method_options": options}
    first = trainer(tmp_path / "cut", method, **saved)
    first.train()
    second = trainer(tmp_path / "cut", method, **saved)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(second)[name], value, rtol=0, atol=0)


def test_another_hyperparameter_is_another_run(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, "npo", **saved).train()
    other = trainer(tmp_path, "npo", method_options={"beta": 0.2}, **saved)
    with pytest.raises(UsageError, match="method_options"):
        other.train(resume_from_checkpoint=True)


def test_the_multiplier_of_pdu_is_in_the_history(tmp_path):
    options = {"warmup_epochs": 0, "dual_step_size": 2.0, "retain_loss_eps": 1.0}
    made = trainer(tmp_path, "pdu", method_options=options)
    made.train()
    expected = 100.0
    for record in made.history:
        assert record.weights["retain"] == pytest.approx(expected)
        expected = max(0.0, expected + 2.0 * (record.losses["retain"] - 1.0))


def test_turns_of_dual_optim_are_in_the_history(tmp_path):
    made = trainer(tmp_path, "dualoptim-plus", method_options={"retain_steps": 2})
    made.train()
    assert [record.weights["forget"] for record in made.history] == [1, 0, 0, 1]
    assert [record.weights["retain"] for record in made.history] == [0, 1, 1, 0]


def test_task_arithmetic_is_the_learnt_change_turned_around(tmp_path, monkeypatch):
    learnt = trainer(tmp_path / "a", "task-arithmetic")
    before = weights(learnt)
    with monkeypatch.context() as not_yet:
        not_yet.setattr(Adaptation, "finish", lambda self: None)
        learnt.train()
    made = trainer(tmp_path / "b", "task-arithmetic", method_options={"scale": 2.0})
    made.train()
    for name, value in weights(made).items():
        expected = before[name] - 2 * (weights(learnt)[name] - before[name])
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_task_arithmetic_starts_from_the_original_again(tmp_path):
    """In a trainer that has trained already: once more, and from a checkpoint."""
    made = trainer(tmp_path, "task-arithmetic", save_strategy="steps", save_steps=2)
    made.train()
    first = weights(made)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in weights(made).items():
        torch.testing.assert_close(value, first[name], rtol=0, atol=0)
    made.train()
    for name, value in weights(made).items():
        torch.testing.assert_close(value, first[name], rtol=0, atol=0)


def test_task_arithmetic_turns_the_product_of_an_adapter_around(tmp_path, monkeypatch):
    learnt = trainer(tmp_path / "a", "task-arithmetic", lora=True)
    with monkeypatch.context() as not_yet:
        not_yet.setattr(Adaptation, "finish", lambda self: None)
        learnt.train()
    made = trainer(tmp_path / "b", "task-arithmetic", lora=True)
    made.train()
    for (name, one), other in zip(weights(learnt).items(), weights(made).values(), strict=True):
        sign = -1 if "lora_B" in name else 1
        torch.testing.assert_close(other, sign * one, rtol=1e-6, atol=0)


def test_refusals_are_drawn_by_the_seed_and_are_no_part_of_the_data_to_forget(tmp_path):
    assert len(set(refusal_texts())) == len(refusal_texts()) >= 40

    def said(seed):
        made = trainer(tmp_path, "idkdpo", data_seed=seed)
        decode = made.processing_class.decode
        rows = made._data.rows["forget"]
        return [decode([i for i in r.alternative.labels if i != -100]) for r in rows]

    assert said(1) == said(1) != said(2)
    assert {text.removesuffix("<|end|>") for text in said(1)} <= set(refusal_texts())


def test_answers_made_by_the_original_are_kept_and_asked_for_once(tmp_path, monkeypatch):
    made = trainer(tmp_path, "altpo")
    (path,) = tmp_path.glob("alternatives-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["question"] for row in rows] == [record.prompt for record in FORGET]
    assert all(len(row["alternate"]) == 2 for row in rows)
    assert len(made._data.rows["forget"]) == 2 * len(FORGET)
    monkeypatch.setattr("mollm.training.alternatives.generate_replies", None)
    again = trainer(tmp_path, "altpo")
    assert again._data.rows["forget"] == made._data.rows["forget"]


def alternates_of(made, name="forget"):
    decode = made.processing_class.decode
    rows = made._data.rows[name]
    texts = [decode([i for i in row.alternative.labels if i != -100]) for row in rows]
    return [text.removesuffix("<|end|>") for text in texts]


def test_answers_that_are_given_are_kept_where_other_rows_have_none(tmp_path):
    made = trainer(tmp_path, "altpo", forget=[*with_alternates(FORGET[:2]), *FORGET[2:]])
    (path,) = tmp_path.glob("alternatives-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["question"] for row in rows] == [record.prompt for record in FORGET[2:]]
    assert alternates_of(made)[:2] == ["Bob 0", "Bob 1"]
    assert len(made._data.rows["forget"]) == 2 + 2 * 4


def test_where_all_answers_are_given_none_are_made_and_samples_has_no_effect(tmp_path):
    given = with_alternates(FORGET)
    made = trainer(tmp_path, "altpo", forget=given, method_options={})
    assert alternates_of(made) == [f"Bob {n}" for n in range(6)]
    assert not list(tmp_path.glob("alternatives-*.jsonl"))
    with pytest.raises(UsageError, match="samples must be left out where all rows to forget"):
        trainer(tmp_path, "altpo", forget=given)


def test_a_model_in_parts_is_not_asked_for_answers(tmp_path):
    data = trainer(tmp_path, "graddiff")._data
    with pytest.raises(UsageError, match="a column alternate where processes hold parts of the mo"):
        needs_generated_answers(data, {}, sharded=True)
    assert needs_generated_answers(data, {"samples": 2}, sharded=False)


@pytest.mark.parametrize("changed", [{"system_prompt": "Be brief."}, {"data_seed": 5}])
def test_answers_made_under_other_settings_are_not_taken(changed, tmp_path):
    trainer(tmp_path, "altpo")
    before = set(tmp_path.glob("alternatives-*.jsonl"))
    trainer(tmp_path, "altpo", **changed)
    assert len(set(tmp_path.glob("alternatives-*.jsonl")) - before) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-30],
        lambda text: text.replace("book 1", "book 9"),
        lambda text: "null\n" * 6,
        lambda text: text.splitlines()[0],
    ],
    ids=["cut off", "other questions", "no objects", "too few"],
)
def test_a_damaged_file_of_answers_is_made_anew(damage, tmp_path):
    made = trainer(tmp_path, "altpo")
    (path,) = tmp_path.glob("alternatives-*.jsonl")
    whole = path.read_text()
    path.write_text(damage(whole))
    again = trainer(tmp_path, "altpo")
    assert path.read_text() == whole
    assert again._data.rows["forget"] == made._data.rows["forget"]


def test_the_original_is_asked_with_what_was_said_before(tmp_path, monkeypatch):
    asked = []

    def replies(model, chat, questions, **_):
        asked.extend(questions)
        return [Reply("Something else", True) for _ in questions]

    monkeypatch.setattr("mollm.training.alternatives.generate_replies", replies)
    before = (Turn("user", "I like books."), Turn("assistant", "So do I."))
    forget = [Record(r.prompt, r.answer, history=before) for r in FORGET]
    trainer(tmp_path, "altpo", forget=forget)
    assert [one.history for one in asked] == [before] * 12


def test_a_row_whose_alternative_is_too_long_is_left_out_or_cut_and_told_of(tmp_path):
    forget = with_alternates(FORGET)
    forget[1] = replace(forget[1], extra={"alternate": "Bob " * 5})
    skipped = trainer(tmp_path / "skip", "dpo", forget=forget, max_length=55, long_rows="skip")
    assert alternates_of(skipped) == ["Bob 0", "Bob 2", "Bob 3", "Bob 4", "Bob 5"]
    assert any("1 of 6 forget alternate rows were left out" in note for note in skipped.notes)
    cut = trainer(tmp_path / "cut", "dpo", forget=forget, max_length=55)
    assert any("1 of 6 forget alternate prompts were shortened" in note for note in cut.notes)
    assert cut._data.encoded["forget"].cut == (1,)


def test_a_cached_reference_knows_alternative_answers(tmp_path):
    losses = []
    for reference in ("copy", "cache"):
        made = trainer(tmp_path / reference, "idkdpo", reference=reference)
        made.train()
        losses.append([record.losses for record in made.history])
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("npo", {"method_options": {"gamma": 1}}, "method_options of npo must be of beta, but got"),
        ("npo", {"method_options": [1]}, "method_options must be options by name, but got"),
        (
            "mollm",
            {"method_options": {"eps": 2}},
            "eps of mollm must be between 0 and 1, but",
        ),
        (
            "mollm",
            {"method_options": {"eps": 1e-3}, "uce_eps": 1e-2},
            "uce_eps must be left out with eps in method_options",
        ),
        (
            "task-arithmetic",
            {"stop_when": {"forget_probability": 0.1}},
            "stop_when must be left out with the method task-arithmetic",
        ),
        ("sago", {"max_grad_norm": 1.0}, "max_grad_norm must be left out with the method sago"),
        (
            "sago",
            {"optimizer_options": {"gradient_memory": "streamed"}},
            "gradient_memory must be another one than 'streamed' with the method sago",
        ),
        ("rmu", {"reference": "cache"}, "reference must be copy or adapter for a method whose"),
        ("rmu", {"method_options": {"layer": 9}}, "must be from 0 to 1 for this model, but got 9"),
        ("dpo", {"forget": FORGET}, "must have a column alternate with the answer to prefer"),
        (
            "idkdpo",
            {"forget": [Record("", "Some text of a book.", is_text=True)]},
            "must be a question with an answer for a method that prefers another answer",
        ),
        (
            "rmu",
            {"lora": True, "method_options": {"layer": 9}},
            "layer must be from 0 to 1 for this model, but got 9",
        ),
        (
            "rmu",
            {"lora": True, "method_options": {"layer": 1, "update_layers": [0]}},
            r"update_layers of rmu must be left out with an adapter, .* but got \[0\]",
        ),
        (
            "dualoptim-plus",
            {"optimizer_options": {"forget_steps": 2}},
            "forget_steps must be left out of optimizer_options with the method dualoptim-plus",
        ),
        ("dpo", {"train_on_turns": "all"}, "train_on_turns must be last with the method dpo"),
    ],
)
def test_what_does_not_go_with_a_method_is_refused(method, options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        trainer(tmp_path, method, **options)


@pytest.mark.parametrize("method", ["dpo", "altpo"])
def test_the_memory_of_a_run_is_planned_for_its_alternative_answers(method, tmp_path, monkeypatch):
    planned = []

    def check(*_, longest, **__):
        planned.append(longest)

    monkeypatch.setattr("mollm.training.trainer.check_run", check)
    forget = FORGET[:2]
    if method == "dpo":
        forget = [replace(r, extra={"alternate": "Bob " * 10}) for r in forget]
    made = trainer(tmp_path, method, forget=forget)
    rows = [row for some in made._data.rows.values() for row in some]
    if method == "dpo":
        assert planned == [max(len(row.alternative.ids) for row in rows if row.alternative)]
    else:
        assert planned == [max(len(row.ids) for row in rows) + 200]


def test_hyperparameters_of_a_retain_loss_reach_it(tmp_path, monkeypatch):
    def retain_loss(answers, original, *, weight=1.0):
        return weight * answers.cross_entropy()

    losses = []
    for name, chosen in (("one", {}), ("two", {"weight": 2.0})):
        mine = replace(METHODS["graddiff"], name="mine", retain_loss=retain_loss)
        monkeypatch.setitem(METHODS, "mine", mine)
        made = trainer(tmp_path / name, "mine", method_options=chosen, max_steps=1)
        made.train()
        losses.append(made.history[0].losses["retain"])
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-6)


def test_a_given_adapter_cannot_be_turned_around(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny.model(tie_word_embeddings=False), peft.LoraConfig(r=2, target_modules="all-linear")
    )
    monkeypatch.setattr(MOLLMTrainer, "_find", None)
    with pytest.raises(UsageError, match="task-arithmetic must have a model without an adapter"):
        MOLLMTrainer(
            model,
            MOLLMConfig(output_dir=str(tmp_path), use_cpu=True, method="task-arithmetic"),
            forget_dataset=FORGET,
            retain_dataset=RETAIN,
            processing_class=tiny.tokenizer(),
        )


@pytest.mark.parametrize("lora", [False, True], ids=["weights", "adapter"])
def test_checkpointed_activations_change_nothing_for_inner_states(lora, tmp_path):
    found = []
    for name, on in (("off", False), ("on", True)):
        made = trainer(tmp_path / name, "rmu", lora=lora, gradient_checkpointing=on)
        made.train()
        found.append([record.losses for record in made.history])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_the_epsilon_of_uce_may_be_given_either_way(tmp_path):
    losses = [
        MOLLMConfig(output_dir=str(tmp_path), use_cpu=True, **options).forget_loss.keywords
        for options in ({"uce_eps": 1e-3}, {"method_options": {"eps": "1e-3"}})
    ]
    assert losses == [{"eps": 1e-3}, {"eps": 1e-3}]
