import math

import pytest
import tiny
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from mollm.errors import UsageError
from mollm.models.adapters import (
    adapted,
    adapter_tensors,
    checkpoint_activations,
    given,
    load_adapter,
    merged,
)

peft = pytest.importorskip("peft")

IDS = torch.arange(3, 13)[None]


def config(**options):
    return peft.LoraConfig(**({"r": 4, "target_modules": "all-linear"} | options))


def test_a_merged_model_says_what_the_adapted_one_says_and_leaves_it_alone():
    model = tiny.model(tie_word_embeddings=False)
    before = model(IDS).logits
    assert merged(model, None, parts=False) is model
    wrapped = adapted(model, config(init_lora_weights=False))
    expected = model.eval()(IDS).logits
    assert not torch.allclose(expected, before, atol=1e-3)
    plain = merged(model, wrapped, parts=False)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("tied", "options", "words"),
    [
        (False, {"target_modules": ["lm_head"], "lora_dropout": 0.1}, "lora_dropout must be 0"),
        (True, {"target_modules": ["lm_head"]}, "must leave the head alone"),
        (False, {"use_dora": True}, "use_dora is not supported in a LoraConfig, but got True"),
    ],
)
def test_adapters_that_the_losses_cannot_follow_are_refused(tied, options, words):
    with pytest.raises(UsageError, match=words):
        adapted(tiny.model(tie_word_embeddings=tied), config(**options))


def test_checkpointed_activations_let_gradients_reach_an_adapter():
    model = tiny.model()
    adapted(model, config(target_modules=["q_proj"]))
    checkpoint_activations(model, {"use_reentrant": True})
    model.train()(IDS).logits.sum().backward()
    trained = [p for name, p in model.named_parameters() if "lora_" in name]
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, r"none called 'v_porj'; did you mean v_proj\?"),
        ({"target_modules": "(.*q_porj"}, "by valid patterns"),
        ({"target_modules": ".*q_porj"}, "target_modules must name modules"),
        ({"modules_to_save": ["norms"]}, "modules_to_save must name modules"),
        ({"exclude_modules": ["up_porj"]}, "exclude_modules must name modules"),
        ({"rank_pattern": {"q_porj": 2}}, "rank_pattern must name modules"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0, 7]},
            "of the 2 layers, from 0, but got 7",
        ),
        ({"target_modules": ["norm"]}, "the adapter does not suit LlamaForCausalLM"),
        ({"use_qalora": True}, "use_qalora is not supported"),
        ({"init_lora_weights": "eva"}, "init_lora_weights must be one of True, .* got 'eva'"),
        ({"target_modules": 3}, "target_modules of an adapter must be a pattern or a list of"),
        ({"modules_to_save": 3}, "modules_to_save of an adapter must be a list of names"),
        ({"lora_alpha": -5}, "lora_alpha of an adapter must be a positive number, but got -5"),
        ({"lora_alpha": float("nan")}, "lora_alpha of an adapter must be a positive number"),
        ({"lora_dropout": 1.0}, "lora_dropout of an adapter must be a number from 0 to below 1"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern of an adapter must be ranks by name"),
        ({"bias": "some"}, "bias of an adapter must be none, all or lora_only"),
        ({"inference_mode": True}, "inference_mode must be False"),
        ({"task_type": "SEQ_CLS"}, "task_type must be CAUSAL_LM"),
        ({"modules_to_save": ["embed_tokens"]}, "must leave the head alone"),
        ({"target_modules": ["embed_tokens"]}, "must leave the head alone"),
    ],
)
def test_adapters_that_peft_refuses_or_takes_in_part_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        adapted(tiny.model(), config(**options))


def test_peft_models_that_cannot_train_are_refused():
    wrapped = peft.get_peft_model(tiny.model(), config(target_modules=["q_proj"]))
    assert given(wrapped) is wrapped
    wrapped.add_adapter("second", config(target_modules=["v_proj"]))
    with pytest.raises(UsageError, match="must have one adapter, but got default, second"):
        given(wrapped)
    wrapped.delete_adapter("second")
    wrapped.merge_adapter()
    with pytest.raises(UsageError, match=r"must not be merged.*call unmerge_adapter"):
        given(wrapped)
    wrapped.unmerge_adapter()
    wrapped.requires_grad_(False)
    with pytest.raises(UsageError, match="must be loaded with is_trainable=True"):
        given(wrapped)


def test_an_adapter_by_another_name_than_peft_gives_it_is_found():
    wrapped = peft.get_peft_model(tiny.model(), config(target_modules=["q_proj"]), "mine")
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(adapter_tensors(wrapped, trained)) == len(trained) > 0


