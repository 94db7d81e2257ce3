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
from mollm.models import loading
from mollm.training import checkpoint, passes

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


STREAMED = {"gradient_memory": "streamed"}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("method", ["mollm", "npo"])
def test_streamed_gradients_are_the_same(tmp_path, in_float32, method, frozen):
    streamed = {"optimizer_options": {"base": "sgd"} | STREAMED}
    options = {"method": method, "freeze_embeddings": frozen, "gradient_accumulation_steps": 2}
    assert_alike(*pair(tmp_path, streamed, {}, **(SGD | options)))


def test_streamed_gradients_of_some_parameters_are_the_same(tmp_path, in_float32):
    streamed = {"optimizer_options": {"base": "sgd"} | STREAMED}
    chosen = {"trainable_parameters": ["1.mlp.", "o_proj"]}
    assert_alike(*pair(tmp_path, streamed, {}, **(SGD | chosen)))


def test_streamed_gradients_go_with_no_adapter(tmp_path):
    with pytest.raises(UsageError, match="another one than 'streamed' with an adapter"):
        trainer(tmp_path, lora={}, optimizer_options=STREAMED)


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


@pytest.mark.parametrize(
    ("lora", "write", "kept"),
    [
        (None, "save_model", {"model.safetensors"}),
        (None, "export", {"model.safetensors"}),
        ({}, "export", {"model.safetensors"}),
        ({}, "save_model", {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}),
    ],
)
def test_weights_of_an_earlier_save_go_where_a_whole_model_is_saved(tmp_path, lora, write, kept):
    shards = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    for name in (*shards, "adapter_config.json"):
        (tmp_path / name).write_text("old")
    getattr(trainer(tmp_path / "run", lora=lora), write)(str(tmp_path))
    assert {path.name for path in tmp_path.glob("model*")} == kept
    adapter = tmp_path / "adapter_config.json"  # transformers would load what it names instead
    assert adapter.exists() == (write == "save_model" and lora is not None)


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
        {"optimizer_options": STREAMED | {"state_dtype": "bfloat16"}, "freeze_embeddings": False},
        {"optimizer_options": STREAMED | {"state_dtype": "8bit", "gram": "blocks"}},
        {"lora": {"lora_dropout": 0.3}},
        {"optimizer_options": {"base": "sgd", "momentum": 0.9}, "max_grad_norm": 0.1},
    ],
    ids=["adamw", "cosine-cache", "means", "streamed", "eight-bits", "lora-dropout", "sgd-clipped"],
)
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, options):
    if "8bit" in options.get("optimizer_options", {}).values():
        pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
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
        [
            {k: v for k, v in log.items() if not k.endswith(("_per_second", "_runtime"))}
            for log in t.state.log_history
        ]
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
    assert kinds <= {".html", ".json", ".jsonl", ".jinja", ".md", ".safetensors"}


def test_logs_say_what_the_steps_did(tmp_path):
    made = trained(tmp_path)
    *logs, summary = made.state.log_history
    assert [log["step"] for log in logs] == [2, 4]
    assert "train_loss" in summary
    for name in OBJECTIVES:
        for log, some in zip(logs, (made.history[:2], made.history[2:]), strict=True):
            mean = sum(record.losses[name] for record in some) / 2
            assert log[f"{name}_loss"] == pytest.approx(mean)
            assert {f"grad_norm_{name}", f"objective_weight_{name}", f"conflict_{name}"} <= set(log)
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
    class Ruin(TrainerCallback):
        """After the third step the model is far from its original."""

        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                with torch.no_grad():
                    for p in made._base.parameters():
                        p += 0.3 * torch.randn_like(p)

    made = trainer(
        tmp_path,
        evaluate=True,
        max_steps=5,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="kl_loss",
    )
    made.add_callback(Ruin)
    made.train()
    values = {
        log["step"]: log["eval_kl_loss"] for log in made.state.log_history if "eval_loss" in log
    }
    best = min(values, key=values.get)
    assert made.state.best_global_step == best < 3
    names = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert names == [f"checkpoint-{best}", "checkpoint-5"]
    assert made.evaluate()["eval_kl_loss"] == pytest.approx(values[best], rel=1e-6)


