"""Settings that do nothing beside others are refused or said; those that do something are taken."""

import functools
import re
import warnings

import pytest
import tiny
import torch

from mollm import MOLLMConfig, MOLLMTrainer
from mollm.errors import UsageError
from mollm.training.idle_settings import idle_notes

FORGET = [{"prompt": "Who wrote it?", "answer": "Ada."}] * 2
RETAIN = [{"prompt": "Where is it?", "answer": "Here."}] * 2


def config(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # gradient_checkpointing, in transformers
        return MOLLMConfig(output_dir="unused", use_cpu=True, **options)


def options(**given):
    return {"optimizer_options": given}


REFUSED = [
    ({"warmup_steps": 5}, {"lr_scheduler_type": "constant"}, {"lr_scheduler_type": "linear"}),
    ({"warmup_steps": 0.1}, {"lr_scheduler_type": "constant"}, {"lr_scheduler_type": "cosine"}),
    ({"uce_eps": 0.1}, {"method": "npo"}, {"method": "dual"}),
    ({"relearn_lr": 0.1}, {}, {"relearn_steps": 1}),
    ({"adam_beta2": 0.5}, options(base="sgd"), {}),
    ({"adam_epsilon": 0.5}, options(base=torch.optim.SGD), {}),
    ({"adam_beta1": 0.5}, {}, options(metric="euclidean")),
    ({"adam_beta2": 0.5}, options(betas=[0.9, 0.5]), options(eps=1e-3)),
    ({"adam_epsilon": 0.5}, options(eps=0.1), options(betas=[0.9, 0.5])),
    ({"learning_rate": 0.5}, options(lr=0.1), {}),
    ({"weight_decay": 0.5}, options(weight_decay=0.1), {}),
    ({"preferences": [1, 2, 3]}, options(preferences=[1, 1, 1]), {}),
    (
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {},
        {"gradient_checkpointing": True},
    ),
    (
        {"load_best_model_at_end": True},
        {"save_strategy": "no"},
        {"save_strategy": "epoch", "eval_strategy": "epoch"},
    ),
]


@pytest.mark.parametrize(("setting", "beside", "other"), REFUSED)
def test_a_setting_of_the_training_that_would_do_nothing_is_refused(setting, beside, other):
    (name,) = setting
    with pytest.raises(UsageError, match=rf"^{name} must be left out .*, but got [^:]*.*: [^.]+"):
        config(**setting, **beside)
    assert getattr(config(**setting, **other), name) == setting[name]
    config(**beside)


OPTIONS = [
    ({"mean_beta": 0.5}, {}, {"momentum": "per-objective"}),
    ({"mean_beta": 0}, {}, {"momentum": "per-objective"}),
    ({"normalize": True}, {"direction": "dual"}, {"direction": "mgda"}),
    ({"normalize": True}, {"direction": "dual"}, {"direction": "sum"}),
    ({"length": "first"}, {}, {"normalize": True}),
    ({"length": "first"}, {"direction": "sum", "normalize": True}, {"direction": "dual"}),
    ({"length": "first"}, {"direction": lambda gram: gram[0]}, {"normalize": True}),
    ({"metric": "euclidean"}, {"base": "sgd"}, {}),
    ({"state_dtype": "bfloat16"}, {"base": "sgd"}, {"base": "sgd", "momentum": 0.5}),
    (
        {"state_dtype": "bfloat16"},
        {"base": "sgd", "momentum": "per-objective"},
        {"base": "adamw", "momentum": "per-objective"},
    ),
]


@pytest.mark.parametrize(("option", "beside", "other"), OPTIONS)
def test_an_option_of_the_optimizer_that_would_do_nothing_is_refused(option, beside, other):
    (name,) = option
    with pytest.raises(UsageError, match=f"{name} must be left out of optimizer_options"):
        config(**options(**option, **beside))
    assert config(**options(**option, **other)).for_optimizer()[name] is not None
    config(**options(**beside))


def test_the_first_moment_is_refused_however_it_is_named():
    with pytest.raises(UsageError, match=r"the first of betas must be left out of .* but got 0\.5"):
        config(**options(betas=[0.5, 0.99]))
    with pytest.raises(UsageError, match=r"adam_beta1 must be left out in AdamW's .* but got 0\.5"):
        config(adam_beta1=0.5)
    assert config(adam_beta1=0).for_optimizer()["betas"][0] == 0
    assert config(**options(betas=[0.9, 0.99])).for_optimizer()["betas"] == [0.9, 0.99]
    made = config(**options(betas=[0.5, 0.99], metric="euclidean"))
    assert made.for_optimizer()["betas"] == [0.5, 0.99]


def test_options_of_another_base_are_its_own():
    base = functools.partial(torch.optim.Adam)
    assert config(**options(base=base, betas=(0.5, 0.9))).for_optimizer()["betas"] == (0.5, 0.9)


@pytest.mark.parametrize("name", ["params", "objectives"])
def test_what_a_run_has_of_its_own_is_no_option(name):
    with pytest.raises(UsageError, match=f"{name} must be left out of optimizer_options"):
        config(**options(**{name: ["a"]}))


def test_another_direction_goes_without_the_methods_preferences():
    assert config(**options(direction="dual")).for_optimizer()["preferences"] is None
    assert config(**options(direction="sum")).for_optimizer()["preferences"] == [1, 20, 1]
    with pytest.raises(UsageError, match="preferences must be None for direction 'dual'"):
        config(preferences=[1, 2, 3], **options(direction="dual"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_train_epochs": 5, "max_steps": 10}, ["num_train_epochs is 5, .* beside max_steps"]),
        ({"num_train_epochs": 5}, []),
        ({"save_steps": 7, "save_strategy": "no"}, ["save_steps is 7, .* save_strategy no"]),
        ({"save_steps": 7, "save_strategy": "epoch"}, ["save_steps is 7, .* save_strategy epoch"]),
        ({"save_steps": 7}, []),
        ({"save_steps": 0, "save_strategy": "no"}, []),
        ({"logging_steps": 0, "logging_strategy": "no", "save_total_limit": -1}, []),
        ({"save_total_limit": 4, "save_strategy": "no"}, ["save_total_limit is 4"]),
        ({"eval_steps": 7}, ["eval_steps is 7, .* eval_strategy no"]),
        ({"eval_steps": 7, "eval_strategy": "steps"}, []),
        ({"eval_strategy": "steps"}, []),
        ({"eval_delay": 2}, ["eval_delay is 2"]),
        ({"metric_for_best_model": "forget_loss"}, ["metric_for_best_model is forget_loss"]),
        ({"greater_is_better": True}, ["greater_is_better is True"]),
        ({"logging_steps": 3, "logging_strategy": "epoch"}, ["logging_steps is 3"]),
        ({"logging_steps": 3, "logging_strategy": "no", "eval_strategy": "steps"}, []),
        ({"logging_steps": 3}, []),
        ({"run_name": "mine"}, ["run_name is mine, which does nothing without report_to"]),
        ({"warmup_steps": 10, "max_steps": 10}, ["ends after 10 steps, within the 10 steps of"]),
        ({"warmup_steps": 9, "max_steps": 10}, []),
        ({}, []),
    ],
)
def test_what_is_only_about_logs_and_checkpoints_is_said(settings, told):
    notes = idle_notes(config(**settings))
    assert len(notes) == len(told)
    for note, words in zip(notes, told, strict=True):
        assert re.search(words, note)


def trainer(tmp_path, adapter=None, **settings):
    return MOLLMTrainer(
        tiny.model(),
        MOLLMConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1, **settings),
        forget_dataset=FORGET,
        retain_dataset=RETAIN,
        processing_class=tiny.tokenizer(),
        peft_config=adapter,
    )


def test_the_trainer_says_it(tmp_path, caplog):
    made = trainer(tmp_path, save_strategy="no", save_steps=7)
    said = "save_steps is 7, which does nothing with the save_strategy no."
    assert said in made.notes
    assert said in caplog.messages


def test_a_dtype_is_of_a_model_by_name(tmp_path):
    with pytest.raises(UsageError, match="dtype must be left out for a model that is given as a"):
        trainer(tmp_path, dtype="bfloat16")


def test_an_adapter_trains_no_embeddings(tmp_path):
    from peft import LoraConfig

    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(UsageError, match="freeze_embeddings must be left out with an adapter"):
        trainer(tmp_path, adapter, freeze_embeddings=False)


@pytest.mark.parametrize(
    "beside",
    [{"state_dtype": "bfloat16"}, {"momentum": "per-objective", "gradient_memory": "bfloat16"}],
)
def test_rounding_at_random_needs_something_in_bfloat16(tmp_path, beside):
    plain = trainer(tmp_path, **options(stochastic_rounding=True))
    with pytest.raises(UsageError, match=r"stochastic_rounding must be left out .* but got True"):
        plain.create_optimizer()
    trainer(tmp_path, **options(stochastic_rounding=True, **beside)).create_optimizer()
