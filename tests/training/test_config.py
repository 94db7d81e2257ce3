import functools
import json
from dataclasses import fields
from enum import Enum

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from mollm import MOLLMConfig
from mollm.errors import UsageError
from mollm.system.precision import computing_in
from mollm.training.setting_roles import UNSUPPORTED


def config(**options):
    return MOLLMConfig(output_dir="unused", use_cpu=True, **options)


STREAMED = {"optimizer_options": {"gradient_memory": "streamed"}}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "magic"}, "method must be one of ga"),
        ({"adam_beta1": 0.5}, "adam_beta1 must be left out in AdamW's metric"),
        (
            {"lr_scheduler_kwargs": {"num_cycles": 2}},
            "lr_scheduler_kwargs must be options of the schedule linear",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min": 0.1}},
            "lr_scheduler_kwargs must be options of the schedule cosine_with_min_lr",
        ),
        ({"reference": "twin"}, "reference must be one of auto"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16"),
        ({"padding_side": "top"}, "padding_side must be one of left, right"),
        (
            {"per_device_retain_batch_size": 0},
            "per_device_retain_batch_size must be a whole number from 1",
        ),
        (
            {"per_device_train_batch_size": 0},
            "per_device_train_batch_size must be a whole number from 1",
        ),
        ({"learning_rate": -1.0}, "learning_rate must be a positive number"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\), but got -1"),
        ({"data_seed": 2**32}, "data_seed must be in"),
        ({"max_steps": 3.5}, "max_steps must be a whole number, but got 3.5"),
        ({"max_steps": True}, "max_steps must be a number, but got True"),
        ({"eval_steps": "often"}, "eval_steps must be a number, but got 'often'"),
        ({"disable_tqdm": 2}, "disable_tqdm must be true or false, but got 2"),
        ({"disable_tqdm": 1.0}, "disable_tqdm must be true or false, but got 1.0"),
        ({"seed": np.bool_(True)}, "seed must be a number, but got"),
        ({"max_loss_rise": float("nan")}, "max_loss_rise must be a finite number"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha must be left out"),
        ({"optim": "sgd"}, "name the base in optimizer_options"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be left out"),
        ({"uce_eps": 1.0}, "uce_eps must be between 0 and 1"),
        ({"push_to_hub": True}, "push_to_hub must be left out"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
            "must be one that goes by the step",
        ),
        ({"lr_scheduler_kwargs": "x"}, "lr_scheduler_kwargs must be options by name, but got 'x'"),
        (
            {"lr_scheduler_type": "Constant"},
            "lr_scheduler_type must be one of linear, .* got 'Constant'; did you mean constant",
        ),
        ({"lr_scheduler_type": None}, "lr_scheduler_type must be one of linear, .* but got None"),
        (
            {"eval_strategy": "STEPS"},
            "one of no, steps, epoch, but got 'STEPS'; did you mean st",
        ),
        ({"eval_strategy": True}, "eval_strategy must be one of no, steps, epoch, but got True"),
        ({"logging_strategy": "step"}, "logging_strategy must be one of .*; did you mean steps"),
        ({"save_strategy": 3}, "save_strategy must be one of no, steps, epoch, best, but got 3"),
        (
            {"load_best_model_at_end": True},
            "save_strategy must be that of .*, but got steps and eval_strategy no",
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 7},
            "save_steps must be a multiple of eval_steps .*, but got 500.* and 7",
        ),
        ({"logging_steps": 0}, "logging_steps must be a positive number with .* steps, but got 0"),
        ({"logging_steps": None}, "logging_steps must be a positive number .*, but got None"),
        ({"save_steps": -1}, "save_steps must be a positive number with .* steps, but got -1"),
        ({"save_steps": None}, "save_steps must be a positive number with .* but got None"),
        (
            {"eval_steps": 0, "eval_strategy": "steps"},
            "eval_steps must be a positive number with the eval_strategy steps, but got 0",
        ),
        (
            {"eval_strategy": "steps", "logging_strategy": "no", "logging_steps": 0},
            "logging_steps must be a positive number with the eval_strategy steps, but got 0",
        ),
        ({"learning_rate": None}, "learning_rate must be a number, but got None: leave it out for"),
        ({"max_steps": None}, "max_steps must be a number, but got None: leave it out for -1"),
        ({"uce_eps": None}, "uce_eps must be a number, but got None: leave it out for 0.0001"),
        ({"adam_epsilon": 0}, r"but got adam_epsilon=0: eps must be .*0 / 0: choose 1e-8\.$"),
        ({"adam_epsilon": None}, "adam_epsilon must be a number, but got None"),
        ({"adam_beta2": 1.0}, r"settings must suit .*, but got adam_beta2=1\.0: betas must be in"),
        ({"optimizer_options": {"eps": 0}}, "but got eps=0: eps must be at least"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1 .*, but got 0"),
        ({"logging_steps": 2.5}, "must suit the TrainingArguments of transformers.*2.5"),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"num_cycles": 2}},
            "lr_scheduler_kwargs must be left out with the schedule constant, which has none",
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"nosuch": 2}},
            "must be options of the schedule cosine, but got .*nosuch",
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "x"}},
            "must be options of the schedule cosine, but got .*'x'",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": -1.0}},
            "must make learning rates that are finite and not negative",
        ),
        ({"num_train_epochs": 0}, "num_train_epochs must be a positive number"),
        ({"num_train_epochs": float("inf")}, "num_train_epochs must be a finite number"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "eval_strategy must be given"),
        ({"preferences": [1, 2]}, "one entry per objective"),
        ({"optimizer_options": {"nesterov": True}}, "but got nesterov=True: .*nesterov"),
        ({"optimizer_options": {"base": "lion"}}, "base must be 'adamw', 'sgd'"),
        ({"optimizer_options": {"state_dtype": torch.int8}}, "state_dtype must be .* int8"),
        (
            {"optimizer_options": {"momentum": "per-objective"}, "max_grad_norm": 1.0},
            "max_grad_norm must be 0 with momentum='per-objective'.* but got 1.0: leave it out",
        ),
        (
            STREAMED | {"max_grad_norm": 1.0},
            "max_grad_norm must be 0 with gradient_memory='streamed'.* but got 1.0: leave it out",
        ),
        (
            STREAMED | {"gradient_checkpointing": True},
            "gradient_checkpointing must be left out with gradient_memory='streamed'",
        ),
        (
            {"optimizer_options": {"gradient_memory": "streamed", "base": torch.optim.SGD}},
            "base must be adamw or sgd with gradient_memory='streamed', but got SGD",
        ),
        (
            {"optimizer_options": {"gram": "blocks"}},
            "gram='blocks': gram must be 'model' without gradient_memory='streamed'",
        ),
    ],
)
def test_values_that_do_not_go_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        config(**options)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"seed": np.int64(3)}, 3),
        ({"max_steps": np.float32(3.0)}, 3),
        ({"learning_rate": np.float32(0.5)}, 0.5),
        ({"max_loss_rise": np.int32(2)}, 2),
        ({"disable_tqdm": np.bool_(False)}, False),
        ({"disable_tqdm": 1}, True),
        ({"disable_tqdm": np.int64(0)}, False),
    ],
)
def test_numbers_and_switches_of_numpy_are_taken_as_pythons(setting, expected):
    ((name, _),) = setting.items()
    found = getattr(config(**setting), name)
    assert found == expected
    assert type(found) is type(expected)