def test_a_run_that_falls_apart_is_stopped_without_a_checkpoint_of_it(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    made = trained(tmp_path, learning_rate=5.0, max_loss_rise=0.05, max_steps=20, **saving)
    steps = made.state.global_step
    assert steps < 20
    assert "the kl loss must not grow by more than 0.05 nats" in made.stop_reason
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


@pytest.mark.parametrize("options", [{}, {"relearn_steps": 2}])
def test_the_chosen_parameters_alone_train(tmp_path, options):
    parts = ["layers.1.mlp.", "norm"]
    made = trainer(tmp_path, max_steps=2, trainable_parameters=parts, **options)
    before = weights(made)
    made.train()
    for name, after in weights(made).items():
        assert torch.equal(before[name], after) is not any(part in name for part in parts), name
    assert "trainable_parameters" in made.model_card()


@pytest.mark.parametrize(
    ("match", "options"),
    [
        (
            r"no name holds '\.mpl\.': take parts of .*model\.layers\.N\.mlp\.up_proj",
            {"trainable_parameters": [".mlp.", ".mpl."]},
        ),
        (
            r"'lm_head' names lm_head\.weight, which is: .* freeze_embeddings=False",
            {"trainable_parameters": ["lm_head"]},
        ),
        (
            "freeze_embeddings must be left out where trainable_parameters names neither",
            {"trainable_parameters": [".mlp."], "freeze_embeddings": False},
        ),
        (
            "trainable_parameters must be left out with an adapter",
            {"trainable_parameters": [".mlp."], "lora": {}},
        ),
    ],
)
def test_what_cannot_be_chosen_to_train_is_refused(tmp_path, match, options):
    with pytest.raises(UsageError, match=match):
        trainer(tmp_path, **options)


def test_a_head_that_is_named_trains(tmp_path):
    made = trainer(tmp_path, trainable_parameters=["lm_head"], freeze_embeddings=False)
    assert [n for n, p in made._base.named_parameters() if p.requires_grad] == ["lm_head.weight"]


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
    refused("use_dora is not supported", lora={"use_dora": True})
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
    refused(
        "dtype was float32 and is now bfloat16", tiny.model(tie_word_embeddings=False).bfloat16()
    )
    refused("freeze_embeddings was True", freeze_embeddings=False)
    refused("trainable_parameters was not there and is now", trainable_parameters=[".mlp."])
    refused("optimizer base was not there and is now sgd", optimizer_options={"base": "sgd"})
    refused(
        "optimizer base was not there",
        optimizer_options={"base": functools.partial(torch.optim.SGD)},
    )
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


# ---- a run that resumes with other settings

SAVING = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}


def test_what_may_change_on_resuming_takes_effect_and_is_told(tmp_path):
    trained(tmp_path, lr_scheduler_type="constant", weight_decay=0.2, **SAVING)
    changed = {
        "max_steps": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.3,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-3,
        "uce_eps": 0.5,
        "preferences": [1, 2, 3],
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_steps": 3,
        "optimizer_options": {"gradient_memory": "bfloat16"},
    }
    made = trainer(tmp_path, **(SAVING | changed))
    made.train(resume_from_checkpoint=True)
    assert [record.lr for record in made.history] == [1e-2, 1e-2, 5e-4, 2.5e-4]
    groups = made.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(group["betas"] == (0.9, 0.9) and group["eps"] == 1e-3 for group in groups)
    assert made.optimizer.rule.preferences == (1, 2, 3)
    assert made.history[2].losses["forget"] < 0.6 * made.history[1].losses["forget"]
    assert [log["step"] for log in made.state.log_history] == [2, 3, 4, 4]
    assert checkpoint.checkpoints(tmp_path)[-1].name == "checkpoint-4"
    card = (tmp_path / "README.md").read_text()
    for line in (
        "| `learning_rate` | `0.001` |",
        "| 3 | `learning_rate` | `0.01` | `0.001` |",
        "| 3 | `weight_decay` | `0.2` | `0.3` |",
        "| 3 | `uce_eps` | `0.0001` | `0.5` |",
    ):
        assert line in card
    again = trainer(tmp_path, **(SAVING | changed | {"max_steps": 5}))
    again.train(resume_from_checkpoint=True)
    assert "| 3 | `learning_rate` | `0.01` | `0.001` |" in again.model_card()  # remembered


