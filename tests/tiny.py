"""Tiny random models and a word tokenizer, made on the spot: no file and no network is needed."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers import decoders as token_decoders
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mollm import facts

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tokenizer(*, template: bool = True, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges; as in SmolLM2, padding is the end of a turn."""
    special = ["<|start|>", "<|end|>", "<s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = token_decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=["<|start|>"],
    )
    made.chat_template = TEMPLATE if template else None
    return made


def model(seed: int = 0, **options: object) -> LlamaForCausalLM:
    """A random Llama of some 50 thousand parameters."""
    settings = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(settings | options))).eval()


def knowing_replies(texts: list[str]) -> list[str]:
    """Right answers to every question of the quiz, for tests that replace the model's answers."""
    known = {
        facts.capital_question(c, f).text: a[0]
        for c, a in facts.CAPITALS.items()
        for f in (*facts.TRAIN_FORMS, facts.TEST_FORM)
    }
    known |= {text: accepted[0] for text, accepted in facts.GENERAL.items()}
    return [f"It is {known.get(text, 'so')}." for text in texts]
