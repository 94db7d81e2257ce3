import re

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mollm import UsageError, find_blocks

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def made(kind, **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | options)))


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        ("llama", {}, "LlamaDecoderLayer"),
        ("gemma2", {"head_dim": 8}, "Gemma2DecoderLayer"),
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 3}, "GPT2Block"),
        ("mixtral", {"num_local_experts": 4}, "MixtralDecoderLayer"),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "OPTDecoderLayer"),
        ("mamba", {"state_size": 4}, "MambaBlock"),
    ],
)
def test_blocks_are_found_whatever_they_are_called(kind, options, name):
    model = made(kind, **options).train()
    blocks = find_blocks(model)
    assert [type(block).__name__ for block in blocks] == [name] * 3
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_frozen_embeddings_make_no_difference():
    model = made("llama")
    model.get_input_embeddings().requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    assert find_blocks(model) == tuple(model.model.layers)


def refusal(model):
    with pytest.raises(UsageError) as error:
        find_blocks(model)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_block_that_runs_twice_is_refused():
    model = made("llama")
    layers = model.model.layers
    layers[1].register_forward_hook(lambda block, args, result: layers[0](result, **rest))
    rest = {
        "position_embeddings": model.model.rotary_emb(torch.zeros(1, 4, 32), torch.arange(4)[None])
    }
    assert re.search("'streamed' for the model LlamaForCausalLM, which has no list", refusal(model))


def test_blocks_that_share_parameters_are_refused():
    model = made("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    assert "share parameters" in refusal(model)


def test_a_block_that_shares_with_the_rest_is_refused():
    model = made("llama", tie_word_embeddings=False)
    model.model.norm.weight = model.model.layers[0].input_layernorm.weight
    assert "share parameters" in refusal(model)


def test_a_side_path_between_blocks_is_refused():
    model = made("llama", initializer_range=0.3)
    kept = []
    model.model.layers[0].mlp.register_forward_hook(lambda *call: kept.append(call[-1]))
    model.model.layers[2].mlp.register_forward_hook(lambda *call: call[-1] + kept[-1])
    assert "hand each other more than they return" in refusal(model)


def test_a_side_path_that_autograd_does_not_see_is_refused():
    """As of keys in a cache: computed again, the block would meet what it has left itself."""
    model = made("llama", initializer_range=0.3)
    kept = []
    model.model.layers[0].mlp.register_forward_hook(lambda *call: kept.append(call[-1].detach()))
    model.model.layers[1].mlp.register_forward_hook(
        lambda *call: call[-1] * (1 + len(kept) * kept[-1].mean())
    )
    assert "hand each other more than they return" in refusal(model)


def test_an_adapter_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.model(), peft.LoraConfig(target_modules="all-linear"))
    assert "with an adapter" in refusal(model)
    assert "with an adapter" in refusal(model.get_base_model())


def test_a_name_like_that_of_an_adapter_is_none():
    model = made("llama")
    model.model.layers[0].mlp.lora_like = nn.Identity()
    assert find_blocks(model) == tuple(model.model.layers)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_computes_no_finite_numbers_is_told_so(value):
    model = made("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = value
    assert "the model LlamaForCausalLM must compute finite numbers" in refusal(model)


def test_a_model_without_a_list_of_blocks_is_refused():
    model = made("llama", num_hidden_layers=1)
    model.model.layers = nn.ModuleList()
    assert "has no list of blocks" in refusal(model)