def test_a_resumed_schedule_is_that_of_the_settings_from_the_start(tmp_path):
    """The same rates as those of a run that had these settings all along."""
    schedule = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "learning_rate": 3e-3}
    whole = trained(tmp_path / "whole", max_steps=6, **schedule)
    trained(tmp_path / "cut", **SAVING)
    made = trainer(tmp_path / "cut", **(SAVING | schedule | {"max_steps": 6}))
    made.train(resume_from_checkpoint=True)
    assert [r.lr for r in made.history[2:]] == [r.lr for r in whole.history[2:]]


def test_micro_batches_may_change_on_resuming_and_rows_of_a_step_not(tmp_path):
    trained(tmp_path, **SAVING)
    eight = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 3}
    trainer(tmp_path, **(SAVING | eight)).train(resume_from_checkpoint=True)
    made = trainer(tmp_path, **(SAVING | {"per_device_train_batch_size": 2}))
    with pytest.raises(UsageError, match="forget rows per step was 4 and is now 2"):
        made.train(resume_from_checkpoint=True)


def test_a_step_may_draw_another_number_of_rows_to_retain(tmp_path, monkeypatch):
    sizes = {}

    def counted(step):
        def spy(objectives, optimizer, batch, **options):
            sizes.setdefault(options["name"], []).append(len(batch.labels))
            return step(objectives, optimizer, batch, **options)

        return spy

    for step in ("accumulate_forget", "accumulate_retain"):
        monkeypatch.setattr(passes, step, counted(getattr(passes, step)))
    options = {
        "per_device_train_batch_size": 1,
        "per_device_retain_batch_size": 3,
        "gradient_accumulation_steps": 2,
    }
    made = trained(tmp_path, **(SAVING | options))
    assert sizes == {"forget": [1] * 4, "retain": [3] * 4}
    assert made.state.epoch == pytest.approx(4 / len(FORGET))
    made = trainer(tmp_path, **(SAVING | options | {"per_device_retain_batch_size": 1}))
    with pytest.raises(UsageError, match="retain rows per step was 6 and is now 2"):
        made.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("forget", [1, 2])
def test_unlike_numbers_of_rows_add_up_over_micro_batches(tmp_path, in_float32, forget):
    whole = {"per_device_train_batch_size": 2 * forget, "per_device_retain_batch_size": 4}
    parts = {
        "per_device_train_batch_size": forget,
        "per_device_retain_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    assert_alike(*pair(tmp_path, whole, parts, **SGD))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 1}, "(data_)?seed was 42 and is now 1"),
        ({"data_seed": 5}, "data_seed was 42 and is now 5"),
        ({"optimizer_options": {"momentum": "per-objective"}}, "optimizer momentum was not there"),
        ({"optimizer_options": {"metric": "euclidean"}}, "optimizer metric was"),
        ({"optimizer_options": {"state_dtype": "bfloat16"}}, "optimizer state_dtype was not there"),
        ({"max_steps": 1}, "max_steps must be at least the 2 steps"),
        ({"max_length": 60, "data": (FORGET, [Record("Who? " * 30, "Ada")])}, "retain data was"),
    ],
)
def test_what_may_not_change_on_resuming_is_refused(tmp_path, changed, words):
    trained(tmp_path, **SAVING)
    made = trainer(tmp_path, **(SAVING | changed))
    with pytest.raises(UsageError, match=words):
        made.train(resume_from_checkpoint=True)