def test_a_switch_of_the_optimizer_may_be_a_number():
    made = config(optimizer_options={"normalize": 1}).for_optimizer()
    assert made["normalize"] is True


def test_what_parts_do_not_go_with_is_refused(monkeypatch):
    pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
    options = {"optimizer_options": {"state_dtype": "8bit"}}
    assert config(**options).for_optimizer()["state_dtype"] == "8bit"
    monkeypatch.setattr(MOLLMConfig, "world_size", 2)
    with pytest.raises(UsageError, match=r"must not be 8bit with fsdp.*full_shard"):
        config(fsdp="full_shard", **options)
    with pytest.raises(UsageError, match=r"freeze_embeddings must be True .*streamed.* and fsdp"):
        config(fsdp="full_shard", freeze_embeddings=False, **STREAMED)


@pytest.mark.parametrize("name", ["eval_strategy", "logging_strategy", "save_strategy"])
@pytest.mark.parametrize("no", [False, None, "no"])
def test_a_strategy_that_is_off_may_be_no_as_yaml_reads_it(name, no):
    assert getattr(config(**{name: no}), name).value == "no"


@pytest.mark.parametrize("nothing", [0, None, -1])
def test_steps_of_what_does_not_go_by_steps_may_be_none(nothing):
    off = {"logging_strategy": "no", "save_strategy": "epoch", "eval_strategy": "no"}
    names = ("logging_steps", "save_steps", "eval_steps")
    made = config(**off, **dict.fromkeys(names, nothing))
    assert [getattr(made, name) for name in names] == [nothing] * 3


