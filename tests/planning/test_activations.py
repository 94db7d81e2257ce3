"""What layers keep is counted on one layer of each kind, and one more."""

import time

import pytest
import zoo
from transformers import FalconMambaConfig

from mollm.planning import activations
from mollm.planning.memory import plan
from mollm.planning.settings import PlanSettings
from mollm.planning.shapes import shape_of

MANY = {
    "mamba": {"num_hidden_layers": 5},
    "gpt2": {"n_layer": 5},
    "gpt_oss": {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3},
    "deepseek_v3": {"num_hidden_layers": 5, "first_k_dense_replace": 2},
}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", MANY)
def test_few_layers_stand_for_all(kind, lora, monkeypatch):
    config = zoo.config_of(kind, **MANY[kind])
    case = (config, "float32", lora, lora, 2, 12)
    every = activations._bytes_of_length(*case, None)
    followed = []
    counted = activations._counted

    def noted(*args):
        followed.append(args[-1])
        return counted(*args)

    monkeypatch.setattr(activations, "_counted", noted)
    assert activations._bytes_of_rows(*case) == every
    assert None not in followed  # the model ran with few layers


@pytest.mark.parametrize("kind", ["zamba2", "jamba"])
def test_a_model_that_needs_all_of_its_layers_is_followed_through_all(kind):
    case = (zoo.config_of(kind), "float32", False, False, 2, 12)
    assert activations._bytes_of_rows(*case) == activations._bytes_of_length(*case, None)


def test_sixty_four_layers_of_mamba_are_planned_in_seconds():
    config = FalconMambaConfig(num_hidden_layers=64, hidden_size=1024)
    settings = PlanSettings(
        batch_size=1, sequence_length=512, dtype="bfloat16", compute_dtype="bfloat16", device="cuda"
    )
    begun = time.process_time()
    found = plan(shape_of(config, "falcon"), settings)
    assert time.process_time() - begun < 60
    assert found.component("activations") > 0


def test_a_longer_row_of_mamba_keeps_what_a_whole_pass_counts():
    config = zoo.config_of("mamba", num_hidden_layers=4)
    case = (config, "float32", False, False, 1, 40)
    whole = activations._counted(*case, None)
    assert activations._bytes_of_rows(*case) == pytest.approx(whole.kept, rel=1e-3)
    scan = activations._bytes_of_scan(config, "float32", False, False, 40)
    assert scan == whole.largest == config.intermediate_size * config.state_size * 40 * 4
    assert activations._bytes_of_scan(zoo.config_of("gpt2"), "float32", False, False, 40) == 0