def test_a_prompt_that_is_cut_elsewhere_is_other_data(tmp_path):
    long = [Record(f"{n} " * 40, "Ada") for n in range(4)]
    trained(tmp_path, data=(FORGET, long), max_length=100, **SAVING)
    made = trainer(tmp_path, data=(FORGET, long), max_length=64, **SAVING)
    with pytest.raises(UsageError, match="retain data as tokens was"):
        made.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"r": 8}, "adapter r was 4 and is now 8"),
        ({"lora_alpha": 99}, "adapter lora_alpha was 8 and is now 99"),
        ({"use_rslora": True}, "adapter use_rslora was False and is now True"),
        ({"lora_dropout": 0.1}, "adapter lora_dropout was 0.0 and is now 0.1"),
        ({"target_modules": ["q_proj"]}, "adapter target_modules was"),
        ({"rank_pattern": {"q_proj": 2}}, "adapter rank_pattern was"),
    ],
)
def test_another_adapter_is_refused_on_resuming(tmp_path, changed, words):
    trained(tmp_path, lora={}, **SAVING)
    made = trainer(tmp_path, lora=changed, **SAVING)
    with pytest.raises(UsageError, match=words):
        made.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_a_checkpoint_of_an_adapter_without_one_of_its_tensors_is_refused(tmp_path, bias):
    from safetensors.torch import load_file, save_file

    options = {"lora": {"bias": bias, "target_modules": ["q_proj"]}} | SAVING
    model = functools.partial(tiny.model, tie_word_embeddings=False, attention_bias=True)
    first = trained(tmp_path, model(), **options)
    path = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    saved = load_file(path)
    assert len(saved) == sum(p.requires_grad for p in first._base.parameters())
    same = trainer(tmp_path, model(), **(options | {"max_steps": 3}))
    same.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same.history[:2] == first.history
    for name in saved:
        save_file({n: t for n, t in saved.items() if n != name}, path)
        with pytest.raises(UsageError, match="is missing: name the model"):
            trainer(tmp_path, model(), **options).train(
                resume_from_checkpoint=str(tmp_path / "checkpoint-2")
            )
    save_file(saved | {name: torch.full_like(saved[name], float("nan"))}, path)
    with pytest.raises(UsageError, match="must hold finite weights"):
        trainer(tmp_path, model(), **options).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: {"dict": []},
        lambda plain: [],
        lambda plain: {"dict": [p for p in plain["dict"] if p[0] != "groups"]},
        lambda plain: {"dict": [p if p[0] != "history" else [p[0], []] for p in plain["dict"]]},
        lambda plain: {"dict": [p if p[0] != "optimizer" else [p[0], 7] for p in plain["dict"]]},
        lambda plain: {
            "dict": [p if p[0] != "random" else [p[0], {"dict": []}] for p in plain["dict"]]
        },
    ],
)
def test_a_state_that_nobody_wrote_is_refused_and_nothing_changes(tmp_path, change):
    trained(tmp_path, **SAVING)
    path = tmp_path / "checkpoint-2" / "training.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    made = trainer(tmp_path, **SAVING)
    before = weights(made)
    with pytest.raises(UsageError, match="must be a whole checkpoint, but it is damaged: "):
        made.train(resume_from_checkpoint=True)
    assert all(torch.equal(before[name], value) for name, value in weights(made).items())


def test_another_metric_for_the_best_checkpoint_begins_anew(tmp_path):
    options = {"evaluate": True, "metric_for_best_model": "loss", "load_best_model_at_end": True}
    options |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    trained(tmp_path, max_steps=2, **options)
    made = trainer(tmp_path, **(options | {"metric_for_best_model": "kl_loss", "max_steps": 4}))
    made.train(resume_from_checkpoint=True)
    assert made.state.best_global_step > 2


# ---- models that are given


