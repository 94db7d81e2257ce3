import copy

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from mollm.models.dropout import without_dropout
from mollm.models.logits import check_logits

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
NOISY = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**SIZES, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            **SIZES,
            ffn_dim=64,
            word_embed_proj_dim=32,
            dropout=0.5,
            attention_dropout=0.5,
            layerdrop=0.5,
        )
    ),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(**SIZES, hidden_dropout=0.5, attention_dropout=0.5)
    ),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(**SIZES, hidden_dropout=0.5, attention_dropout=0.5)
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(
            **SIZES,
            intermediate_size=32,
            num_key_value_heads=2,
            num_local_experts=4,
            router_jitter_noise=0.5,
            attention_dropout=0.5,
        )
    ),
}


def gradients(model):
    model.zero_grad()
    hidden = model.base_model(torch.arange(3, 13)[None], use_cache=False).last_hidden_state
    hidden.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", NOISY)
def test_nothing_is_random_in_training_mode(kind):
    model = NOISY[kind]()
    expected = gradients(model.eval())
    model.train()
    without_dropout(model, training=True)
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, expected[name])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", NOISY)
def test_checkpointed_layers_compute_twice_and_the_same(kind, reentrant):
    model = NOISY[kind]()
    expected = gradients(model.eval())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    runs = []
    layer = next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    for inner in layer.children():
        inner.register_forward_hook(lambda *_: runs.append(1))
    for _ in range(2):  # also where the mode was set before
        model.train()
        without_dropout(model, training=True)
        runs.clear()
        found = gradients(model)
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    twice = len(runs)
    without_dropout(model, training=False)
    runs.clear()
    gradients(model)
    assert len(runs) < twice  # where nothing trains, nothing is computed again


def test_a_copy_has_layers_of_its_own():
    model = NOISY["gpt2"]()
    model.gradient_checkpointing_enable()
    without_dropout(model, training=True)
    twin = copy.deepcopy(model)
    mine = {id(m) for m in twin.modules()}
    wrapped = [m for m in twin.modules() if "_gradient_checkpointing_func" in vars(m)]
    kept = [m._gradient_checkpointing_func for m in wrapped]
    assert {id(f.layer) for f in kept if hasattr(f, "layer")} <= mine


def test_the_dropout_of_an_adapter_acts_where_it_trains():
    peft = pytest.importorskip("peft")
    model = NOISY["opt"]()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)
    peft.get_peft_model(model, config)
    without_dropout(model, training=True)
    acting = [name for name, m in model.named_modules() if m.training]
    assert acting
    assert all("lora_dropout" in name for name in acting)
    without_dropout(model, training=False)
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used before"])
def test_the_weights_of_rwkv_are_not_divided_in_evaluation_mode(used):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "rescale_every": 2}
    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(**sizes)).eval()
    before = copy.deepcopy(model.state_dict())
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        wanted = copy.deepcopy(model).train()(ids).logits
        if used:
            model(ids)
        check_logits(model)
        torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=0)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert model.config.rescale_every == 2  # is written