def test_evaluations_go_by_the_steps_of_logs_where_they_have_none():
    made = config(eval_strategy="steps", eval_steps=None, logging_steps=7)
    assert made.eval_steps == 7


@pytest.mark.parametrize(
    ("given", "kept"), [(-1, None), (0, None), (None, None), (1, 1), ("-1", None)]
)
def test_no_limit_of_checkpoints_may_be_0_or_less_as_in_transformers(given, kept):
    assert config(save_total_limit=given).save_total_limit == kept


@pytest.mark.parametrize("name", ["relearn_steps", "warmup_steps", "max_grad_norm", "weight_decay"])
def test_nothing_is_0_where_that_is_the_default(name):
    assert getattr(config(**{name: None}), name) == 0


def test_every_word_of_transformers_is_in_a_table():
    made = TrainingArguments(output_dir="unused", use_cpu=True)
    words = {f.name for f in fields(made) if isinstance(getattr(made, f.name), Enum)}
    strategies = {"eval_strategy", "logging_strategy", "save_strategy"}
    assert words - set(UNSUPPORTED) == {"lr_scheduler_type", *strategies}


def test_best_and_evaluations_that_go_together_are_taken():
    steps = {"eval_strategy": "steps", "load_best_model_at_end": True}
    assert config(**steps, eval_steps=50, save_steps=100).load_best_model_at_end
    assert config(**steps, eval_steps=0.1, save_steps=0.3).load_best_model_at_end
    assert config(**steps, eval_steps=7, save_strategy="best").load_best_model_at_end


def test_bf16_goes_where_the_device_computes_in_it():
    with computing_in("bfloat16"):
        assert config(bf16=True).bf16
    with computing_in("float32"), pytest.raises(UsageError, match="bf16 must be left out"):
        config(bf16=True)


def test_options_reach_the_optimizer():
    options = config(
        method="sum",
        preferences=[1, 2, 3],
        adam_beta2=0.99,
        optimizer_options={"state_dtype": "bfloat16"},
    ).for_optimizer()
    assert options["direction"] == "sum"
    assert options["preferences"] == [1, 2, 3]
    assert options["betas"] == (0.9, 0.99)
    assert options["state_dtype"] is torch.bfloat16
    assert "betas" not in config(optimizer_options={"base": "sgd"}).for_optimizer()


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_a_dtype_may_be_given_as_such_or_by_name_and_can_be_logged(dtype):
    args = config(optimizer_options={"state_dtype": dtype, "betas": (0.9, 0.99)})
    assert args.for_optimizer()["state_dtype"] is torch.bfloat16
    logged = json.loads(args.to_json_string())["optimizer_options"]
    assert logged["state_dtype"] == "bfloat16"
    assert logged["betas"] == [0.9, 0.99]


