"""What models make of their head's outputs: fitted, found in models of many kinds, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from mollm.errors import UsageError
from mollm.models.forward import hidden_states
from mollm.models.logits import check_logits, fit, logit_transform, ramp, set_logit_transform
from mollm.system.precision import computing_in
from mollm_ops.operands import IDENTITY, LogitTransform

TINY = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
KINDS = [
    ("Llama", "LlamaConfig", {}, IDENTITY),
    ("Gemma2", "Gemma2Config", {}, LogitTransform(softcap=30.0)),
    ("Gemma2", "Gemma2Config", {"final_logit_softcapping": 1.0}, LogitTransform(softcap=1.0)),
    ("Gemma2", "Gemma2Config", {"final_logit_softcapping": None}, IDENTITY),
    ("Gemma3", "Gemma3TextConfig", {"final_logit_softcapping": 20.0}, LogitTransform(softcap=20.0)),
    ("Cohere", "CohereConfig", {}, LogitTransform(0.0625)),
    ("Cohere2", "Cohere2Config", {"logit_scale": 0.25}, LogitTransform(0.25)),
    ("Granite", "GraniteConfig", {"logits_scaling": 13.0}, LogitTransform(0.07692308)),
]


def made(name, config, options):
    torch.manual_seed(0)
    cls = getattr(transformers, f"{name}ForCausalLM")
    return cls(getattr(transformers, config)(**(TINY | options))).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-2, 1.0, 50.0])
@pytest.mark.parametrize(("name", "config", "options", "wanted"), KINDS)
def test_scale_and_cap_are_found_whatever_the_size_of_the_logits(
    name, config, options, wanted, size, dtype
):
    model = made(name, config, options)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(size)
    assert check_logits(model.to(dtype)) == wanted


@pytest.mark.parametrize(("name", "config", "options", "wanted"), KINDS)
def test_the_transform_gives_the_models_own_logits(name, config, options, wanted):
    model = made(name, config, options).double()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state
        own = model(ids).logits
        computed = logit_transform(model)(model.lm_head(hidden))
    torch.testing.assert_close(computed, own, rtol=1e-7, atol=1e-7)


class Capped(GPT2LMHeadModel):
    """Scales and turns its states before the head, and caps after it."""

    def forward(self, input_ids, attention_mask=None):
        states = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        logits = 6 * torch.tanh(self.lm_head(states.flip(-1) / 4) / 6)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def test_what_happens_before_the_head_belongs_to_the_states():
    model, ids = Capped(gpt2()).eval(), torch.arange(12).view(2, 6)
    assert check_logits(model) == LogitTransform(softcap=6.0)
    states = hidden_states(model, ids, torch.ones_like(ids))
    computed = logit_transform(model)(model.lm_head(states))
    torch.testing.assert_close(computed, model(ids).logits)


TRANSFORMS = [
    IDENTITY,
    LogitTransform(0.37),
    LogitTransform(1 / 13),
    LogitTransform(softcap=30.0),
    LogitTransform(softcap=1.0),
    LogitTransform(100.0, 1.0),
    LogitTransform(0.0625, 15.0),
    LogitTransform(softcap=1e3),
    LogitTransform(3.3, 7.7),
    LogitTransform(1e-3, 0.5),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_fit(transform, dtype):
    outputs = ramp(8 * 259)
    assert float(outputs.abs().max()) == 60
    logits = transform(outputs).to(dtype)
    found = fit(outputs, logits)
    limit = 2e-6 if dtype == torch.float32 else 0.05
    off = float((found(outputs.double()) - transform(outputs.double())).abs().max())
    assert off <= limit * float(logits.abs().max())
    if dtype == torch.float32:
        assert found.scale == pytest.approx(transform.scale, rel=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        torch.sin,
        torch.neg,
        torch.log_softmax,
        lambda z: z + 1,
        lambda z: z.clamp(-30, 30),
        lambda z: z * torch.sigmoid(z),
        lambda z: z.masked_fill(z > 59, -torch.inf),
        lambda z: 0 * z,
    ],
)
def test_what_is_neither_scale_nor_cap_has_no_fit(function):
    outputs = ramp(8 * 259)
    logits = function(outputs, 0) if function is torch.log_softmax else function(outputs)
    assert fit(outputs, logits) is None


def gpt2(**options):
    return GPT2Config(
        vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32, pad_token_id=0, **options
    )


class Later(GPT2LMHeadModel):
    """Its logits are not what the head returned."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits.log_softmax(-1)
        return output


class Around(GPT2LMHeadModel):
    """The head's matrix is used without the head."""

    def forward(self, input_ids, attention_mask=None):
        states = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=states @ self.lm_head.weight.T)


class Mixed(GPT2LMHeadModel):
    """Every token sees the mean of all."""

    def forward(self, input_ids, attention_mask=None):
        states = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.lm_head(states + states.mean(1, keepdim=True))
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


class Normed(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight))


class Headed(GPT2LMHeadModel):
    """Its head is more than a matrix."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = Normed(config.n_embd, config.vocab_size, bias=False)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Later, "transforms its logits after the head by more than a scale and a cap"),
        (Around, "does not compute its logits by one pass of its head"),
        (Mixed, "lets tokens see later ones"),
        (Headed, "has a head that is more than a matrix and a bias"),
    ],
)
def test_what_the_losses_cannot_express_is_refused_in_one_sentence(cls, message):
    with pytest.raises(UsageError, match=f"the model {cls.__name__} {message}") as refused:
        check_logits(cls(gpt2(tie_word_embeddings=False)))
    assert str(refused.value).count(". ") == 0


def test_an_encoder_decoder_is_refused():
    t5 = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0
    )
    with pytest.raises(UsageError, match="is an encoder-decoder"):
        check_logits(transformers.T5ForConditionalGeneration(t5))


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("coupling", [1.0, 0.2])
@pytest.mark.parametrize("cls", [transformers.BertLMHeadModel, transformers.BertForMaskedLM])
def test_a_model_that_sees_later_tokens_is_refused_however_little_it_sees_of_them(
    cls, coupling, compute_dtype
):
    bert = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    model = cls(bert)
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.output.dense.weight.mul_(coupling)
    with (
        computing_in(compute_dtype),
        pytest.raises(UsageError, match=r"see later ones, so .* which the losses do not support"),
    ):
        check_logits(model)


def test_the_probe_leaves_the_model_as_it_was():
    model = made("Gemma2", "Gemma2Config", {}).train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    check_logits(model)
    assert model.training
    assert not model.lm_head._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_diverged_is_not_taken_for_one_of_another_kind():
    model = made("Gemma2", "Gemma2Config", {})
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    assert check_logits(model) == LogitTransform(softcap=30.0)


def test_copies_have_the_transform_and_models_without_weights_can_be_given_it():
    model = made("Gemma2", "Gemma2Config", {})
    check_logits(model)
    assert copy.deepcopy(model)._mollm_logits == LogitTransform(softcap=30.0)
    with torch.device("meta"):
        empty = made("Gemma2", "Gemma2Config", {})
    set_logit_transform(empty, logit_transform(model))
    assert logit_transform(empty) == LogitTransform(softcap=30.0)
