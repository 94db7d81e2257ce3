import json
import os

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from mollm.errors import UsageError
from mollm.models import loading
from mollm.models.checks import (
    check_config,
    check_files,
    check_finite,
    check_json_files,
    check_size,
    stored_elements,
)

CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "tiny-llama"
    loading.save(tiny.model(), tiny.tokenizer(), folder)
    return folder


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 10**9}, "a num_hidden_layers from 1 to 1,000, but got 1000000000"),
        ({"n_layer": 10**9}, "n_layer from 1 to 1,000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers from 1 to 1,000, but got 0"),
        ({"hidden_size": -4}, "hidden_size from 1 to 1,048,576, but got -4"),
        ({"hidden_size": "wide"}, "must hold a number as hidden_size, but got 'wide'"),
        ({"vocab_size": 10**400}, "but got a number of more than 300 digits"),
        ({"num_attention_heads": 10**6}, "num_attention_heads from 1 to 10,000"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings from 1 to 16,777,216"),
        ({"text_config": {"decoder": {"num_layers": 10**9}}}, "num_layers from 1 to 1,000"),
        ({"intermediate_size": [64, 10**9]}, "intermediate_size from 1 to"),
        ({"rope_theta": float("nan")}, "must hold numbers, but rope_theta is nan"),
        ({"layer_types": ["full_attention"] * 200_000}, "its layer_types has 200000 entries"),
    ],
)
def test_sizes_of_no_model_are_refused(values, words):
    with pytest.raises(UsageError, match=words):
        check_config(tiny.model().config.to_dict() | values, "tiny")


def test_configs_of_models_that_there_are_pass():
    check_config(tiny.model().config.to_dict(), "tiny")
    check_config(
        {
            "num_hidden_layers": 126, "hidden_size": 16384, "vocab_size": 262208,
            "intermediate_size": [8192, 16384], "max_position_embeddings": 10485760,
            "num_experts": 512, "sliding_window": None, "pad_token_id": -1, "tie": True,
            "time_step_limit": [0.0, float("inf")], "initializer_range": 0.02,
        },
        "large",
    )  # fmt: skip


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("read", [loading.load_config, loading.count_parameters])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_billion_layers_are_refused_before_anything_is_built(saved, read, kind):
    change_config(saved, model_type=kind, num_hidden_layers=10**9)
    given = str(saved) if read is loading.load_config else loading.find_model(str(saved))
    with pytest.raises(UsageError, match="num_hidden_layers from 1 to 1,000"):
        read(given)


def test_a_config_much_larger_than_its_weights_takes_no_memory(saved):
    change_config(saved, hidden_size=1 << 19, num_attention_heads=4096)
    with pytest.raises(UsageError, match=r"describes [\d,]{14,} parameters, and the weight files"):
        loading.load(loading.find_model(str(saved)), CPU)
    check_size(10**12, None, "unknown", packed=False)
    check_size(64 * 10**9, 10**9, "packed", packed=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(saved, value):
    weights = load_file(saved / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][2, 3] = value
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    words = r"finite weights, but 1 of model\.layers\.1\.mlp\.up_proj\.weight are NaN or infinite"
    with pytest.raises(UsageError, match=words):
        loading.load(loading.find_model(str(saved)), CPU)


def test_finite_weights_whose_sum_is_not_pass():
    model = torch.nn.Linear(4, 4)
    model.weight.data.fill_(3e38)
    check_finite(model, "large")
    model.half().weight.data.fill_(6e4)
    check_finite(model, "large")


def test_weights_of_eight_bits_that_are_not_finite_are_counted():
    model = torch.nn.Linear(4, 4).requires_grad_(False)
    model.weight.data = model.weight.to(torch.float8_e4m3fn)
    check_finite(model, "narrow")
    model.weight.data[2, 3] = torch.nan
    with pytest.raises(UsageError, match="finite weights, but 1 of weight are NaN"):
        check_finite(model, "narrow")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "gone.safetensors", 3])
def test_an_index_names_weight_files_beside_it_alone(saved, name):
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(UsageError, match="must name weight files beside it, but it names"):
        loading.load(loading.find_model(str(saved)), CPU)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", "[1]", r"config\.json must hold one JSON object, but it holds list"),
        ("tokenizer.json", "{", r"tokenizer\.json is malformed JSON at column 2"),
        ("tokenizer_config.json", "[" * 99999, r"tokenizer_config\.json is nested too deeply"),
        ("tokenizer_config.json", '{"backend": "\\ud800"}', "half of a surrogate pair"),
        ("generation_config.json", "\xff", r"generation_config\.json must be UTF-8"),
    ],
)
def test_files_of_json_are_named_where_they_cannot_be_read(tmp_path, name, text, words):
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=words):
        check_json_files(tmp_path)


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize(
    "value", ["org/kernel", "kernels-community/flash-attn2", "flash_attention_2"]
)
def test_a_config_that_names_a_kernel_fetches_nothing(saved, monkeypatch, name, value):
    from transformers import modeling_utils

    monkeypatch.setattr(
        modeling_utils, "lazy_import_flash_attention", lambda *_, **__: pytest.fail("fetched")
    )
    change_config(saved, **{name: value})
    model, _ = loading.load(loading.find_model(str(saved)), CPU)
    assert model.config._attn_implementation == "sdpa"
    loading.load_without_weights(loading.find_model(str(saved)))
    assert loading.load_config(str(saved / "config.json"))[0]._attn_implementation is None


def test_a_config_inside_another_names_no_kernel_either(saved):
    inner = {"model_type": "qwen2", "_attn_implementation": "org/kernel"}
    change_config(saved, model_type="llava", text_config=inner)
    config, _ = loading.load_config(str(saved))
    assert config.text_config._attn_implementation is None


def test_a_wish_for_kernels_of_the_hub_is_off_unless_the_user_says_so():
    import os

    from transformers.integrations import hub_kernels

    assert os.environ["USE_HUB_KERNELS"] == "NO"
    assert not hub_kernels._kernels_enabled


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    loading.save(tiny.model(vocab_size=200), tiny.tokenizer(), tmp_path)
    with pytest.raises(
        UsageError, match=r"but 59 of its tokens, such as .* with the id 200, lie b"
    ):
        loading.load(loading.find_model(str(tmp_path)), CPU)


def test_a_token_that_was_added_may_lie_beyond_the_embeddings(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    loading.save(tiny.model(), tokenizer, tmp_path)
    loading.load(loading.find_model(str(tmp_path)), CPU)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "generation_config.json", "chat_template.jinja"]
)
def test_a_pipe_among_the_files_of_a_model_is_refused_and_not_waited_for(saved, name):
    (saved / name).unlink(missing_ok=True)
    os.mkfifo(saved / name)
    with pytest.raises(UsageError, match=f"{name} must be a file, but it is a pipe"):
        loading.find_model(str(saved))


def test_files_of_an_absurd_size_are_refused_before_they_are_read(saved):
    check_files(saved)
    os.truncate(saved / "tokenizer_config.json", 1 << 33)
    with pytest.raises(UsageError, match=r"tokenizer_config\.json must have at most 67,108,864"):
        check_files(saved)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_weights_that_are_no_fractions_are_refused_unless_they_are_packed(saved, dtype):
    path = saved / "model.safetensors"
    weights = {name: t.to(dtype) for name, t in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"must hold floating-point numbers, but .* has the dtype"):
        loading.load(loading.find_model(str(saved)), CPU)
    assert stored_elements(saved, None, packed=True) > 0
