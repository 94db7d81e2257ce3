import functools
import json

import pytest
import tiny
import torch
from transformers import PreTrainedModel, TrainerCallback

from mollm import MOLLMConfig, MOLLMTrainer
from mollm.data.files import sample_path
from mollm.data.records import Record
from mollm.errors import UsageError
from mollm.methods.method import OBJECTIVES
from mollm.training import checkpoint

FORGET = [Record(f"Who wrote book {n}?", "Ada " * (n % 3 + 1)) for n in range(10)]
RETAIN = [Record(f"How many legs has animal {n}?", "four " * (n % 4 + 1)) for n in range(12)]


def trainer(out, model=None, *, lora=None, data=(FORGET, RETAIN), evaluate=False, **options):
    settings = {
        "use_cpu": True,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "logging_steps": 2,
        "disable_tqdm": True,
        "max_length": 128,
    }
    if evaluate:
        settings |= {"eval_strategy": "steps", "eval_steps": 1}
    return MOLLMTrainer(
        tiny.model(tie_word_embeddings=False) if model is None else model,
        MOLLMConfig(output_dir=str(out), **(settings | options)),
        forget_dataset=data[0],
        retain_dataset=data[1],
        eval_dataset={"forget": FORGET[:3], "retain": RETAIN[:5]} if evaluate else None,
        processing_class=tiny.tokenizer(),
        peft_config=None if lora is None else adapter(**lora),
    )


def adapter(**options):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**({"r": 4, "target_modules": "all-linear"} | options))


def weights(made):
    return {name: p.detach().clone() for name, p in made._base.named_parameters()}


def trained(*args, **options):
    made = trainer(*args, **options)
    made.train()
    return made


def assert_alike(first, second):
    """The same changes but for rounding, which is small beside them."""
    for name, value in weights(first).items():
        change = float((value - first.start[name]).abs().max())
        torch.testing.assert_close(weights(second)[name], value, rtol=0, atol=1e-6 + 2e-3 * change)


def pair(tmp_path, first, second, **options):
    made = []
    for name, changed in (("a", first), ("b", second)):
        one = trainer(tmp_path / name, **(options | changed))
        one.start = weights(one)
        one.train()
        made.append(one)
    return made


SGD = {"optimizer_options": {"base": "sgd"}, "learning_rate": 0.05}


def test_one_row_eight_times_is_eight_rows_once(tmp_path, in_float32):
    eight = {"per_device_train_batch_size": 8}
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    assert_alike(*pair(tmp_path, eight, one, **SGD))


def test_padding_on_either_side_is_the_same(tmp_path, in_float32):
    assert_alike(*pair(tmp_path, {"padding_side": "left"}, {"padding_side": "right"}, **SGD))


def checkpointed(reentrant):
    return {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("lora", [None, {}])
def test_checkpointed_activations_are_the_same(tmp_path, in_float32, lora, reentrant):
    on = checkpointed(reentrant)
    assert_alike(*pair(tmp_path, on, {}, lora=lora, **SGD))


def test_a_cached_reference_is_the_frozen_copy(tmp_path, in_float32):
    options = {"freeze_embeddings": False} | SGD
    assert_alike(*pair(tmp_path, {"reference": "cache"}, {"reference": "copy"}, **options))
    assert len(list((tmp_path / "a").glob("reference-*"))) == 1


@pytest.mark.parametrize("other", ["copy", "cache"])
def test_the_adapter_switched_off_is_the_original(tmp_path, in_float32, other):
    references = {"reference": "adapter"}, {"reference": other}
    assert_alike(*pair(tmp_path, *references, lora={}, **SGD))


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_adapter_trains_under_checkpointed_activations(tmp_path, reentrant):
    made = trainer(tmp_path, lora={}, max_steps=2, **checkpointed(reentrant))
    before = weights(made)
    made.train()
    changed = {n for n, value in weights(made).items() if not torch.equal(value, before[n])}
    assert {n for n in before if "lora_" in n} == changed


def test_reentrant_checkpoints_would_not_train_an_adapter_behind_frozen_embeddings(
    tmp_path, monkeypatch
):
    """What the trainer does about it is not done twice by somebody else."""
    monkeypatch.setattr(PreTrainedModel, "enable_input_require_grads", lambda self: None)
    made = trainer(tmp_path, lora={}, max_steps=1, **checkpointed(True))
    with pytest.raises(RuntimeError, match="grad"):
        made.train()


def test_an_adapter_on_the_head_trains(tmp_path):
    made = trainer(tmp_path, lora={"target_modules": ["q_proj", "lm_head"]}, max_steps=2)
    before = weights(made)
    made.train()
    changed = {n for n, value in weights(made).items() if not torch.equal(value, before[n])}
    assert {n for n in before if "lora_" in n} == changed
    assert any("lm_head.lora_A" in n for n in changed)


def test_an_export_is_one_model_with_the_adapter_in_it(tmp_path, in_float32):
    from transformers import AutoModelForCausalLM

    made = trained(tmp_path / "run", lora={})
    made.export(tmp_path / "model")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(3, 13)[None]
    expected = made._base.eval()(input_ids=ids).logits
    torch.testing.assert_close(read(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not list((tmp_path / "model").glob("*.bin"))
    assert made._wrapped is not None  # goes on as it was


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2, "reference": "cache"},
        {"optimizer_options": {"momentum": "per-objective"}},
        {"lora": {"lora_dropout": 0.3}},
        {"optimizer_options": {"base": "sgd", "momentum": 0.9}, "max_grad_norm": 0.1},
    ],
    ids=["adamw", "cosine-cache", "means", "lora-dropout", "sgd-clipped"],
)
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, options):
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2} | options
    whole = trained(tmp_path / "whole", **options)
    first = trainer(tmp_path / "cut", **options)
    first.add_callback(StopAfter(5))  # one step after a checkpoint, and in a second epoch
    first.train()
    second = trainer(tmp_path / "cut", **options)
    torch.manual_seed(123)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 7
    assert second.history == whole.history
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name
    logs = [
        [{k: v for k, v in log.items() if k != "tokens_per_second"} for log in t.state.log_history]
        for t in (whole, second)
    ]
    assert logs[0] == logs[1]