@pytest.mark.parametrize(
    ("base", "logged"),
    [(torch.optim.SGD, "SGD"), (functools.partial(torch.optim.SGD), ["SGD", [], {}])],
)
def test_a_base_that_is_no_name_can_be_logged(base, logged):
    args = config(optimizer_options={"base": base})
    assert json.loads(args.to_json_string())["optimizer_options"]["base"] == logged
    assert args.optimizer_options["base"] is base


def test_clipping_goes_with_means_in_the_euclidean_metric():
    means = {"momentum": "per-objective"}
    assert config(max_grad_norm=1.0, optimizer_options={**means, "metric": "euclidean"})
    assert config(max_grad_norm=1.0, optimizer_options={**means, "base": "sgd"})
    assert config(max_grad_norm=0, optimizer_options=means)


def test_a_base_that_looks_at_its_parameters_is_not_tried():
    base = functools.partial(torch.optim.Muon, nesterov=False)
    assert config(optimizer_options={"base": base, "ns_steps": 3}).for_optimizer()["ns_steps"] == 3
    with pytest.raises(UsageError, match="direction must be"):
        config(optimizer_options={"base": base, "direction": "up"})
    assert not config(quantization=False).quantization


def test_the_card_is_told_what_was_changed():
    told = config(save_steps=7, preferences=[1, 2, 3], run_name="secret").reported_settings()
    assert told["save_steps"] == 7
    assert told["preferences"] == [1, 2, 3]
    assert told["method"] == "mollm"
    assert "secret" not in str(told)
    assert "logging_steps" not in told


def test_no_report_is_none():
    assert config(report_to=None).report_to == []


def test_numbers_of_a_schedule_may_be_written_as_texts():
    made = config(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": "1e-6"})
    assert made.lr_scheduler_kwargs == {"min_lr": 1e-6}


def test_the_first_moment_of_plain_adamw_can_be_set():
    made = config(adam_beta1=0.5, optimizer_options={"metric": "euclidean"})
    assert made.for_optimizer()["betas"][0] == 0.5


@pytest.mark.parametrize(("word", "meant"), [("no", False), ("off", False), ("True", True)])
def test_a_text_that_says_yes_or_no_is_taken_at_its_word(word, meant):
    made = config(freeze_embeddings=word, activation_checkpointing=word, logging_first_step=word)
    assert made.freeze_embeddings is meant
    assert bool(made.gradient_checkpointing) is meant
    assert made.logging_first_step is meant
    options = config(optimizer_options={"normalize": word}).for_optimizer()
    assert options["normalize"] is meant


@pytest.mark.parametrize(
    "options",
    [
        {"freeze_embeddings": "nope"},
        {"gradient_checkpointing": "maybe"},
        {"optimizer_options": {"track_conflicts": "never"}},
    ],
)
def test_a_text_that_says_neither_is_refused(options):
    with pytest.raises(UsageError, match="must be true or false, but got '"):
        config(**options)


@pytest.mark.parametrize("given", [".mlp.", "[.mlp.]", [".mlp."], (".mlp.",)])
def test_one_part_of_names_is_as_good_as_a_list(given):
    assert config(trainable_parameters=given).trainable_parameters == [".mlp."]
    assert config(trainable_parameters=[]).trainable_parameters is None


@pytest.mark.parametrize("given", [7, [7], [""], {"mlp": True}, "[{a: b}]"])
def test_what_is_no_part_of_names_is_refused(given):
    with pytest.raises(UsageError, match="trainable_parameters must be parts of names"):
        config(trainable_parameters=given)


def test_a_method_that_chooses_what_trains_is_left_to_it():
    with pytest.raises(UsageError, match="trainable_parameters must be left out with the method"):
        config(method="rmu", trainable_parameters=[".mlp."])


def test_a_share_of_the_steps_may_be_a_text():
    made = config(warmup_steps="0.1", max_steps="20")
    assert made.get_warmup_steps(20) == 2
    assert config(warmup_steps="3").warmup_steps == 3


def test_no_report_may_be_false():
    assert config(report_to=False).report_to == []