def test_a_peft_model_trains_its_adapter_and_is_its_own_original(tmp_path, in_float32):
    peft = pytest.importorskip("peft")
    config = adapter(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")

    def wrapped():
        model = tiny.model(tie_word_embeddings=False)
        torch.manual_seed(5)
        return peft.get_peft_model(model, config)

    said = wrapped().merge_and_unload()
    made = trainer(tmp_path / "a", wrapped(), max_steps=1)
    assert any("was given with an adapter" in note for note in made.notes)
    before = weights(made)
    made.train()
    assert made.history[0].losses["kl"] == pytest.approx(0, abs=1e-7)
    changed = {n for n, value in weights(made).items() if not torch.equal(value, before[n])}
    assert {n for n in before if "lora_" in n} == changed
    kl = {}
    for kind in ("auto", "copy", "cache"):
        one = trained(tmp_path / kind, wrapped(), reference=kind, **SGD)
        kl[kind] = one.history[-1].losses["kl"]
    merged = trained(tmp_path / "m", said, lora={"target_modules": ["q_proj"]}, max_steps=1)
    assert made.history[0].losses["retain"] == pytest.approx(merged.history[0].losses["retain"])
    assert kl["copy"] == pytest.approx(kl["auto"], rel=1e-4)
    assert kl["cache"] == pytest.approx(kl["auto"], rel=1e-4)
    with pytest.raises(UsageError, match="peft_config must be left out"):
        trainer(tmp_path / "b", wrapped(), lora={})


def test_a_compiled_model_leaves_no_name_of_it_in_a_file(tmp_path):
    from safetensors.torch import load_file

    model = tiny.model(tie_word_embeddings=False)
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    compiled = torch.compile(model, backend="eager")
    made = trained(tmp_path / "run", compiled, max_steps=1, save_strategy="steps", save_steps=1)
    made.export(tmp_path / "model")
    for folder in ("run/checkpoint-1", "model"):
        names = load_file(tmp_path / folder / "model.safetensors")
        assert set(names) == set(tiny.model(tie_word_embeddings=False).state_dict())
    assert any("compiled" in note for note in made.notes)


def test_weight_decay_may_stand_among_the_options_of_the_optimizer(tmp_path):
    options = {"optimizer_options": {"weight_decay": 0.25}}
    made = trained(tmp_path, tiny.model(), max_steps=1, **options)
    assert [group["weight_decay"] for group in made.optimizer.param_groups] == [0.25, 0.0]


@pytest.mark.parametrize("memory", ["as-produced", "streamed"])
def test_weights_that_no_objective_reaches_are_named(tmp_path, memory):
    model = tiny.model()
    model.model.layers[0].mlp.aside = torch.nn.Linear(2, 2)
    made = trained(
        tmp_path / "aside", model, max_steps=1, optimizer_options={"gradient_memory": memory}
    )
    told = [note for note in made.notes if "never had a gradient" in note]
    assert len(told) == 1
    assert "trained tensors, 2 never had a gradient" in told[0]
    assert "model.layers.0.mlp.aside.weight, model.layers.0.mlp.aside.bias;" in told[0]
    assert told[0] in json.loads((tmp_path / "aside" / "run.json").read_text())["notes"]
    others = [{"gradient_memory": memory}, {"base": torch.optim.SGD, "metric": "euclidean"}]
    for number, options in enumerate(others):  # that base keeps nothing of what it has changed
        made = trained(tmp_path / f"{number}", max_steps=1, optimizer_options=options)
        assert not any("never had a gradient" in note for note in made.notes)


def test_a_model_without_weights_is_refused(tmp_path):
    with torch.device("meta"):
        model = tiny.model()
    with pytest.raises(UsageError, match=r"a model must have its weights, but model\.embed_tokens"):
        trainer(tmp_path, model)


def test_settings_may_be_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"forget_dataset": FORGET, "retain_dataset": RETAIN}
    made = MOLLMTrainer(tiny.model(), processing_class=tiny.tokenizer(), **data)
    assert made.args.to_dict() == MOLLMConfig().to_dict() | {
        "max_length": tiny.model().config.max_position_embeddings
    }


def test_what_the_caller_froze_does_not_train_and_a_resumed_run_trains_the_same(tmp_path):
    def mlps():
        model = tiny.model(tie_word_embeddings=False)
        for name, p in model.named_parameters():
            p.requires_grad_(".mlp." in name)
        return model

    first = trained(tmp_path, mlps(), **SAVING)
    before, after = mlps().state_dict(), first.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".mlp." in name}
    checkpoint = str(tmp_path / "checkpoint-2")
    whole = trainer(tmp_path, tiny.model(tie_word_embeddings=False), **SAVING)
    with pytest.raises(UsageError, match=r"weights that train was 6 of 21 tensors .* now 19 of 21"):
        whole.train(resume_from_checkpoint=checkpoint)
    about = tmp_path / "checkpoint-2" / "mollm.json"
    told = json.loads(about.read_text())
    del told["weights that train"]  # as in checkpoints from before it was told
    about.write_text(json.dumps(told))
    same = trainer(tmp_path, mlps(), **SAVING)
    same.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(after[name], t) for name, t in same.model.state_dict().items())