def test_a_resumed_run_rounds_bfloat16_weights_as_before(tmp_path):
    options = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "optimizer_options": {"stochastic_rounding": True, "state_dtype": "bfloat16"},
    }
    whole = trained(tmp_path / "whole", tiny.model().bfloat16(), **options)
    first = trainer(tmp_path / "cut", tiny.model().bfloat16(), **options)
    first.add_callback(StopAfter(3))
    first.train()
    second = trainer(tmp_path / "cut", tiny.model().bfloat16(), **options)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name


def test_nothing_is_read_or_written_with_pickle(tmp_path, monkeypatch):
    def forbidden(*_, **__):
        pytest.fail("pickle")

    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(torch, "save", forbidden)
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trained(tmp_path, **options)
    trainer(tmp_path, **options).train(resume_from_checkpoint=True)
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".jsonl", ".jinja", ".md", ".safetensors"}


def test_logs_say_what_the_steps_did(tmp_path):
    made = trained(tmp_path)
    logs = made.state.log_history
    assert [log["step"] for log in logs] == [2, 4]
    for name in OBJECTIVES:
        for log, some in zip(logs, (made.history[:2], made.history[2:]), strict=True):
            mean = sum(record.losses[name] for record in some) / 2
            assert log[f"{name}_loss"] == pytest.approx(mean)
            assert {f"norm_{name}", f"weight_{name}", f"conflict_{name}"} <= set(log)
    assert {"cosine_forget_kl", "pareto_gap", "tokens_per_second", "learning_rate"} <= set(logs[0])
    assert logs[0]["tokens_per_second"] > 0
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]


def test_evaluation_is_the_mean_over_all_tokens_whatever_the_batches(tmp_path, in_float32):
    found = [
        trainer(
            tmp_path / str(size), evaluate=True, max_steps=1, per_device_eval_batch_size=size
        ).evaluate()
        for size in (1, 5)
    ]
    assert set(found[0]) == {f"eval_{n}loss" for n in ("", "forget_", "kl_", "retain_")}
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)
    assert found[0]["eval_kl_loss"] == pytest.approx(0, abs=1e-6)
    assert found[0]["eval_retain_loss"] == pytest.approx(5.56, rel=0.05)  # log 259


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path):
    made = trained(
        tmp_path,
        evaluate=True,
        max_steps=5,
        method="project",
        learning_rate=0.3,  # too much: kl is the least after the first step
        uce_eps=1e-3,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="kl_loss",
    )
    values = {
        log["step"]: log["eval_kl_loss"] for log in made.state.log_history if "eval_loss" in log
    }
    best = min(values, key=values.get)
    assert made.state.best_global_step == best < 5
    names = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert names == [f"checkpoint-{best}", "checkpoint-5"]
    assert made.evaluate()["eval_kl_loss"] == pytest.approx(values[best], rel=1e-6)


def test_a_run_that_falls_apart_is_stopped_without_a_checkpoint_of_it(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    made = trained(tmp_path, learning_rate=5.0, divergence=0.05, max_steps=20, **saving)
    steps = made.state.global_step
    assert steps < 20
    assert "the kl loss must not grow by more than 0.05 nats" in made.stopped_because
    assert checkpoint.checkpoints(tmp_path)[-1].name == f"checkpoint-{steps - 1}"


def test_epochs_are_counted_in_rows_to_forget(tmp_path):
    ends = []

    class Epochs(TrainerCallback):
        def on_epoch_end(self, args, state, control, **_):
            ends.append(state.global_step)

    made = trainer(tmp_path, max_steps=-1, num_train_epochs=2, save_strategy="epoch")
    made.add_callback(Epochs())
    made.train()
    assert made.state.global_step == 5  # 20 rows, 4 at a time
    assert ends == [3, 5]
    assert made.state.epoch == 2
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "checkpoint-3",
        "checkpoint-5",
    ]