def test_checkpointed_activations_of_a_class_without_them_are_refused():
    model = tiny.model()
    model.supports_gradient_checkpointing = False
    with pytest.raises(UsageError, match="gradient_checkpointing must be left out for a LlamaFor"):
        checkpoint_activations(model, None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop(sorted(w)[0]), "lora_A.default.weight is missing"),
        (lambda w: w.update(x=torch.ones(2)), "x is one too many"),
        (lambda w: w.clear(), "is missing"),
        (lambda w: w.update({n: t * math.nan for n, t in w.items()}), "must have finite weights"),
        (lambda w: w.update({n: t.to(torch.complex64) for n, t in w.items()}), "finite weights"),
    ],
)
def test_an_adapter_that_is_not_what_it_says_is_refused(change, words, tmp_path):
    wrapped = peft.get_peft_model(
        tiny.model(),
        peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    wrapped.save_pretrained(tmp_path)
    load_adapter(tiny.model(), str(tmp_path))
    weights = load_file(tmp_path / "adapter_model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=words) as refused:
        load_adapter(tiny.model(), str(tmp_path))
    assert str(tmp_path) in str(refused.value)


def small_gpt2(vocabulary=48):
    options = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=48, **options))
    if vocabulary != 48:
        model.resize_token_embeddings(vocabulary)
    return model.eval()


def with_adapter(model, settings, folder):
    """What a model says with an adapter that was saved."""
    wrapped = peft.get_peft_model(model, settings).eval()
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    wrapped.save_pretrained(folder)
    return wrapped(IDS).logits


VECTORS = {"num_vectors": 4, "vector_length": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (tiny.model, lambda: config(target_modules=["q_proj", "embed_tokens"])),
        (tiny.model, lambda: config(target_modules=["q_proj", "lm_head"])),
        (
            lambda: tiny.model(tie_word_embeddings=False),
            lambda: config(target_modules=["embed_tokens", "lm_head"]),
        ),
        (lambda: small_gpt2(60), lambda: config(target_modules=["c_attn"], fan_in_fan_out=True)),
        (tiny.model, lambda: peft.VBLoRAConfig(topk=1, **VECTORS)),
        (tiny.model, lambda: peft.VBLoRAConfig(topk=2, save_only_topk_weights=True, **VECTORS)),
        (tiny.model, lambda: peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3)),
    ],
)
@pytest.mark.filterwarnings("ignore")  # peft tells of tied and of resized matrices
def test_an_adapter_of_which_peft_renames_or_shares_weights_is_loaded(make, settings, tmp_path):
    expected = with_adapter(make(), settings(), tmp_path)
    torch.testing.assert_close(load_adapter(make(), str(tmp_path))(IDS).logits, expected)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    lost = next(n for n in weights if "lora_" in n or "vector" in n or "prompt" in n)
    save_file(
        {n: t for n, t in weights.items() if n != lost}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(UsageError, match=r"is missing|cannot be put on"):
        load_adapter(make(), str(tmp_path))


def test_an_adapter_of_experts_one_by_one_is_loaded(tmp_path):
    pytest.importorskip("peft.utils.transformers_weight_conversion")  # earlier releases refuse it
    model = zoo.model("mixtral")
    settings = config(target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM")
    settings.save_pretrained(str(tmp_path))
    weights = {}
    for layer in range(model.config.num_hidden_layers):
        for expert in range(model.config.num_local_experts):
            for name in ("w1", "w2", "w3"):
                inner, outer = model.config.hidden_size, model.config.intermediate_size
                if name == "w2":
                    inner, outer = outer, inner
                start = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                weights[f"base_model.model.{start}.lora_A.weight"] = torch.randn(4, inner)
                weights[f"base_model.model.{start}.lora_B.weight"] = torch.randn(outer, 4)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    ids = IDS % zoo.VOCABULARY
    before = model(ids).logits
    assert not torch.allclose(load_adapter(model, str(tmp_path))(ids).logits, before)
    weights.pop(next(iter(weights)))
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UsageError, match="cannot be put on"):
        load_adapter(zoo.model("mixtral"), str(tmp_path))


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "jamba"])
def test_what_mamba_reads_past_an_adapter_has_none(kind):
    model = zoo.model(kind)
    wrapped = adapted(model, config(target_modules="all-linear", init_lora_weights=False))
    model(IDS % zoo.VOCABULARY).logits.square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in trained.values())
    expected = model.eval()(IDS % zoo.VOCABULARY).logits
    plain = merged(model, wrapped, parts=False).eval()
    torch.testing.assert_close(plain(IDS % zoo.VOCABULARY).logits, expected, rtol=1e-3, atol=1e-4)
    for names in (["x_proj", "dt_proj"], r".*\.dt_proj"):
        with pytest.raises(UsageError, match="target_modules must leave out 'dt_proj', whose matr"):
            adapted(zoo.model(kind), config(target_modules=names))


@pytest.mark.parametrize(
    "spared",
    [
        {"exclude_modules": r".*\.mamba\..*"},
        {"exclude_modules": ["mamba.dt_proj"]},
        {"layers_to_transform": [1]},
    ],
)
def test_what_is_spared_of_the_layers_of_mamba_is_not_refused(spared):
    def asked(**options):
        return adapted(zoo.model("jamba"), config(target_modules=["dt_proj", "q_proj"], **options))

    with pytest.raises(UsageError, match="target_modules must leave out 'dt_proj'"):
        asked()
    names = [name for name, p in asked(**spared).named_parameters() if p.requires_grad]
    assert names
    assert not any("dt_proj" in name for name in names)