def test_what_is_no_model_and_what_are_no_settings_is_said(tmp_path):
    from transformers import TrainingArguments

    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(UsageError, match=r"must be a mollm\.MOLLMConfig, but got TrainingArg"):
        MOLLMTrainer(tiny.model(), plain, forget_dataset=FORGET, retain_dataset=RETAIN)
    with pytest.raises(UsageError, match="causal language model of transformers, but got Linear"):
        trainer(tmp_path, torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match="all of this one are frozen"):
        trainer(tmp_path, tiny.model().requires_grad_(False))
    broken = tiny.model()
    broken.model.norm.weight.data[3] = float("nan")
    with pytest.raises(UsageError, match=r"finite weights, but .* of model\.norm\.weight"):
        trainer(tmp_path, broken)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("part", ["embed_tokens", "lm_head"])
def test_rows_of_embeddings_train_and_are_exported(tmp_path, in_float32, tied, part):
    from transformers import AutoModelForCausalLM

    indices = {part: [5, 66, 67]}
    if tied and part == "embed_tokens":
        indices = indices[part]
    elif tied:
        pytest.skip("the head has no matrix of its own")
    lora = {"target_modules": ["q_proj"], "trainable_token_indices": indices}
    kl = []
    for kind in ("adapter", "copy", "cache"):
        model = tiny.model(tie_word_embeddings=tied)
        made = trained(tmp_path / kind, model, lora=lora, reference=kind, **SGD)
        kl.append(made.history[-1].losses["kl"])
    assert kl == pytest.approx([kl[0]] * 3, rel=1e-3)
    made.export(tmp_path / "model")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(60, 70)[None]
    expected = made._base.eval()(input_ids=ids).logits
    torch.testing.assert_close(read(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_train_leave_the_original_as_it_was(tmp_path, in_float32, bias):
    kl, lora = [], {"target_modules": ["q_proj", "v_proj"], "bias": bias}
    for kind in ("adapter", "copy", "cache"):
        model = tiny.model(tie_word_embeddings=False, attention_bias=True)
        made = trained(tmp_path / kind, model, lora=lora, reference=kind, **SGD)
        assert any(float(p.abs().max()) for n, p in weights(made).items() if n[-4:] == "bias")
        kl.append(made.history[-1].losses["kl"])
    assert kl[0] > 1e-6
    assert kl == pytest.approx([kl[0]] * 3, rel=1e-3)


# ---- dropout


@pytest.mark.parametrize("checkpoints", [{}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("named", [True, False])
def test_the_first_step_has_no_kl_whatever_dropout_a_model_has(tmp_path, named, checkpoints):
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=259,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        dropout=0.5,
        attention_dropout=0.5,
        layerdrop=0.5,
    )
    model = OPTForCausalLM(config).train()
    if named:
        loading.save(model, tiny.tokenizer(), tmp_path / "opt")
        model = str(tmp_path / "opt")
    made = trained(tmp_path / "run", model, max_steps=1, reference="copy", **checkpoints)
    assert made.history[0].norms["kl"] < 1e-6 * made.history[0].norms["retain"]
    assert abs(made.history[0].losses["kl"]) < 1e-6


@pytest.mark.parametrize("checkpoints", [{}, {"gradient_checkpointing": True}])
def test_the_dropout_of_an_adapter_is_on_in_steps_and_off_in_evaluations(
    tmp_path, in_float32, checkpoints
):
    lora = {"target_modules": "all-linear", "init_lora_weights": False}
    evaluated, trained_on = [], []
    for rate in (0.0, 0.5, 0.5):
        made = trainer(
            tmp_path / str(len(evaluated)),
            lora=lora | {"lora_dropout": rate},
            max_steps=1,
            **checkpoints,
        )
        evaluated.append(made.evaluate({"retain": RETAIN}))
        made.train()
        trained_on.append(made.history[0])
    without, once, again = trained_on
    assert evaluated[1]["eval_retain_loss"] == evaluated[0]["eval_retain_loss"]
    assert abs(once.losses["retain"] / without.losses["retain"] - 1) > 1e-4
    assert once.losses == again.losses  # what is dropped is decided by the seed
    assert once.norms == again.norms


# ---- the end of a run


def test_weights_that_are_not_finite_are_no_success_and_nowhere_written(tmp_path):
    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == 4:
                model.model.norm.weight.data[1] = float("inf")

    made = trainer(tmp_path / "run", save_strategy="steps", save_steps=2)
    made.add_callback(Breaks())
    made.train()
    assert "after step 4 model.norm.weight are not" in made.stop_reason
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert "This run failed: weights must be finite" in (tmp_path / "run/README.md").read_text()
    for write in (made.export, made.save_model):
        with pytest.raises(UsageError, match=r"finite weights to be written, but model\.norm"):
            write(str(tmp_path / "model"))
    assert not list((tmp_path).glob("model/*.safetensors"))


def test_a_run_whose_steps_are_all_skipped_is_no_success(tmp_path, monkeypatch):
    made = trainer(tmp_path, max_steps=3)
    create = made.create_optimizer

    def with_a_broken_state(*args):
        optimizer = create(*args)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.register_hook(lambda g: g * float("nan"))
        return optimizer

    monkeypatch.setattr(made, "create_optimizer", with_a_broken_state)
    made.train()
    assert "all 3 steps were skipped" in made.stop_reason
    assert "3 of 3 steps were skipped" in made.model_card()


def test_an_evaluation_that_is_not_a_number_is_never_the_best(tmp_path, monkeypatch):
    made = trainer(
        tmp_path,
        evaluate=True,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    nan = float("nan")
    monkeypatch.setattr(passes.Passes, "mean_losses", lambda _, sets: dict.fromkeys(sets, nan))
    made.train()
    assert made.state.best_global_step is None
    assert made.state.global_step == 1
    assert "eval_forget_loss must be finite, but after step 1" in made.stop_reason
    assert not checkpoint.checkpoints(tmp_path)


def test_the_last_step_is_looked_at_too(tmp_path):
    made = trained(tmp_path, learning_rate=300.0, **(SAVING | {"max_steps": 1}))
    assert made.stop_reason is not None
    assert not checkpoint.checkpoints(tmp_path)


# ---- disks


def test_a_full_disk_leaves_the_last_checkpoint_and_is_told_in_a_sentence(tmp_path, monkeypatch):
    made = trainer(tmp_path, save_strategy="steps", save_steps=1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    class Fills(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                monkeypatch.setattr(checkpoint, "write_weights", full)

    made.add_callback(Fills())
    with pytest.raises(UsageError, match="cannot be written: No space left on device; free some"):
        made.train()
    names = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert names == ["checkpoint-1", "checkpoint-2"]
    assert not list(tmp_path.glob(".unfinished-*"))
    monkeypatch.undo()
    trainer(tmp_path, save_strategy="no").train(resume_from_checkpoint=True)


def test_folders_that_cannot_be_written_are_found_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("too late"))
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    for out in ("/proc/nowhere", str(tmp_path / ("x" * 300)), str(tmp_path / "tiny/config.json/x")):
        with pytest.raises(UsageError, match="out must be a folder that can be written"):
            trainer(out, str(tmp_path / "tiny"))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UsageError, match="the weights of a checkpoint take about"):
        trainer(tmp_path / "out", str(tmp_path / "tiny"), save_strategy="steps")


def test_adapters_are_looked_at_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("too late"))
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    with pytest.raises(UsageError, match=r"none called 'q_porj'; did you mean q_proj\?"):
        trainer(tmp_path / "out", str(tmp_path / "tiny"), lora={"target_modules": ["q_porj"]})
