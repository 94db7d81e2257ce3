import pytest
import torch

from mollm import MOLLMConfig
from mollm.errors import UsageError


def config(**options):
    return MOLLMConfig(output_dir="unused", use_cpu=True, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "magic"}, "method must be one of ga"),
        ({"reference": "twin"}, "reference must be one of auto"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16"),
        ({"padding_side": "top"}, "padding_side must be one of left, right"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must be a positive number"),
        ({"divergence": float("nan")}, "divergence must be a positive number"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha must be left out"),
        ({"optim": "sgd"}, "name the base in optimizer_options"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be left out"),
    ],
)
def test_values_that_do_not_go_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        config(**options)


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


def test_the_card_is_told_what_was_changed():
    told = config(save_steps=7, preferences=[1, 2, 3], hub_token="secret").told()
    assert told["save_steps"] == 7
    assert told["preferences"] == [1, 2, 3]
    assert told["method"] == "mollm"
    assert "secret" not in str(told)
    assert "logging_steps" not in told