def test_data_come_as_records_paths_options_and_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = str(sample_path("authors-retain.jsonl"))
    table = datasets.Dataset.from_dict({"q": ["Who?", "When?"], "a": ["Ada", "Then"]})
    named = {"path": table, "prompt_field": "q", "answer_field": "a"}
    options = {"max_length": 512, "max_steps": 1, "per_device_train_batch_size": 1}
    made = trained(tmp_path, data=(named, path), **options)
    assert made._data.facts["forget"]["rows"] == 2
    assert made._data.facts["retain"]["rows"] == 24
    card = (tmp_path / "README.md").read_text()
    assert made._data.facts["retain"]["sha256"] in card
    assert "| 1 | " in card
    assert "`mollm`" in card


def test_decay_leaves_norms_alone(tmp_path):
    made = trainer(tmp_path, weight_decay=0.1)
    groups = made.create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {p.ndim for p in groups[1]["params"]} == {1}
    assert 1 not in {p.ndim for p in groups[0]["params"]}


def test_eps_is_that_of_the_unlearning_cross_entropy(tmp_path, in_float32):
    def first(**options):
        made = trained(tmp_path / "run", max_steps=1, **options)
        return made.history[0].losses["forget"]

    # Of a token with probability p: -log(1 - (1 - eps) p); a random model's p is small.
    assert first(uce_eps=0.5) == pytest.approx(0.5 * first(uce_eps=1e-9), rel=2e-3)


def test_embeddings_and_head_stay_unless_they_are_to_train(tmp_path):
    for frozen in (True, False):
        made = trainer(tmp_path / str(frozen), max_steps=1, freeze_embeddings=frozen)
        before = made._base.lm_head.weight.clone()
        made.train()
        assert torch.equal(before, made._base.lm_head.weight) is frozen


def test_mistakes_are_told_before_a_step(tmp_path):
    def refused(match, **options):
        with pytest.raises(UsageError, match=match):
            trainer(tmp_path, **options)

    refused("must hold at least one row", data=([], RETAIN))
    refused("at most half of the rows", data=(FORGET, FORGET))
    refused("max_length is 20", max_length=20)
    refused("the forget data must be given by a path", data=({"split": "x"}, RETAIN))
    refused("but got splits", data=({"path": "x.jsonl", "splits": "x"}, RETAIN))
    refused("eval_dataset must be given", eval_strategy="steps")
    refused("lora_dropout must be 0", lora={"target_modules": ["lm_head"], "lora_dropout": 0.1})
    refused("must leave the head alone", model=tiny.model(), lora={"target_modules": ["lm_head"]})
    refused("without DoRA", lora={"use_dora": True})
    refused("init_lora_weights must be one of True", lora={"init_lora_weights": "pissa"})
    refused("left out for a model that is given as a module", lora={}, quantization="nf4")
    refused("no adapter to switch off", reference="adapter")
    refused("one of eval_forget_loss, eval_kl", evaluate=True, metric_for_best_model="accuracy")
    assert not list(tmp_path.glob("*"))


def test_a_checkpoint_of_another_run_is_refused_and_nothing_changes(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trained(tmp_path / "run", **options)

    def refused(match, *args, **changed):
        made = trainer(tmp_path / "run", *args, **(options | changed))
        before = weights(made)
        with pytest.raises(UsageError, match=match):
            made.train(resume_from_checkpoint=True)
        assert all(torch.equal(before[name], value) for name, value in weights(made).items())

    refused("model was", tiny.model(seed=5, tie_word_embeddings=False))
    refused("adapter was not there and is now LoRA", lora={})
    refused("forget data was", data=(FORGET[:9], RETAIN))
    refused("method was mollm and is now sum", method="sum")
    refused("dtype was float32 and is now bfloat16", tiny.model(tie_word_embeddings=False).bfloat16())
    refused("freeze_embeddings was True", freeze_embeddings=False)
    refused("optimizer base was not there and is now sgd", optimizer_options={"base": "sgd"})
    refused("optimizer base was not there", optimizer_options={"base": functools.partial(torch.optim.SGD)})
    state = tmp_path / "run" / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text()[:-20])
    refused("must be a whole checkpoint, but it is damaged")
    with pytest.raises(UsageError, match="must hold a checkpoint"):
        trainer(tmp_path / "new").train(resume_from_checkpoint=True)


def test_a_tokenizer_without_template_and_an_overlap_are_noted(tmp_path):
    plain = tiny.tokenizer(template=False)
    made = MOLLMTrainer(
        tiny.model(),
        MOLLMConfig(output_dir=str(tmp_path), use_cpu=True),
        forget_dataset=FORGET,
        retain_dataset=[*RETAIN, *FORGET[:2]],
        processing_class=plain,
    )
    assert any("has no chat template" in note for note in made.notes)
    assert "2 of 10 forget rows are also retain rows." in made.notes
