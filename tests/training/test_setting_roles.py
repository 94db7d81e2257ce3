import functools
from dataclasses import MISSING, fields

import pytest
import torch
from transformers import TrainingArguments

from mollm import MOLLMConfig
from mollm.errors import UsageError
from mollm.models import adapters
from mollm.training import setting_roles
from mollm.training.setting_roles import FIXED, FREE, UNSUPPORTED


def config(**options):
    return MOLLMConfig(output_dir="unused", use_cpu=True, **options)


def test_every_setting_has_one_role():
    """A field that is new here or in transformers must be put into a table."""
    names = {f.name for f in fields(MOLLMConfig)}
    tables = [set(UNSUPPORTED), FIXED, FREE]
    assert names - set().union(*tables) == set()
    for n, table in enumerate(tables):
        for other in tables[n + 1 :]:
            assert not table & other
    unknown = set().union(*tables) - names
    older = {f.name for f in fields(TrainingArguments)} & unknown
    assert not older


def test_every_field_of_an_adapter_is_used_or_refused():
    peft = pytest.importorskip("peft")
    for f in fields(peft.LoraConfig):
        if f.name in adapters.FIXED_FIELDS | adapters.FREE_FIELDS:
            continue
        made = peft.LoraConfig(target_modules=["q_proj"])
        value = not f.default if isinstance(f.default, bool) else "given"
        setattr(made, f.name, value)
        with pytest.raises(UsageError, match=f"{f.name} is not supported"):
            adapters.check_adapter(made)


def other(f):
    """A value that is not the default."""
    default = f.default if f.default_factory is MISSING else f.default_factory()
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    return {"optim": "sgd", "debug": "underflow_overflow"}.get(f.name, "given")


@pytest.mark.parametrize(
    "f", [f for f in fields(MOLLMConfig) if f.name in UNSUPPORTED], ids=lambda f: f.name
)
def test_what_would_be_ignored_is_refused_with_a_way_out(f):
    with pytest.raises(UsageError, match=f"{f.name} must be left out of a MOLLMConfig, but got"):
        config(**{f.name: other(f)})


def test_every_setting_is_fixed_or_free():
    made = config()
    settings = made.all_settings()
    fixed = setting_roles.fixed_settings(settings, made.for_optimizer())
    free = setting_roles.free_settings(settings)
    assert set(settings) - set(fixed) - set(free) - set(UNSUPPORTED) == {"optimizer_options"}
    assert fixed["forget rows per step"] == fixed["retain rows per step"] == 8
    assert fixed["data_seed"] == made.seed


def test_what_decides_the_optimizers_state_is_fixed():
    def fixed(**options):
        made = config(optimizer_options=options)
        return setting_roles.fixed_settings(made.all_settings(), made.for_optimizer())

    assert fixed() == fixed(base="adamw", gradient_memory="bfloat16", weight_decay=0.1)
    assert fixed() == fixed(gradient_memory="streamed", gram="blocks")
    for changed in (
        {"base": "sgd"},
        {"base": "sgd", "momentum": 0.9},
        {"base": torch.optim.SGD},
        {"base": functools.partial(torch.optim.SGD, momentum=0.5)},
        {"momentum": "per-objective"},
        {"momentum": "per-objective", "mean_beta": 0.8},
        {"metric": "euclidean"},
        {"state_dtype": "bfloat16"},
    ):
        assert fixed(**changed) != fixed(), changed


def test_a_setting_of_a_later_release_is_fixed():
    assert setting_roles.fixed_settings({"brand_new": 3}, {}) == {"brand_new": 3}


def test_settings_are_plain_for_json():
    base = functools.partial(torch.optim.SGD, momentum=0.5)
    text = config(optimizer_options={"base": base}).to_json_string()
    assert "SGD" in text
    assert (
        '"bfloat16"' in config(optimizer_options={"state_dtype": torch.bfloat16}).to_json_string()
    )
