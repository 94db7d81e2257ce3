"""Scripts that read their settings as those of transformers do, with HfArgumentParser."""

import json
from dataclasses import MISSING, fields

import pytest
from transformers import HfArgumentParser, TrainingArguments

from mollm import MOLLMConfig
from mollm.errors import UsageError


def parsed(*words):
    parser = HfArgumentParser(MOLLMConfig)
    (found,) = parser.parse_args_into_dataclasses(["--output_dir", "unused", *words])
    return found


GIVEN = {
    "method": "npo",
    "method_options": {"beta": 0.2},
    "preferences": {"kl": 20, "retain_code": 2},
    "relearn_steps": 2,
    "relearn_lr": 1e-3,
    "uce_eps": 1e-3,
    "reference": "copy",
    "per_device_retain_batch_size": 2,
    "max_length": 64,
    "train_on_turns": "all",
    "long_rows": "skip",
    "system_prompt": "Be brief.",
    "chat_template_kwargs": {"enable_thinking": False},
    "prompt_format": {"template": "Q: {question} A: {answer}", "stop": ["Q:"]},
    "padding_side": "left",
    "dtype": "bfloat16",
    "compute_dtype": "float32",
    "quantization": "nf4",
    "freeze_embeddings": False,
    "trainable_parameters": [".mlp.", "norm"],
    "optimizer_options": {"base": "sgd", "momentum": 0.9},
    "stop_when": {"forget_probability": 0.1, "steps": 5},
    "sample_replies": 3,
    "max_loss_rise": 2.0,
}
WITH = {"method_options": {"method": "npo"}, "relearn_lr": {"relearn_steps": 1}}


def test_every_setting_of_ours_is_tried():
    ours = {f.name for f in fields(MOLLMConfig)} - {f.name for f in fields(TrainingArguments)}
    assert ours == set(GIVEN)


@pytest.mark.parametrize("name", GIVEN)
def test_a_setting_is_read_from_words_as_from_python(name):
    settings = {name: GIVEN[name], **WITH.get(name, {})}
    words = [
        word
        for key, value in settings.items()
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]
    found, direct = parsed(*words), MOLLMConfig(output_dir="unused", **settings)
    assert found.to_dict() == direct.to_dict()
    assert getattr(found, name) == GIVEN[name]


@pytest.mark.parametrize(
    ("words", "preferences"),
    [
        ("[1, 20, 1]", [1, 20, 1]),
        ("{kl: 20}", {"kl": 20}),
        ('{"kl": 20, "retain_code": 2e-1}', {"kl": 20, "retain_code": 0.2}),
    ],
)
def test_preferences_may_be_yaml_or_json(words, preferences):
    assert parsed("--preferences", words).preferences == preferences


def test_a_template_stays_one():
    template = "{question}\n{answer}"
    assert parsed("--prompt_format", template).prompt_format == template


def test_without_words_all_is_default():
    found = parsed()
    for f in fields(MOLLMConfig):
        if f.name in GIVEN:
            default = f.default if f.default is not MISSING else f.default_factory()
            assert getattr(found, f.name) == default


def test_help_can_be_printed():
    assert "--preferences" in HfArgumentParser(MOLLMConfig).format_help()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--preferences", "kl"), "preferences must be numbers, such as"),
        (("--preferences", "[1, 20"), "preferences must be valid YAML"),
        (("--method_options", "beta"), "method_options must be options by name"),
        (("--optimizer_options", "[sgd]"), "optimizer_options must be options by name"),
        (("--fsdp", "full"), "fsdp must be one of full_shard, hybrid_shard"),
        (("--fsdp", "full_shard"), "fsdp must be left out of a run of one process"),
    ],
)
def test_words_that_say_nothing_are_refused(words, reason):
    with pytest.raises(UsageError, match=reason):
        parsed(*words)
